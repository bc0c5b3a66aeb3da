"""Signals, lost outputs, missing packages and rights: a command ends in one sentence or goes on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import ROOT, SCRIPTS
from torch import nn

from benchmarks import required
from training import forward
from utils import files, parallel
from utils.errors import UserError

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
TWICE = (
    "ended = os._exit\n"
    "def exit(code):\n    os.kill(os.getpid(), signal.SIGINT)\n    ended(code)\n"
    "os._exit = exit\nos.kill(os.getpid(), signal.SIGTERM)"
)
# Python gives handlers back before it clears modules: the default action would end it without a word.
AFTER_THE_END = (
    "class Cleared:\n"
    "    def __del__(self, kill=os.kill, me=os.getpid(), number=signal.SIGHUP):\n        kill(me, number)\n"
    "cleared = Cleared()\nprint('all is done')"
)
SENT = "print('so far')\nos.kill(os.getpid(), signal.{})\nprint('more')"


@pytest.mark.parametrize(
    ("code", "ends"),
    [
        *((SENT.format(name), (128 + signal.Signals[name], "so far\n", said)) for name, said in SAID.items()),
        (SWALLOWED, (130, "", SAID["SIGINT"])),
        (TWICE, (143, "", SAID["SIGTERM"])),
        (AFTER_THE_END, (0, "all is done\n", "")),
    ],
    ids=[*SAID, "swallowed", "twice", "after the end"],
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


def test_outputs_that_are_closed_from_the_start(tmp_path: Path):
    """The first files that are opened would be taken for standard output and error."""
    closed = lambda: (os.close(0), os.close(1), os.close(2))  # noqa: E731
    code = f"file = open({str(tmp_path / 'file')!r}, 'w')\nprint('lost')\nprint('lost', file=sys.stderr)"
    done = python(f"{code}\nos.write(1, b'lost')", preexec_fn=closed, capture_output=False)
    assert done.returncode == 0 and (tmp_path / "file").read_text() == ""


def test_outputs_on_a_full_disk():
    with open("/dev/full", "w") as full:
        done = python("print('lost')\nprint('lost', file=sys.stderr)", capture_output=False, stdout=full, stderr=full)
    assert done.returncode == 0


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


def test_a_file_system_that_refuses_rights_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(*_: object) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "chmod", refused)
    files.write_json(tmp_path / "a.json", {"a": 1})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": 1\n}\n' and len(list(tmp_path.iterdir())) == 1


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
