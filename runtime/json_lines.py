"""Files of JSON Lines that grow while a command works, and survive its death."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
from typing import Any


class JsonLines:
    """A JSON Lines file that outlives a full disk: lines that cannot be written wait for the next one."""

    def __init__(self, path: str, up_to_step: int) -> None:
        """Goes on after the lines up to a step; half a line of a killed process is dropped.

        Lines of later steps stay until they are written again: a run may go back, be killed, and go on from where it
        was before.
        """
        self.path, self.records, self.later, self.waiting, self.is_complaining = path, [], [], b"", False
        self.lock = threading.Lock()  # a state is closed by another thread
        if os.path.exists(path):
            found = read_records(path)
            self.records = [record for record in found if record["step"] <= up_to_step]
            self.rewrite([record for record in found if record["step"] > up_to_step] if up_to_step else [])

    def rewrite(self, later: Any) -> None:
        """Write the file anew, whole or not at all, with these lines of later steps at its end."""
        with open(self.path + ".partial", "w", encoding="utf-8") as file:
            file.writelines(to_line(record) for record in [*self.records, *later])
        os.replace(self.path + ".partial", self.path)
        self.later = later

    def add(self, record: dict) -> None:
        """Append a record."""
        with self.lock:
            self.append(record)

    def append(self, record: dict) -> None:
        """`add`, for one thread at a time."""
        self.records.append(record)
        self.waiting += to_line(record).encode()
        try:
            if self.later:
                self.rewrite([old for old in self.later if old["step"] > record["step"]])
                self.waiting = b""
                return
            with open(self.path, "ab", buffering=0) as file:
                size = file.seek(0, os.SEEK_END)
                if file.write(self.waiting) < len(self.waiting):
                    file.truncate(size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.waiting = b""
        except OSError as error:
            if not self.is_complaining:
                print(f"\n{self.path}: {error.strerror}: the run goes on, its lines wait", file=sys.stderr, flush=True)
        self.is_complaining = bool(self.waiting)


def to_line(record: dict) -> str:
    """A record as a line of JSON."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_records(path: str) -> list[dict[Any, Any]]:
    """The records of a JSON Lines file, those that are not whole left out; none where it is not there."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8", errors="replace") as file:
        return [record for line in file if (record := parse(line))]


def parse(line: Any) -> dict | None:
    """The record in a line, None where it is not whole."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
