"""Folders that are whole or absent: manifests, what a killed process leaves, what is kept, room."""

import hashlib
import json
import os

import pytest

from runtime import folders, streams


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


def write(folder, content=b"x" * 100):
    with folders.new_folder(str(folder)) as scratch:
        os.makedirs(os.path.join(scratch, "inside"), exist_ok=True)
        for name in ("a", "inside/b"):
            with open(os.path.join(scratch, name), "wb") as file:
                file.write(content)


def test_a_new_folder_is_whole_and_has_a_manifest(tmp_path):
    write(tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["new"]
    manifest = json.loads((tmp_path / "new" / "manifest.json").read_text())["files"]
    assert {name: entry["bytes"] for name, entry in manifest.items()} == {"a": 100, "inside/b": 100}
    assert folders.verify(str(tmp_path / "new")) == [] and folders.is_whole(str(tmp_path / "new"))
    assert folders.files_in(str(tmp_path / "new")) == ["a", "inside/b"], "without the manifest"


@pytest.mark.parametrize(
    "point", ["before the manifest", "before the rename", "between the renames", "after the rename"]
)
@pytest.mark.parametrize("replaced", [False, True])
def test_killed_at_a_point(tmp_path, monkeypatch, point, replaced):
    """Whatever is interrupted: after tidying up there is the old folder or the new one, whole, and nothing else."""
    folder = tmp_path / "state-step-3"
    if replaced:
        write(folder, b"old")

    def reached(name):
        if name == point:
            raise Killed

    monkeypatch.setattr(folders, "reached", reached)
    monkeypatch.setattr(folders.shutil, "rmtree", lambda *args, **kwargs: None)  # a killed process tidies nothing up
    if point == "between the renames" and not replaced:
        write(folder)  # there is no such point
    else:
        with pytest.raises(Killed):
            write(folder)
    monkeypatch.undo()
    folders.remove_leftovers(str(tmp_path), r"state-step-(\d+)")
    assert not replaced or os.listdir(tmp_path) == ["state-step-3"]
    for name in os.listdir(tmp_path):
        assert folders.is_whole(str(tmp_path / name))
    is_new = folder.exists() and (folder / "a").read_bytes() != b"old"
    assert is_new == (point == "after the rename" or (point == "between the renames" and not replaced))


def test_leftovers_of_others_stay(tmp_path):
    for name in ("state-step-3.partial", "state-step-x.partial", "mine.partial", "state-step-4"):
        (tmp_path / name).mkdir()
    folders.remove_leftovers(str(tmp_path), r"state-step-(\d+)")
    assert sorted(os.listdir(tmp_path)) == ["mine.partial", "state-step-4", "state-step-x.partial"]


@pytest.mark.parametrize(
    "spoil, says",
    {
        lambda folder: (folder / "a").write_bytes(b"y" * 100): "a: its bytes are not those that were saved",
        lambda folder: (folder / "a").write_bytes(b"x" * 99): "a: has 99 bytes, it was saved with 100",
        lambda folder: (folder / "inside" / "b").unlink(): "inside/b: cannot be read",
        lambda folder: (folder / "manifest.json").write_text("{"): "not a manifest",
        lambda folder: (folder / "manifest.json").write_text(
            '{"files": {"../x": {"bytes": 1, "sha256": "a"}}}'
        ): "x: leaves the folder",
        lambda folder: (folder / "manifest.json").write_text('{"files": {"/etc/passwd": 3}}'): "not a manifest",
        lambda folder: (folder / "manifest.json").write_text("[" * 100_000): "not a manifest",
        lambda folder: (folder / "manifest.json").write_text(
            '{"files": {"a": {"bytes": null, "sha256": "a"}}}'
        ): "not a manifest",
        lambda folder: (folder / "manifest.json").write_text(
            '{"files": {"a": {"bytes": 3, "sha256": ["a"]}}}'
        ): "not a manifest",
    }.items(),
)
def test_damage_is_named(tmp_path, spoil, says):
    write(tmp_path / "new")
    spoil(tmp_path / "new")
    [line] = folders.verify(str(tmp_path / "new"))
    assert says in line and "copy the folder again" in line
    assert not folders.is_whole(str(tmp_path / "new"))


def test_the_newest_are_kept(tmp_path):
    for step in (2, 10, 4):
        (tmp_path / f"state-step-{step}").mkdir()
    folders.keep_newest(str(tmp_path / "state-step-10"), r"state-step-(\d+)", 0)
    assert folders.numbered(str(tmp_path), r"state-step-(\d+)") == ["state-step-10", "state-step-4", "state-step-2"]
    folders.keep_newest(str(tmp_path / "state-step-10"), r"state-step-(\d+)", 2)
    assert sorted(os.listdir(tmp_path)) == ["state-step-10", "state-step-4"]
    folders.keep_newest(f"{tmp_path}/state-step-4", r"state-step-(\d+)", 1)  # of a run that has gone back
    assert sorted(os.listdir(tmp_path)) == ["state-step-10", "state-step-4"]
    folders.keep_newest(f"{tmp_path}/state-step-4.partial", r"state-step-(\d+)", 1)  # is not there
    folders.keep_newest(f"{tmp_path}/best", r"state-step-(\d+)", 1)
    assert sorted(os.listdir(tmp_path)) == ["state-step-10", "state-step-4"]
    assert folders.numbered(str(tmp_path / "absent"), "x") == []


def test_only_folders_are_numbered(tmp_path):
    for name in ("state-step-3", "state-step-12"):
        (tmp_path / name).mkdir()
    (tmp_path / "state-step-7").write_text("a file")
    assert folders.numbered(str(tmp_path), r"state-step-(\d+)") == ["state-step-12", "state-step-3"]


def test_room_to_the_byte(tmp_path, monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr(folders.shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    folders.require_space(str(tmp_path), 1000, "a state")
    with pytest.raises(ValueError, match="a state takes about 1.0 KB, 1.0 KB are free"):
        folders.require_space(str(tmp_path), 1001, "a state")
    assert streams.size_text(999) == "999 bytes" and streams.size_text(1000) == "1.0 KB"


def test_too_little_room_is_refused(tmp_path):
    folders.require_space(str(tmp_path / "a" / "b"), 1, "a state")
    with pytest.raises(
        ValueError, match=r"a/b: a state takes about 1000.0 TB, [\d.]+ [GT]B are free: make room or use"
    ):
        folders.require_space(str(tmp_path / "a" / "b"), 10**15, "a state")
    sizes = {5: "5 bytes", 16_200: "16.2 KB", 12_400_000_000: "12.4 GB", 10**15: "1000.0 TB"}
    assert {number: streams.size_text(number) for number in sizes} == sizes


def test_a_file_that_is_not_as_it_was_written(tmp_path):
    """A short, a long or a missing file: the folder does not get its name."""
    for sizes, is_good in (
        ({"a": 5}, True),
        ({"a": 4}, False),
        ({"a": 6}, False),
        ({"a": 5, "b": 1}, False),
        ({}, True),
    ):
        scratch = tmp_path / "new.partial"
        scratch.mkdir(exist_ok=True)
        (scratch / "a").write_bytes(b"12345")
        if is_good:
            folders.close_folder(str(scratch), str(tmp_path / "new"), sizes)
        else:
            with pytest.raises(OSError, match="[ab] is not as it was written"):
                folders.close_folder(str(scratch), str(tmp_path / "new"), sizes)
            assert os.listdir(tmp_path) == ["new.partial"]
        folders.shutil.rmtree(tmp_path / "new", ignore_errors=True)


def test_a_folder_without_a_manifest_is_not_whole(tmp_path):
    (tmp_path / "a").write_text("x")
    assert folders.verify(str(tmp_path)) == [] and not folders.is_whole(str(tmp_path))
    assert not folders.is_whole(str(tmp_path / "absent"))


def test_sizes_alone_are_looked_at_where_that_is_enough(tmp_path):
    write(tmp_path / "new")
    (tmp_path / "new" / "a").write_bytes(b"y" * 100)
    assert folders.is_whole(str(tmp_path / "new"), full=False) and not folders.is_whole(str(tmp_path / "new"))
    (tmp_path / "new" / "a").write_bytes(b"y")
    assert not folders.is_whole(str(tmp_path / "new"), full=False)


def test_files_can_be_read_by_those_who_may(tmp_path):
    """safetensors makes files for their owner alone: they get the rights that the umask gives any other file."""
    with folders.new_folder(str(tmp_path / "new")) as scratch:
        for name in ("a", "inside/b"):
            os.makedirs(os.path.dirname(os.path.join(scratch, name)), exist_ok=True)
            os.close(os.open(os.path.join(scratch, name), os.O_CREAT | os.O_WRONLY, 0o600))
    wanted = 0o666 & ~folders.UMASK
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "new").rglob("*") if path.is_file()} == {wanted}
    assert wanted != 0o600


def test_files_are_flushed_before_the_folder_is_renamed(tmp_path, monkeypatch):
    """Every file and folder is flushed, then the manifest, then the folder with its name; then it is renamed."""
    calls, flush, rename = [], folders.flush_path, os.rename
    monkeypatch.setattr(
        folders, "flush_path", lambda path: calls.append(os.path.relpath(path, tmp_path)) or flush(path)
    )
    monkeypatch.setattr(folders, "reached", lambda point: calls.append(point))
    monkeypatch.setattr(folders.os, "rename", lambda *paths: calls.append("rename") or rename(*paths))
    write(tmp_path / "new")
    start, end = calls.index("before the manifest"), calls.index("before the rename")
    assert {"new.partial/a", "new.partial/inside/b", "new.partial/inside", "new.partial"} == set(calls[:start])
    assert calls[start + 1 : end] == ["new.partial/manifest.json", "new.partial"]
    assert calls[end + 1 :] == ["rename", ".", "after the rename"]
    entries = json.loads((tmp_path / "new" / "manifest.json").read_text())["files"]
    assert entries["a"] == {"bytes": 100, "sha256": hashlib.sha256(b"x" * 100).hexdigest()}
    write(tmp_path / "new", b"y")
    assert os.listdir(tmp_path) == ["new"] and (tmp_path / "new" / "a").read_bytes() == b"y"


@pytest.mark.parametrize("name", ["a", "inside/b", "inside", "manifest.json"])
def test_a_folder_that_cannot_be_flushed_gets_no_name(tmp_path, monkeypatch, name):
    """Kind: an error of another thread that nobody asks for. What cannot be flushed gets no name."""
    flush = folders.flush_path

    def broken(path):
        if path.endswith(f".partial/{name}"):
            raise OSError(5, "Input/output error")
        flush(path)

    monkeypatch.setattr(folders, "flush_path", broken)
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path / "new")
    assert os.listdir(tmp_path) == []


def test_the_folder_to_write_in_is_there_and_empty(tmp_path):
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "left").write_text("of a killed process")
    with folders.new_folder(str(tmp_path / "new")) as scratch:
        assert os.listdir(scratch) == [] and scratch == str(tmp_path / "new.partial")
