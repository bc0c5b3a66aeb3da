"""The memory that is available for images."""

import os
from pathlib import Path

import torch

# Of every process's share of the main memory.  Images are held as they were read and once more as they were split.
HOST_SHARE = 1 / 3
GPU_SHARE = 1 / 2  # of what is free; the rest is the training's


def available_memory() -> float:
    """Bytes of main memory that are still available, within a container's limit; infinite if unknown."""
    return min(_free_on_machine(), _free_in_container())


def _free_on_machine() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        pass
    try:  # not Linux: the total, since the free memory is unknown
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        return float("inf")


def _free_in_container() -> float:
    """By the memory controller of Linux's control groups, version 2 or 1."""
    folder = Path("/sys/fs/cgroup")
    for limit, used, cache in (
        (folder / "memory.max", folder / "memory.current", folder / "memory.stat"),
        (
            folder / "memory/memory.limit_in_bytes",
            folder / "memory/memory.usage_in_bytes",
            folder / "memory/memory.stat",
        ),
    ):
        try:
            free = int(limit.read_text()) - int(used.read_text())
            # The kernel drops cached files when programs need the memory.
            counts = dict(line.split() for line in cache.read_text().splitlines())
            return float(free + int(counts.get("inactive_file", counts.get("total_inactive_file", 0))))
        except (OSError, ValueError):  # not there, or "max": no limit
            continue
    return float("inf")


def fits_on(device: torch.device, size: int) -> bool:
    """Whether ``size`` bytes of images should be kept on ``device``."""
    if device.type != "cuda":
        return True
    return size <= GPU_SHARE * torch.cuda.mem_get_info()[0]
