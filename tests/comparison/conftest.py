"""Fixtures of the tests of a comparison."""

import json
from pathlib import Path

import pytest
from comparing import GOOD, ROWS, write_config

from reports import page as report


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A folder to start from, with rows and the file of a comparison; pictures are left out, they take a second."""
    monkeypatch.setattr(report, "draw_pictures", lambda results, folder: {})
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    Path("rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))
    write_config(GOOD)
    return tmp_path
