"""The memory that is available for images."""

import math
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

# Of every process's share of the main memory.  Images are held as they were read and once more as they were split.
HOST_SHARE = 1 / 3
GPU_SHARE = 1 / 2  # of what is free; the rest is the training's
# Of Linux's control groups, version 2 and 1: the files with limit, use and details, and how much of the use is cached
# files, which the kernel drops when programs need the memory.
VERSION_2 = ("memory.max", "memory.current", "memory.stat", "inactive_file")
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_inactive_file")


def available_memory(root: Path = Path("/")) -> float:
    """Bytes of main memory that are still available, within the limit of a container or job; infinite if unknown.

    Args:
        root: of the file system.
    """
    found = [math.inf]
    with suppress(OSError, TypeError):  # not Linux
        found.append(1024.0 * _number("MemAvailable:", root / "proc/meminfo"))
        found += [_free_in(*group) for group in _control_groups(root)]
    return min(found)


def _control_groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str, str]]]:
    """The folders of this process's control groups and of those around them, and the names of their files."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            top = root / "sys/fs/cgroup" / controllers
            folder = top / path.lstrip("/")
            for group in (folder, *(above for above in folder.parents if above.is_relative_to(top))):
                yield group, VERSION_1 if controllers else VERSION_2


def _free_in(group: Path, names: tuple[str, str, str, str]) -> float:
    limit, used, details, cached = names
    try:
        free = int((group / limit).read_text()) - int((group / used).read_text())
        return float(free + _number(cached, group / details))
    except (OSError, TypeError, ValueError):  # not there, or "max": no limit
        return math.inf


def _number(name: str, path: Path) -> int:
    """The number behind a name at the beginning of a line."""
    return int(re.search(rf"^{name}\s+(\d+)", path.read_text(), re.MULTILINE)[1])


def fits_on(device: torch.device, size: int) -> bool:
    """Whether ``size`` bytes of images should be kept on ``device``."""
    if device.type != "cuda":
        return True
    return size <= GPU_SHARE * torch.cuda.mem_get_info()[0]
