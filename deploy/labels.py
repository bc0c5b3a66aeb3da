"""The files of an exported network, and labels.json, which describes them."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from models import Cascade, OwnNetwork, ResNet
from utils.errors import UserError
from utils.flops import network_cost
from utils.runs.checkpoint import Checkpoint
from utils.sizes import Size, parse_size

NETWORK_HELP = "functions that build your own networks, as given to main_prune.py; the checkpoint may call them"
FORMAT = "switched-resnet-onnx-1"
NETWORK, INT8, LABELS = "network.onnx", "network_int8.onnx", "labels.json"
Network = ResNet | OwnNetwork | Cascade


@dataclass(frozen=True)
class Labels:
    """The entries of labels.json that a prediction needs."""

    classes: list[str]
    image_size: Size
    flops: float  # of one image with every block run
    flops_of_switched_blocks: list[float]
    fixed_blocks: list[int]  # whose switch no longer decides, counted from 1
    members: list[float]  # of a cascade: FLOPs of each with every block run

    @classmethod
    def of(cls, content: dict[str, Any]) -> "Labels":
        """From the content of labels.json."""
        return cls(**{f.name: content[f.name] for f in fields(cls)})


def labels_of(checkpoint: Checkpoint, network: Network) -> dict[str, Any]:
    """The content of labels.json: classes, image size, FLOPs of one image, origin of the network."""
    size = checkpoint.data["image_size"]
    cost = network_cost(network, size)
    return {
        "format": FORMAT,
        "classes": checkpoint.classes,
        "image_size": size,
        "flops": cost.flops - cost.removed_gates,
        "flops_of_switched_blocks": list(cost.blocks),
        "fixed_blocks": [switch + 2 for switch in sorted(network.fixed_switches)],  # the first block has no switch
        "members": [flops_run(own, size) for own in network.members] if isinstance(network, Cascade) else [],
        "stage": checkpoint.stage,
        "dataset": checkpoint.data["name"],
        "metrics": checkpoint.metrics,
        "files": {},
    }


def flops_run(network: Network, image_size: Size) -> int:
    """FLOPs of an image with every remaining block run."""
    cost = network_cost(network, image_size)
    removed = sum(cost.blocks[switch] for switch, on in network.fixed_switches.items() if not on)
    return cost.flops - cost.removed_gates - removed


def read_labels(folder: Path) -> Labels:
    """Read labels.json of an exported folder.

    Raises:
        UserError: if it is missing, damaged or of another program.
    """
    path = folder / LABELS
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}")
        content["image_size"] = parse_size(content["image_size"])
        return Labels.of(content)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist: give the folder that python -m deploy.export wrote") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not what this program writes ({error}): export the network again") from None
