"""What the watch makes of news from the other processes."""

import os
import selectors
import signal
import socket
import time
from threading import Thread

import pytest

from runtime.exits import EXIT_BAD_NUMBERS, EXIT_LEFT, EXIT_STALLED
from runtime.watchdog import Watch


class Left(Exception):
    """Stands for the end of this process: (exit code, message)."""


@pytest.fixture
def pair(monkeypatch, tmp_path):
    """(a watch with a lifeline to rank 3, that line, its other end, what the others are told)."""
    line, other = socket.socketpair()
    watch, told = Watch(), []
    watch.lines, watch.output_dir, watch.step_timeout = {line: 3}, str(tmp_path), 0
    monkeypatch.setattr(watch, "send", told.append)

    def leave(code, message=None):
        raise Left(code, message)

    monkeypatch.setattr(watch, "leave_at_once", leave)
    selector = selectors.DefaultSelector()
    selector.register(line, selectors.EVENT_READ)
    yield watch, line, other, told, selector
    line.close(), other.close(), selector.close()


@pytest.mark.parametrize("code", [0, EXIT_LEFT])
def test_a_process_that_is_done_ends_no_other(pair, code):
    """A process that is done, or that leaves because it was asked to, ends no other."""
    watch, line, other, told, selector = pair
    other.sendall(f"end {code}\n".encode())
    watch.receive(line, selector)
    assert watch.lines == {} and told == [] and not selector.get_map()


@pytest.mark.parametrize("word, code", [("end 1", 1), ("end 2", 2), (f"end {EXIT_BAD_NUMBERS}", 3), ("end", 1)])
def test_a_failed_process_ends_the_others_with_its_exit_code(pair, word, code):
    watch, line, other, told, selector = pair
    other.sendall(f"{word}\n".encode())
    with pytest.raises(Left) as left:
        watch.receive(line, selector)
    assert left.value.args == (code, None) and told == [f"end {code}"]


@pytest.mark.parametrize("how", ["closed", "words"])
def test_a_dead_process_ends_the_others_with_exit_code_1(pair, how):
    watch, line, other, told, selector = pair
    other.sendall(b"hello\n") if how == "words" else other.close()
    with pytest.raises(Left) as left:
        watch.receive(line, selector)
    assert left.value.args == (1, "the process of rank 3 has died: the others end too") and told == ["end 1"]


def test_news_after_the_end_is_ignored(pair):
    watch, line, other, told, selector = pair
    watch.is_over.set()
    other.close()
    watch.receive(line, selector)
    assert told == [] and watch.lines == {line: 3}


def test_a_stalled_step_is_reported_and_has_its_exit_code(pair, monkeypatch):
    """It is written down with its rows, the others hear of it, and the code says it."""
    from runtime import watchdog

    watch, line, other, told, selector = pair
    monkeypatch.setattr(watchdog, "LOOK_SECONDS", 0)
    Thread(target=time.sleep, args=(2,), daemon=True).start()
    watch.begin(7, type("Rows", (), {"place": staticmethod(lambda n: f"rows.json:{n}")})(), [4, 9])
    watch.step_timeout = 5
    other.sendall(b"stalled\n")
    with pytest.raises(Left) as left:
        watch.receive(line, selector)
    assert left.value.args[0] == EXIT_STALLED and told == ["stalled", f"end {EXIT_STALLED}"]
    assert "--step_timeout 5: step 7, rows rows.json:4, rows.json:9 did not end in time" in left.value.args[1]
    [path] = os.listdir(watch.output_dir)
    with open(os.path.join(watch.output_dir, path)) as file:
        text = file.read()
    assert path == "stalled-rank-0.txt" and text.startswith("step 7, rows rows.json:4, rows.json:9; for 0 s")
    assert "test_a_stalled_step_is_reported" in text and text.count("hread 0x") > 1, "of every thread"
    assert watch.is_training


@pytest.mark.parametrize("seconds, timeout, is_late", [(10, 5, True), (3, 5, False), (10, 0, False)])
def test_the_clock_of_a_step(pair, monkeypatch, seconds, timeout, is_late):
    """Only a step that is worked on is late, and only with a limit."""
    watch, *_ = pair
    watch.lines, watch.launchers, watch.step_timeout = {}, [], timeout
    stalled = []
    monkeypatch.setattr(watch, "stalled", lambda: stalled.append(True) or watch.is_over.set())
    looks, waited = iter([False, True]), []
    monkeypatch.setattr(watch.is_over, "wait", lambda seconds: waited.append(seconds) or next(looks))
    watch.work = time.monotonic() - seconds, 7, None, []
    watch.poll()
    assert bool(stalled) == is_late
    watch.pause()
    looks = iter([False, True])
    stalled.clear()
    watch.poll()
    assert not stalled and watch.asked is None
    assert waited == [1.0] * 4, "without lifelines it looks every second"


def test_the_first_signal_asks_the_run_to_leave(pair, capsys):
    """The first signal counts; before the training begins it ends the run at once."""
    watch, *_ = pair
    with pytest.raises(SystemExit) as stop:
        watch.on_signal(signal.SIGTERM, None)
    assert stop.value.code == EXIT_LEFT and watch.asked == "SIGTERM"
    assert "SIGTERM: left before the training began" in capsys.readouterr().err
    watch.asked, watch.is_training = None, True
    watch.on_signal(signal.SIGINT, None)
    watch.on_signal(signal.SIGTERM, None)
    assert watch.asked == "Ctrl-C" and capsys.readouterr().err == "\nCtrl-C: leaving after this step\n"
