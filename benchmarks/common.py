"""Shared by the benchmarks: the machine, and files that let runs resume."""

import json
import platform
from pathlib import Path

import onnxruntime
import torch


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
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(measurement) + "\n")
