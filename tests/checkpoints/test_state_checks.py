"""States that were edited: counts that no run has, manifests that leave something out, files that are none."""

import faulthandler
import hashlib
import json
import os

import pytest
from made_states import STATE_FILES, make_state

import utils
from checkpoints import state_checks
from runtime import folders
from runtime.exits import UserError
from training import resuming, run_folder

USUAL = {"count": 3, "mean": -1.0, "variance": 0.5}


@pytest.fixture(autouse=True)
def limit():
    """What has no end must not be read."""
    faulthandler.dump_traceback_later(120, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def close_again(folder, *, without=(), **more):
    """Write the manifest of a folder anew, as somebody would who edits its files. more: names it must have, too."""
    (folder / "manifest.json").unlink()
    names = [name for name in folders.files_in(folder) if name not in without and (folder / name).is_file()]
    entries = {name: folders.file_entry(folder / name) for name in names} | more
    (folder / "manifest.json").write_text(json.dumps({"files": entries}))


def edit_progress(folder, **changes):
    path = folder / "state.json"
    info = json.loads(path.read_text())
    info["progress"] |= changes
    path.write_text(json.dumps(info))
    close_again(folder)
    return info


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"step": 10**9}, "progress.step is 1000000000, must be from 0 to 11 in this run"),
        ({"step": 12}, "progress.step is 12, must be from 0 to 11"),
        ({"step": -1}, "progress.step is -1, must"),
        ({"step": 5}, "progress.step is 5, its folder says 4"),
        ({"num_tokens": -1}, "progress.num_tokens is -1, must be from 0"),
        ({"num_tokens": 10**99}, "progress.num_tokens is 1000"),
        ({"num_applied": 5}, "progress.num_applied is 5, must be from 0 to 4"),
        ({"num_skipped": -3}, "progress.num_skipped is -3"),
        ({"window_labels": -3}, "progress.window_labels is -3"),
        ({"window_loss": float("nan")}, "progress.window_loss is nan"),
        ({"best_value": float("inf")}, "progress.best_value is inf"),
        ({"best_step": 7}, "progress.best_step is 7"),
        ({"num_worse": -1}, "progress.num_worse is -1"),
        ({"usual_loss": {**USUAL, "count": -1}}, "progress.usual_loss.count is -1"),
        ({"usual_loss": {**USUAL, "variance": -0.1}}, "progress.usual_loss.variance is -0.1"),
    ],
)
def test_counts_that_no_run_has(tmp_path, changes, says):
    """The kind: a state.json that was edited, its manifest with it. The state of a run of 12 updates, after the 4th."""
    folder = make_state(tmp_path, 4)
    good = {"num_applied": 4, "num_tokens": 9, "best_value": -2.5, "best_step": 4, "usual_loss": USUAL}
    state_checks.check_range(str(folder), edit_progress(folder, **good), 12)
    edit_progress(folder, **{**good, **changes})
    assert resuming.find_state("auto", str(tmp_path)) == (str(folder), [])
    with pytest.raises(UserError, match=rf"--resume: {folder}/state.json: {says}.*: use another state"):
        state_checks.check_range(str(folder), state_checks.read_info(str(folder)), 12)


def test_a_world_that_is_not_that_of_the_split(tmp_path):
    with pytest.raises(UserError, match=r"world_size is 2, but split is \[2, 1, 1\]: use another state"):
        state_checks.read_info(str(make_state(tmp_path, 4, split=[2, 1, 1])))


OPTIMIZER = STATE_FILES[-1]


@pytest.mark.parametrize(
    "spoil, says",
    {
        lambda folder: (folder / "manifest.json").write_text('{"files": {}}'): "not a manifest",
        lambda folder: close_again(folder, without=["state.json"]): "does not name state.json",
        lambda folder: close_again(folder, without=["rank-1.pt"]): "does not name rank-1.pt",
        lambda folder: close_again(
            folder, without=[OPTIMIZER]
        ): "names 1 files of optimizers and 1 of weights, of 2 proc",
        lambda folder: close_again(folder, without=[STATE_FILES[2]]): "names 2 files of optimizers and 0 of weights",
        lambda folder: (folder / "deepspeed" / "more.pt").write_bytes(
            b"x"
        ): "deepspeed/more.pt: is not in manifest.json",
    }.items(),
)
def test_a_manifest_that_leaves_something_out(tmp_path, spoil, says):
    """The kind: a state without a part of it. It is left out by --resume auto and refused by its name."""
    folder = make_state(tmp_path, 4)
    assert state_checks.state_problems(str(folder)) == []
    spoil(folder)
    place, [line] = resuming.find_state("auto", str(tmp_path))
    assert place is None and says in line
    with pytest.raises(UserError, match="use an older state"):
        resuming.find_state(str(folder), str(tmp_path))


def link(folder, name):
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    return "is a link"


def link_to_a_file(folder, name):
    (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")
    return "is a link"


def pipe(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    return "is no regular file"


def linked_folder(folder, name):
    (folder / "inside").rename(folder.parent / "elsewhere")
    (folder / "inside").symlink_to(folder.parent / "elsewhere")
    return "lies behind a link, inside"


@pytest.mark.parametrize("spoil", [link, link_to_a_file, pipe, linked_folder])
@pytest.mark.parametrize("kind", ["state-step-4", "epoch-1-step-4", "best"])
def test_only_regular_files_inside_a_folder_are_read(tmp_path, spoil, kind):
    """The kind: every folder with a manifest. /dev/zero, of 0 bytes, would be hashed for ever."""
    folder = tmp_path / kind
    with folders.new_folder(str(folder)) as scratch:
        os.mkdir(os.path.join(scratch, "inside"))
        open(os.path.join(scratch, "inside", "a"), "wb").close()
    said = spoil(folder, "inside/a")
    for full in (False, True):
        assert folders.verify(str(folder), full) == [f"{folder}/inside/a: {said}: copy the folder again"]
    assert not folders.is_whole(str(folder))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "./a", "", "a\0b"])
def test_names_that_leave_the_folder(tmp_path, name):
    empty = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    (tmp_path / "x").write_bytes(b"")
    folder = make_state(tmp_path, 4)
    close_again(folder, **{name: empty})
    [line] = folders.verify(str(folder))
    assert "leaves the folder" in line or "cannot be read" in line


@pytest.mark.parametrize("spoil", [link, pipe])
@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_a_json_file_without_an_end(tmp_path, spoil, name):
    """A manifest is read before anything else of a folder; a state.json by other commands, too."""
    folder = make_state(tmp_path, 4)
    spoil(folder, name)
    place, [line] = resuming.find_state("auto", str(tmp_path))
    assert place is None and name in line
    with pytest.raises(UserError, match="not a file"):
        utils.read_json(str(folder / name))


def test_a_last_checkpoint_that_names_no_file(tmp_path):
    """A run is done already only where its last checkpoint is whole: an empty manifest is none."""
    with folders.new_folder(str(tmp_path / "epoch-1-step-4")) as scratch:
        open(os.path.join(scratch, "run.json"), "wb").close()
    (tmp_path / "events.jsonl").write_text('{"step": 4, "event": "done"}\n')
    assert run_folder.last_checkpoint(str(tmp_path)) == str(tmp_path / "epoch-1-step-4")
    (tmp_path / "epoch-1-step-4" / "manifest.json").write_text('{"files": {}}')
    assert run_folder.last_checkpoint(str(tmp_path)) is None


def test_the_kinds_of_values_in_a_state():
    """A number for a number, a whole one for a whole one, what may be absent as a number or null."""
    cases = [(1, 1.5, True), (1.5, 1, False), (True, 1, False), (1, True, False), (None, None, True), (2, None, True)]
    cases += [("x", None, False), (True, None, False), (None, 1, False), ("x", "", True), ({}, {"a": 1}, True)]
    cases += [({"a": 2}, {"a": 1}, True), ({"b": 2}, {"a": 1}, False), ({"a": "x"}, {"a": 1}, False), (1, {}, False)]
    for value, new, is_like in cases:
        assert state_checks.is_like(value, new) == is_like, (value, new)
