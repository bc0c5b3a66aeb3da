"""A user's file is imported as in the user's own project, and this program's modules stay what they are."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from models import own

PROJECT = {
    "utils.py": "WIDTH = {width}\n",
    "layers.py": "from torch import nn\ndef layer(width): return nn.Linear(3, width)\n",
    "models/parts/blocks.py": "from utils import WIDTH\n",
    "net.py": (
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from layers import layer\n"
        "from models.parts.blocks import WIDTH\n"
        "@dataclass\n"
        "class Config:\n"
        "    width: int = WIDTH\n"
        "def make():\n"
        "    import utils\n"
        "    return layer(Config().width + 100 * utils.WIDTH)\n"
    ),
}
PACKAGE = {
    "utils.py": "WIDTH = {width}\n",
    "models/__init__.py": "",
    "models/resnet.py": (
        "from utils import WIDTH\nfrom .parts import layer\ndef make(): return layer(WIDTH + 100 * WIDTH)\n"
    ),
    "models/parts.py": "from torch import nn\ndef layer(width): return nn.Linear(3, width)\n",
}


def written(folder: Path, project: dict[str, str], width: int) -> None:
    for name, text in project.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text.replace("{width}", str(width)))


@pytest.mark.parametrize("project, place", [(PROJECT, "net.py"), (PACKAGE, "models/resnet.py")])
def test_a_project_with_modules_called_as_ours(project: dict, place: str, tmp_path: Path, monkeypatch):
    """``utils``, ``models`` and ``layers`` are those of each project, whichever came before."""
    before, path = dict(sys.modules), list(sys.path)
    sources = []
    for width in (4, 5):
        written(tmp_path / str(width), project, width)
        sources.append(f"{tmp_path / str(width) / place}:make")
    monkeypatch.setattr(own, "_allowed", sources)
    for source, width in zip([*sources, *sources], (4, 5, 4, 5), strict=True):
        assert own.own_network(source).out_features == 101 * width
    assert sys.path == path
    assert all(sys.modules[name] is module for name, module in before.items())


def test_a_folder_called_models_without_an_init_file_may_be_inspected(tmp_path: Path, monkeypatch):
    """As PyTorch does when it registers operators, which importing torchvision makes it do."""
    inspect.getmodule(sys._getframe(), "unknown")  # after which it knows where our ``models`` are
    net = (
        "import inspect, sys, models.parts.blocks\n"
        "from torch import nn\n"
        "inspect.getmodule(sys._getframe(), 'unknown too')\n"
        "def make(): return nn.Linear(3, 7)\n"
    )
    written(tmp_path, {**PROJECT, "net.py": net}, 4)
    monkeypatch.setattr(own, "_allowed", [f"{tmp_path}/net.py:make"])
    assert own.own_network(f"{tmp_path}/net.py:make").out_features == 7


def test_after_an_import_that_fails_all_is_as_before(tmp_path: Path, monkeypatch):
    written(tmp_path, {**PROJECT, "net.py": "import utils\nraise OSError('no licence')\n"}, 4)
    before, path = dict(sys.modules), list(sys.path)
    monkeypatch.setattr(own, "_allowed", [f"{tmp_path}/net.py:make"])
    with pytest.raises(ValueError, match=r"net.py cannot be imported \(OSError: no licence\): correct it there"):
        own.own_network(f"{tmp_path}/net.py:make")
    assert sys.path == path and all(sys.modules[name] is module for name, module in before.items())


@pytest.mark.parametrize(
    "project, first, then",
    [
        (PROJECT, "pass", "import utils, models.parts.blocks as mine"),
        (PACKAGE, "import utils, models.resnet as mine", "pass"),
    ],
)
def test_compress_in_a_project_with_modules_called_as_ours(project: dict, first: str, then: str, tmp_path: Path):
    """With this program on PYTHONPATH."""
    written(tmp_path, project, 4)
    script = f"""
{first}
from pruning import apply_edits, compress, edits_of
{then}
assert utils.WIDTH == mine.WIDTH == 4
import torch
from torch import nn
net = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 5))
x = torch.randn(32, 64)
small = compress(net, [(x, torch.arange(32) % 5)], flops=0.5, round_to=1)
apply_edits(net, edits_of(small)).load_state_dict(small.state_dict())
assert torch.equal(net(x), small(x)) and small.report.flops[1] <= small.report.flops[0] / 2
import utils
assert utils.WIDTH == 4
"""
    (tmp_path / "train.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    ended = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
