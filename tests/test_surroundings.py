"""What surrounds a command: variables of a notebook, file systems without rights, packages and compilers not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import required
from training import forward
from utils import files, parallel
from utils.errors import UserError

ROOT = Path(__file__).parents[1]
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
