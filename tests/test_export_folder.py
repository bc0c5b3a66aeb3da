"""An export over an older one, killed before any of its file operations, leaves no mixture of old and new files."""

import json
import os
import sys
from contextlib import contextmanager

import onnx
import pytest

from deploy import export as export_module
from deploy.export import write_folder
from utils.errors import UserError
from utils.files import atomic_write

CHANGES = ("open", "os.mkdir", "os.rename", "os.remove")


def export(name: str, *files: str) -> tuple[dict, dict]:
    """Graphs and labels, all named."""
    return {file: onnx.ModelProto(producer_name=name) for file in files}, {"name": name}


OLD, NEW = export("old", "network.onnx", "network_int8.onnx"), export("new", "network.onnx")


def files(folder) -> dict[str, str]:
    """Which export each file is of."""
    found = {path.name: onnx.load(path).producer_name for path in folder.glob("*.onnx")}
    return found | {path.name: json.loads(path.read_text())["name"] for path in folder.glob("*.json")}


def names(kind: str, *graphs: str) -> dict[str, str]:
    return dict.fromkeys((*graphs, "labels.json"), kind)


WHOLE = (names("old", "network.onnx", "network_int8.onnx"), names("new", "network.onnx"))


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
        write_folder(folder, *NEW)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_what_a_killed_export_leaves_with_labels_is_the_old_or_the_new_one(tmp_path):
    found = []
    for before in range(100):
        folder = tmp_path / str(before)
        write_folder(folder, *OLD)
        (folder / "notes.txt").write_bytes(b"of the user")
        if not write_killed(folder, before):
            break
        kept = files(folder)
        found.append(WHOLE.index(kept) if "labels.json" in kept else None)
        write_folder(folder, *NEW)
        assert {p.name for p in folder.iterdir()} == {*WHOLE[1], "notes.txt"}
    assert {0, None} <= set(found) and files(folder) == WHOLE[1]
    assert (folder / "notes.txt").read_bytes() == b"of the user"


@contextmanager
def on_a_full_disk(path):
    """``atomic_write`` where there is room for labels.json only."""
    with atomic_write(path) as file, open("/dev/full", "wb") as full:
        yield file if path.name == "labels.json" else full


def test_what_cannot_be_written_leaves_the_old_files(tmp_path, monkeypatch):
    write_folder(tmp_path, *OLD)
    monkeypatch.setattr(export_module, "atomic_write", on_a_full_disk)
    with pytest.raises(UserError, match="No space"):
        write_folder(tmp_path, *NEW)
    assert files(tmp_path) == WHOLE[0] and len(list(tmp_path.iterdir())) == len(WHOLE[0])
