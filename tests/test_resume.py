"""Interrupted equals uninterrupted, bit by bit on the CPU; commands end in one sentence or go on."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import ROOT, SCRIPTS, arguments, call_stage, holding, metrics, run, run_folder, source_of
from compare import assert_close
from conftest import write_shapes
from forks import ENVIRONMENT, Forked
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from torch import nn

from benchmarks import required
from gating.fixing import BEFORE_FIXING
from training import forward
from utils import parallel
from utils.errors import UserError
from utils.runs.checkpoint import load_checkpoint, save_checkpoint
from utils.runs.run import BEST, LAST, Run, stage_folder

# Where each stage is interrupted, first by a signal that it answers, then by a kill: in its first epoch, and later.
INTERRUPTIONS = {
    "sp": [("recorded", 1, "SIGINT"), ("saving", 4, "SIGKILL")],
    "pruned": [("recorded", 1, "SIGTERM"), ("recorded", 4, "SIGKILL")],  # both within the pruning of an iteration
    "rl_pruned": [("recorded", 1, "SIGHUP"), ("recorded", 4, "SIGKILL")],  # 4 is the closing epoch, best.pt its own
}


def interrupt(stage: str, given: list[str], place: str, step: int, name: str) -> None:
    arguments = [SCRIPTS[stage], place, str(step), name, *given]
    done = Forked(ROOT / "tests" / "interrupting.py", arguments).finished(timeout=240)
    if name in SAID:
        assert (done.returncode, done.stderr) == (128 + signal.Signals[name], SAID[name])
    else:
        assert done.returncode == -signal.Signals[name], done.stderr


@pytest.mark.parametrize("stage", SCRIPTS)
def test_interrupted_twice_equals_uninterrupted(stage: str, chain: Path, shapes: Path, tmp_path: Path):
    given = arguments(stage, shapes, tmp_path, source_of(chain, stage))
    for i, interruption in enumerate(INTERRUPTIONS[stage]):
        interrupt(stage, [*given, "--resume"] if i else given, *interruption)
    run(stage, [*given, "--resume"])

    resumed, whole = run_folder(tmp_path, stage), run_folder(chain, stage)
    names = sorted(path.name for path in whole.glob("*.pt"))
    assert sorted(path.name for path in resumed.glob("*.pt")) == names and {BEST, LAST} <= set(names)
    assert not list(tmp_path.rglob(".*.tmp")), "what a killed save left behind is removed"
    for name in names:
        a, b = (torch.load(folder / name, weights_only=True) for folder in (resumed, whole))
        # The interrupted run was given its source by path, from another results folder; the other found it in its own.
        sources = [a.pop("source"), b.pop("source")]
        assert sources == [None, None] or Path(sources[0]) == (chain / sources[1]).resolve()
        assert_close(a, b, name)
    assert metrics(resumed) == metrics(whole), "no step is missing, repeated or different"

    # TensorBoard, reading the event files of all three attempts, sees each step, text and picture once as well.
    events, uninterrupted = (EventAccumulator(str(folder)).Reload() for folder in (resumed, whole))
    assert events.Tags() == uninterrupted.Tags()
    for tag in events.Tags()["tensors"]:  # of scalars, too
        assert [e.step for e in events.Tensors(tag)] == [e.step for e in uninterrupted.Tensors(tag)], tag


def test_a_run_goes_on_when_nobody_reads_what_it_says(shapes: Path, tmp_path: Path):
    """As in ``python main_sp.py ... | head``: the log has every line."""
    command = [sys.executable, str(ROOT / SCRIPTS["sp"]), *arguments("sp", shapes, tmp_path)]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, env=ENVIRONMENT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=240)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert "watch    tensorboard" in (run_folder(tmp_path, "sp") / "log.txt").read_text()


def test_resuming_with_other_settings_starts_a_run_of_its_own(copied: Path, shapes: Path, capsys):
    """Two seeds into one folder: each goes on with its own run, and the command is always the same."""
    before = {path: path.read_bytes() for path in run_folder(copied, "sp").glob("*.pt")}
    call_stage("sp", [*arguments("sp", shapes, copied), "--epochs", "1", "--resume"])
    said = capsys.readouterr().out
    assert "no run in" in said and "epochs=5, not 1): starting a new one" in said
    assert {path: path.read_bytes() for path in before} == before
    assert len(list(stage_folder(copied, "sp", "shapes", "resnet", 8).iterdir())) == 2


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_finished_run_only_reports_again(stage: str, copied: Path, shapes: Path):
    before = {path: path.read_bytes() for path in run_folder(copied, stage).glob("*.pt")}
    assert stage != "rl_pruned" or any(path.name == BEFORE_FIXING for path in before), "switches are fixed once"
    lines = metrics(run_folder(copied, stage))
    call_stage(stage, [*arguments(stage, shapes, copied), "--resume"])
    weights = lambda content: torch.load(io.BytesIO(content), weights_only=True)  # noqa: E731
    for path, content in before.items():
        assert_close(weights(path.read_bytes()), weights(content), path.name)
    assert metrics(run_folder(copied, stage)) == lines
    assert len(json.loads((copied / "results.json").read_text())) == 3


def test_a_run_that_ended_while_switches_were_fixed_fixes_them_alike(chain: Path, copied: Path, shapes: Path):
    """Between its two saves: ``before_fixing.pt`` is written, ``best.pt`` is as it was."""
    folder = run_folder(copied, "rl_pruned")
    shutil.copyfile(folder / BEFORE_FIXING, folder / BEST)
    call_stage("rl_pruned", [*arguments("rl_pruned", shapes, copied), "--resume"])
    for name in (BEST, BEFORE_FIXING):
        paths = (folder / name, run_folder(chain, "rl_pruned") / name)
        assert_close(*(torch.load(path, weights_only=True) for path in paths), name)


def test_other_classes_are_refused(copied: Path, tmp_path: Path):
    """The same folder name and size of everything, but one class has another name."""
    data = write_shapes(tmp_path / "shapes", {"train": 40, "test": 10})
    for part in ("train", "test"):
        (data / part / "left").rename(data / part / "away")
    with pytest.raises(UserError, match=r"trained on 3 classes \(left, .*the data has 3 \(away"):
        call_stage("sp", [*arguments("sp", data, copied), "--resume"])


@pytest.mark.parametrize("stage", ["pruned", "rl_pruned"])
def test_a_stage_does_not_go_on_when_its_source_has(stage: str, copied: Path, shapes: Path):
    """The same accuracy, and other weights: of the network that it is compared with, and distilled from."""
    folder = run_folder(copied, stage)
    source = copied / load_checkpoint(folder / LAST).source
    trained = load_checkpoint(source)
    trained.weights["stem.1.bias"] += 1
    save_checkpoint(source, trained)
    unfinished = load_checkpoint(folder / LAST)
    unfinished.progress["step"] -= 1
    save_checkpoint(folder / LAST, unfinished)
    (folder / "record.json").unlink()
    with pytest.raises(UserError, match="has changed since this run began, so that it cannot be continued"):
        call_stage(stage, [*arguments(stage, shapes, copied), "--resume"])


def test_a_run_that_is_being_written_is_left_alone(copied: Path):
    """The same command twice at once: the second says so, and nothing of the first is touched; a dead one lets go."""
    folder = run_folder(copied, "sp")
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}
    held = "from utils.runs.run import Run\nrun = Run(path)"
    with holding(held, folder), pytest.raises(UserError, match="is being written by another process"):
        Run(folder)
    Run(folder).close()
    after = {path: path.read_bytes() for path in folder.iterdir() if path in before and "events" not in path.name}
    assert after == {path: content for path, content in before.items() if "events" not in path.name}


KEPT = "; what was saved is kept: the same command with --resume continues from there\n"
SAID = {
    "SIGINT": "interrupted" + KEPT,
    "SIGTERM": "ended by SIGTERM" + KEPT,
    "SIGHUP": "ended by SIGHUP, its terminal was closed" + KEPT,
}


PREPARED = "import os, signal, sys\nfrom utils.interruptions import prepare\nprepare()\n"


def python(code: str, **given) -> subprocess.CompletedProcess[str]:
    given = {"cwd": ROOT, "text": True, "timeout": 60, "capture_output": True, **given}
    return subprocess.run([sys.executable, "-c", PREPARED + code], **given)


# As Python does with what is raised in a finalizer.
SWALLOWED = (
    "class Finalized:\n    def __del__(self):\n        os.kill(os.getpid(), signal.SIGINT)\n"
    "        return [i for i in range(1000)]\nFinalized()\nprint('goes on')"
)
SENT = "print('so far')\nos.kill(os.getpid(), signal.{})\nprint('more')"


@pytest.mark.parametrize(
    ("code", "ends"),
    [
        *((SENT.format(name), (128 + signal.Signals[name], "so far\n", said)) for name, said in SAID.items()),
        (SWALLOWED, (130, "", SAID["SIGINT"])),
    ],
    ids=[*SAID, "swallowed"],
)
def test_a_signal_ends_a_command_in_one_sentence(code: str, ends: tuple[int, str, str]):
    done = python(code)
    assert (done.returncode, done.stdout, done.stderr) == ends


def test_what_was_ignored_before_still_is():
    """As under nohup."""
    ignored = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    done = python("os.kill(os.getpid(), signal.SIGHUP)\nprint('goes on')", preexec_fn=ignored)
    assert (done.returncode, done.stdout, done.stderr) == (0, "goes on\n", "")


@pytest.mark.parametrize("stage", SCRIPTS)
def test_ctrl_c_while_importing(stage: str, tmp_path: Path):
    """PyTorch's place is taken by a module during whose import the user loses patience."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nprint('imported')\n")
    done = subprocess.run(
        [sys.executable, str(ROOT / SCRIPTS[stage]), "--help"], env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", SAID["SIGINT"])


def test_a_terminal_that_goes_away():
    """SIGHUP is ignored, and the other end is closed: writing fails with an input/output error."""
    ours, theirs = os.openpty()
    code = PREPARED + "sys.stdin.read()\nprint('lost')\nprint('lost', file=sys.stderr)\nsys.exit(7)"
    pipes = {"stdin": subprocess.PIPE, "stdout": theirs, "stderr": theirs}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) as process:
        os.close(theirs)
        os.close(ours)
        process.communicate(b"", timeout=60)
    assert process.returncode == 7


IMPORTS = "import main_sp, main_prune, main_rl_prune, deploy.export, deploy.predict, benchmarks.study"


def test_a_notebooks_backend_does_not_end_a_command():
    environment = os.environ | {"MPLBACKEND": "module://of_a.notebook"}
    done = subprocess.run([sys.executable, "-c", IMPORTS], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("value", ["", "1", " "])
def test_an_empty_world_size_means_one_process(monkeypatch: pytest.MonkeyPatch, value: str):
    monkeypatch.setenv("WORLD_SIZE", value)
    ran = []
    parallel.distributed(lambda: ran.append(True))()
    assert ran == [True]


def test_a_missing_package_of_a_benchmark_is_named(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        required("no_such_package.stats")
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: no_such_package is not installed: pip install -r benchmarks/requirements.txt\n"
    )


def test_without_a_compiler_a_sentence(monkeypatch: pytest.MonkeyPatch):
    def fails(function: object, **_: object) -> object:
        def call(*_: object) -> None:
            raise RuntimeError("\nInvalidCxxCompiler: No working C++ compiler found\n" + 76 * "a line\n")

        return call

    monkeypatch.setattr(torch, "compile", fails)
    forward._check_compiler.cache_clear()
    with pytest.raises(UserError, match=r"cannot compile here \(InvalidCxxCompiler: .* found\): install a C\+\+"):
        forward.training_forward(nn.Linear(2, 2), compiled=True)


def test_an_environment_whose_making_was_interrupted_is_repaired(tmp_path: Path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "environment.sh").write_text((ROOT / "scripts" / "environment.sh").read_text())
    (tmp_path / "benchmarks").mkdir()
    for name in ("requirements.txt", "benchmarks/requirements.txt"):
        (tmp_path / name).write_text("")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    (packages,) = tmp_path.glob(".venv/lib/python*/site-packages")
    (packages / "pip").mkdir()
    (packages / "pip-23.0.dist-info").mkdir()
    (packages / "pip-23.0.dist-info" / "METADATA").write_text("Name: pip\nVersion: 23.0\n")
    command = "source scripts/environment.sh && use_environment requirements.txt && python -m pip --version"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout
