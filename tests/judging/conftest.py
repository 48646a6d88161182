"""Fixtures of the tests of the judge."""

import threading

import pytest
from judge_stand_in import KEY, Endpoint, JudgeSandbox


@pytest.fixture
def serve():
    """Start stand-ins; they end with the test."""
    servers = []

    def start(*args, **kwargs):
        servers.append(Endpoint(*args, **kwargs))
        threading.Thread(target=servers[-1].serve_forever, args=(0.05,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("OPENAI_BASE_URL", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_CUSTOM_HEADERS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def sandbox(tmp_path, capsys):
    return JudgeSandbox(tmp_path, capsys)
