"""Interrupted equals uninterrupted, bit by bit on the CPU, for all three stages; and what cannot be resumed."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import ENVIRONMENT, ROOT, SCRIPTS, arguments, metrics, run, run_folder
from conftest import write_shapes
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from utils.errors import UserError
from utils.files import write_json
from utils.run import BEST, LAST, Run

CTRL_C = "interrupted; what was saved is kept: the same command with --resume continues from there\n"
# Where each stage is interrupted, first by Ctrl-C, then by a kill: in its first epoch, and again later.
INTERRUPTIONS = {
    "sp": [("recorded", 1, "SIGINT"), ("saving", 4, "SIGKILL")],
    "pruned": [("recorded", 2, "SIGINT"), ("recorded", 4, "SIGKILL")],  # step 4 is the pruning of iteration 2
    "rl_pruned": [("recorded", 1, "SIGINT"), ("saving", 3, "SIGKILL")],
}


def interrupt(stage: str, given: list[str], place: str, step: int, name: str) -> None:
    command = [sys.executable, ROOT / "tests" / "interrupting.py", SCRIPTS[stage], place, str(step), name, *given]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    if name == "SIGINT":
        assert (done.returncode, done.stderr) == (130, CTRL_C)
    else:
        assert done.returncode == -signal.Signals[name], done.stderr


def assert_equal(a: object, b: object, where: str) -> None:
    """Equality to the last bit of what checkpoints hold."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


@pytest.mark.parametrize("stage", SCRIPTS)
def test_interrupted_twice_equals_uninterrupted(stage: str, chain: Path, shapes: Path, tmp_path: Path):
    source = {"sp": None, "pruned": "sp", "rl_pruned": "pruned"}[stage]
    start = str(run_folder(chain, source) / BEST) if source else ""
    given = arguments(stage, shapes, tmp_path, start)
    for i, interruption in enumerate(INTERRUPTIONS[stage]):
        interrupt(stage, [*given, "--resume"] if i else given, *interruption)
    run(stage, [*given, "--resume"])

    resumed, whole = run_folder(tmp_path, stage), run_folder(chain, stage)
    names = sorted(path.name for path in whole.glob("*.pt"))
    assert sorted(path.name for path in resumed.glob("*.pt")) == names and {BEST, LAST} <= set(names)
    assert not list(resumed.glob(".*")), "what a killed save left behind is removed"
    for name in names:
        a, b = (torch.load(folder / name, weights_only=True) for folder in (resumed, whole))
        # The interrupted run was given its source by path, from another results folder; the other found it in its own.
        sources = [a.pop("source"), b.pop("source")]
        assert sources == [None, None] or Path(sources[0]) == (chain / sources[1]).resolve()
        assert_equal(a, b, name)
    assert metrics(resumed) == metrics(whole), "no step is missing, repeated or different"

    # TensorBoard, reading the event files of all three attempts, sees each step, text and picture once as well.
    events, uninterrupted = (EventAccumulator(str(folder)).Reload() for folder in (resumed, whole))
    assert events.Tags() == uninterrupted.Tags()
    for tag in events.Tags()["tensors"]:  # of scalars, too
        assert [e.step for e in events.Tensors(tag)] == [e.step for e in uninterrupted.Tensors(tag)], tag
    recorded = [line for line in metrics(whole) if "Overview/accuracy_val" in line]
    for tag in ("Overview/accuracy_val", "Overview/loss_train"):
        assert [event.step for event in events.Tensors(tag)] == [line["step"] for line in recorded]
        values = [make_ndarray(event.tensor_proto).item() for event in events.Tensors(tag)]
        assert values == pytest.approx([r[tag] for r in recorded], rel=1e-6)


def test_ctrl_c_from_outside(shapes: Path, tmp_path: Path):
    """The signal of a terminal, somewhere in a run that would take hours."""
    given = [*arguments("sp", shapes, tmp_path), "--epochs", "1000000"]
    command = [sys.executable, ROOT / SCRIPTS["sp"], *given]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 90
        while not list(tmp_path.glob("sp/*/*/*/best.pt")):
            assert process.poll() is None and time.monotonic() < deadline, "the first epoch never ended"
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, stderr) == (130, CTRL_C)
    folder = run_folder(tmp_path, "sp")
    last = torch.load(folder / LAST, weights_only=True)
    steps = [line["step"] for line in metrics(folder)]
    assert steps == list(range(1, len(steps) + 1)) and last["progress"]["step"] in (steps[-1], steps[-1] - 1)


def in_process(stage: str, given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [SCRIPTS[stage], *given])
    __import__(SCRIPTS[stage].removesuffix(".py")).main()


@pytest.mark.parametrize(
    ("stage", "changed", "named"),
    [
        ("sp", ["--lr", "0.2"], "lr=0.1, not 0.2"),
        ("sp", ["--epochs", "9"], "epochs=5, not 9"),
        ("sp", ["--seed", "1"], "seed=0, not 1"),
        ("sp", ["--width", "8"], "width=4, not 8"),
        ("pruned", ["--set", "prune_ratio=0.4"], r"prune_ratio=0\.3, not 0\.4"),
        ("rl_pruned", ["--fixed_alpha"], "fixed_alpha=False, not True"),
    ],
)
def test_other_settings_are_refused(
    stage: str, changed: list[str], named: str, chain: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
):
    before = (run_folder(chain, stage) / LAST).read_bytes()
    with pytest.raises(UserError, match=f"was started with {named}: resume with the same settings"):
        in_process(stage, [*arguments(stage, shapes, chain), *changed, "--resume"], monkeypatch)
    assert (run_folder(chain, stage) / LAST).read_bytes() == before


@pytest.mark.parametrize("stage", SCRIPTS)
def test_there_must_be_a_run(stage: str, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match=r"--resume found no run with a last.pt in .*resnet8: start one without"):
        in_process(stage, [*arguments(stage, shapes, tmp_path), "--resume"], monkeypatch)
    assert not list(tmp_path.iterdir())


def test_other_classes_are_refused(chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The same folder name and size of everything, but one class has another name."""
    results, data = tmp_path / "results", tmp_path / "shapes"
    shutil.copytree(chain, results)
    write_shapes(data, {"train": 40, "test": 10})
    for part in ("train", "test"):
        (data / part / "left").rename(data / part / "away")
    with pytest.raises(UserError, match=r"trained on 3 classes \(left, .*the data has 3 \(away"):
        in_process("sp", [*arguments("sp", data, results), "--resume"], monkeypatch)


@pytest.mark.parametrize("content", [None, "", "{", "3"])
def test_a_run_without_its_arguments_is_refused(tmp_path: Path, content: str | None):
    folder = tmp_path / "20250101-000000"
    folder.mkdir()
    (folder / LAST).touch()
    if content is not None:
        (folder / "arguments.json").write_text(content)
    with pytest.raises(UserError, match=f"{folder} has no readable arguments.json"):
        Run.resume(tmp_path, {}, ())


def test_the_newest_run_counts_and_some_flags_may_differ(tmp_path: Path):
    for name, lr in (("20250101-000000", 1), ("20250102-000000", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / LAST).touch()
        write_json(tmp_path / name / "arguments.json", {"lr": lr, "num_workers": 4})
    with pytest.raises(UserError, match="20250102-000000 was started with lr=2, not 1"):
        Run.resume(tmp_path, {"lr": 1, "num_workers": 2}, ("num_workers",))
    # With the right settings it gets as far as the checkpoint, which is empty here.
    with pytest.raises(UserError, match=r"20250102-000000/last.pt cannot be read"):
        Run.resume(tmp_path, {"lr": 2, "num_workers": 2}, ("num_workers",))
    assert json.loads((tmp_path / "20250102-000000" / "arguments.json").read_text())["num_workers"] == 4
