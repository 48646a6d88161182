"""A stand-in for an OpenAI-compatible endpoint whose verdicts the tests know, and a folder to judge in."""

import contextlib
import json
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import judge

KEY = "sk-secret-0123456789"
MODEL = "stand-in"
BLOCK = re.compile(r"^<<<(.+) ([0-9a-f]{16})>>>\n(.*?)\n<<</\1 \2>>>$", re.S | re.M)


def blocks_of(prompt):
    """{label: text} of a prompt, read by nothing but its marker lines."""
    return {label: text for label, _, text in BLOCK.findall(prompt)}


def scores_of(prompt):
    """Scores of A and B: the numbers that the answers end with; "first" gives the better one to what comes first."""
    *_, a, b = blocks_of(prompt).values()
    return ("8", "6") if "first" in a else (a.split()[-1], b.split()[-1])


def say(prompt, language="zh"):
    """A whole reply."""
    last_line = {"zh": "评分：A={} B={}", "en": "SCORES: A={} B={}"}[language]
    return "理由 reasons\n" + last_line.format(*scores_of(prompt))


def completion(text):
    usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    message = {"role": "assistant", "content": text}
    return 200, {}, {"object": "chat.completion", "choices": [{"index": 0, "message": message}], "usage": usage}


def refusal(status, message="no", **headers):
    return status, headers, {"error": {"message": message, "type": "error", "code": None}}


class Endpoint(ThreadingHTTPServer):
    """Keeps the requests. faults: what the first ones get; answer: what the others get; None: the connection drops."""

    daemon_threads = True

    def __init__(self, answer=None, faults=()):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer or (lambda request: completion(say(request["messages"][0]["content"])))
        self.faults = list(faults)
        self.requests, self.headers, self.times, self.keys = [], [], [], set()
        self.judged = Counter()  # prompt: how often it got a reply
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    """POST /v1/chat/completions."""

    def do_POST(self):
        server, request = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            assert self.path == "/v1/chat/completions"
            server.requests.append(request)
            server.headers.append(self.headers)
            server.times.append(time.monotonic())
            server.keys.add(self.headers["Authorization"])
            fault = server.faults.pop(0) if server.faults else server.answer
        result = fault(request) if callable(fault) else fault
        if result is None:
            return
        if callable(result):  # it writes what it likes
            with contextlib.suppress(OSError):
                result(self.wfile)
            return
        status, headers, body = result
        if status == 200:
            with server.lock:
                server.judged[request["messages"][0]["content"]] += 1
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def answers(texts, output="参考", questions=range(16)):
    """Lines as predict.py writes them."""
    reference = {"output": output} if output else {}
    rows = enumerate(zip(questions, texts))
    return [{"index": i, "query": f"问题 {question}", **reference, "prediction": text} for i, (question, text) in rows]


# 16 questions as (candidate, baseline): 7 wins, 3 losses, 3 ties, 3 that go to whatever comes first.
SIXTEEN = [("c 8", "b 6")] * 7 + [("c 5", "b 7")] * 3 + [("c 7", "b 7")] * 3 + [("c first", "b first")] * 3


class JudgeSandbox:
    """A folder with two prediction files and a way to judge them."""

    def __init__(self, folder, capsys):
        self.folder, self.capsys = folder, capsys
        self.output = folder / "out" / "verdicts.jsonl"

    def rows(self, pairs, **kwargs):
        write(self.folder / "candidate.jsonl", answers([candidate for candidate, _ in pairs], **kwargs))
        write(self.folder / "baseline.jsonl", answers([baseline for _, baseline in pairs], **kwargs))

    def flags(self, url=None, *more):
        words = ["--predictions", self.folder / "candidate.jsonl", "--baseline", self.folder / "baseline.jsonl"]
        words += ["--output_path", self.output, "--model", MODEL, *(("--base_url", url) if url else ()), *more]
        return [str(word) for word in words]

    def run(self, url=None, *more):
        """Judge; returns (report, table)."""
        judge.main(self.flags(url, *more))
        return self.report(), self.capsys.readouterr().out

    def fails(self, says, url=None, *more, argv=None):
        """One line that says it; main's ValueError is what the script makes a line of."""
        try:
            with pytest.raises(SystemExit) as stop:
                judge.main(argv or self.flags(url, *more))
            assert stop.value.code == 2
            line = self.capsys.readouterr().err.strip()
            assert line.startswith("judge.py: error: ")
        except ValueError as error:
            line = str(error)
        assert says in line and "\n" not in line and KEY not in line, line

    def verdicts(self):
        return [json.loads(line) for line in self.output.read_text(encoding="utf-8").splitlines()]

    def report(self):
        return json.loads(Path(f"{self.output}.report.json").read_text(encoding="utf-8"))


def once_each(server):
    return len(server.judged) == 32 and set(server.judged.values()) == {1}


def body(value, **headers):
    """An answer with this JSON, or these bytes."""
    return 200, headers, value
