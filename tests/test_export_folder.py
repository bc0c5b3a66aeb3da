"""An export over an older one, killed before any of its file operations, leaves the old or the new files, whole."""

import os
import sys

import pytest

from deploy.folder import finish, write_together

OLD = {"network.onnx": b"old network", "network_int8.onnx": b"old int8", "labels.json": b"old labels"}
NEW = {"network.onnx": b"new network", "labels.json": b"new labels"}
CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def write_killed(folder, before: int) -> bool:
    """Write ``NEW`` in a process that ends before its file operation of that number; whether it came that far."""
    child = os.fork()
    if child == 0:
        left = before

        def die(event, arguments):
            nonlocal left
            if event in CHANGES:
                left -= 1
                if left < 0:
                    os._exit(9)

        sys.addaudithook(die)
        write_together(folder, NEW, ["network_int8.onnx"])
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_killed_export_leaves_the_old_or_the_new_files(tmp_path):
    found = []
    for before in range(100):
        folder = tmp_path / str(before)
        write_together(folder, OLD, [])
        (folder / "notes.txt").write_bytes(b"of the user")
        if not write_killed(folder, before):
            break
        finish(folder)  # as every reader of the folder does
        kept = files(folder)
        assert kept.pop("notes.txt") == b"of the user"
        assert kept in (OLD, NEW)
        found.append(kept == NEW)
        write_together(folder, NEW, ["network_int8.onnx"])
        assert {p.name for p in folder.iterdir()} == {*NEW, "notes.txt"}, "nothing temporary is left"
    assert found == sorted(found) and {False, True} == set(found)
    assert files(folder) == NEW | {"notes.txt": b"of the user"}


def test_what_cannot_be_written_leaves_the_old_files(tmp_path, monkeypatch):
    write_together(tmp_path, OLD, [])

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_together(tmp_path, NEW, [])
    assert files(tmp_path) == OLD and len(list(tmp_path.iterdir())) == len(OLD)
