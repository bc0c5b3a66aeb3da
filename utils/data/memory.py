"""The memory that is available for images."""

import math
import re
from contextlib import suppress
from pathlib import Path

import torch

# Of every process's share of the main memory.  Images are held as they were read and once more as they were split.
HOST_SHARE = 1 / 3
GPU_SHARE = 1 / 2  # of what is free; the rest is the training's
# Limit and use of a container, and how much of that is cached files, which the kernel drops when programs need the
# memory: by Linux's control groups, version 2 and 1.
CONTAINERS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


def available_memory() -> float:
    """Bytes of main memory that are still available, within a container's limit; infinite if unknown."""
    found = [math.inf]
    with suppress(OSError, TypeError):  # not Linux
        found.append(1024.0 * _number("MemAvailable:", Path("/proc/meminfo")))
    for limit, used, counts, cached in CONTAINERS:
        folder = Path("/sys/fs/cgroup")
        with suppress(OSError, TypeError, ValueError):  # not there, or "max": no limit
            free = int((folder / limit).read_text()) - int((folder / used).read_text())
            found.append(float(free + _number(cached, folder / counts)))
    return min(found)


def _number(name: str, path: Path) -> int:
    """The number behind a name at the beginning of a line."""
    return int(re.search(rf"^{name}\s+(\d+)", path.read_text(), re.MULTILINE)[1])


def fits_on(device: torch.device, size: int) -> bool:
    """Whether ``size`` bytes of images should be kept on ``device``."""
    if device.type != "cuda":
        return True
    return size <= GPU_SHARE * torch.cuda.mem_get_info()[0]
