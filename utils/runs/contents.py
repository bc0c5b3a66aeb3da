"""What every checkpoint holds: an undamaged archive, the keys that stages read, finite weights."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.sizes import parse_size

# Keys that the stages read, by the field of ``checkpoint.Checkpoint`` that has them.
NEEDED = {
    "architecture": {"network"},
    "normalisation": {"mean", "std"},
    "data": {
        "name", "image_size", "flip", "val_fraction", "split_seed", "set_aside", "train", "val", "test",
    },
    "metrics": {"accuracy", "computation"},
    "original": {"accuracy", "parameters", "flops"},
}  # fmt: skip


def check_archive(path: str | Path) -> None:
    """Refuse a file that is damaged, or that would grow when it is read.

    ``torch.save`` keeps a checksum of every part, which ``torch.load`` does not check.

    Raises:
        ValueError, OSError, zipfile.BadZipFile: if it is damaged or no such file.
    """
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise ValueError("it is compressed")
        if sum(part.file_size for part in parts) > Path(path).stat().st_size:
            raise ValueError("its parts overlap")
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")


def check_contents(content: Mapping[str, Any]) -> None:
    """Refuse what no stage saves.  Whether weights fit the architecture shows when the network is built.

    Raises:
        ValueError: for the first fault that is found; the message names it.
        AttributeError, TypeError: for values of other types.
    """
    for field, keys in NEEDED.items():
        if missing := sorted(keys - content[field].keys()):
            raise ValueError(f"{field}.{missing[0]} is missing")
    parse_size(content["data"]["image_size"])
    members = content["architecture"].get("members", [content["architecture"]])
    outputs = {member.get("num_classes") for member in members}
    if outputs != {len(set(content["classes"]))} or len(set(content["classes"])) != len(content["classes"]):
        names, wanted = len(set(content["classes"])), " and ".join(map(str, outputs))
        raise ValueError(f"classes has {names} different names for a network of {wanted} outputs")
    for name, weight in content["weights"].items():
        if not isinstance(weight, Tensor) or weight.is_meta or weight.layout != torch.strided:
            raise ValueError(f"the weight {name!r} is no dense tensor")
        if weight.is_floating_point() and not torch.isfinite(weight).all():
            raise ValueError(f"the weight {name!r} is not finite (its training diverged)")
