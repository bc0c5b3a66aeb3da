"""Shared by the benchmarks: the trained network and its data, the machine, and files that let runs resume."""

import argparse
import json
import platform
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
import torch

from models import ResNet
from training.norms import placed
from utils.data.augment import Normalisation
from utils.data.batches import Splits, split_as_before
from utils.data.folder import load_data
from utils.device import pick_device
from utils.runs.checkpoint import Checkpoint, check_data, load_checkpoint
from utils.settings import image_type


@dataclass(frozen=True)
class Trained:
    """A trained network with its training, validation and test images."""

    checkpoint: Checkpoint
    splits: Splits
    device: torch.device

    @property
    def image_size(self) -> int:
        return self.checkpoint.data["image_size"]

    @property
    def normalisation(self) -> Normalisation:
        return self.checkpoint.normaliser()

    def network(self) -> ResNet:
        """A fresh copy."""
        return placed(self.checkpoint.network(), self.device)


def add_trained_arguments(parser: argparse.ArgumentParser, checkpoint: str = "best.pt of stage 1") -> None:
    """``--checkpoint``, of what it says, and the data.

    Args:
        checkpoint: what the help says of it.
    """
    parser.add_argument("--checkpoint", required=True, help=checkpoint)
    parser.add_argument("--data_dir", required=True, help="data folder it was trained on")
    parser.add_argument("--img_type", type=image_type, default="png", help="image files to read")
    parser.add_argument("--num_workers", type=int, default=2, help="threads that decode images")


def load_trained(args: argparse.Namespace) -> Trained:
    """The checkpoint and its data, split as in training.

    Raises:
        UserError: if either is missing or they do not belong together.
    """
    checkpoint, device = load_checkpoint(args.checkpoint), pick_device()
    size = checkpoint.data["image_size"]
    data = load_data(args.data_dir, args.img_type, size, args.num_workers)
    check_data(checkpoint, data, size)
    splits = split_as_before(data, checkpoint.data)
    return Trained(checkpoint, splits.to(device), device)


def machine() -> dict[str, str | int]:
    """The machine of a measurement."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()


def beside(out: Path, suffix: str) -> Path:
    """``out`` with ``suffix`` appended; a dot in its name starts no suffix."""
    return out.with_name(out.name + suffix)


def read_lines(path: Path) -> list[dict]:
    """The finished measurements of an earlier run; a line that was cut off is dropped."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def append_line(path: Path, measurement: dict) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(measurement) + "\n")
