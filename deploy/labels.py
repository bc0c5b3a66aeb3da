"""The files of an exported network and labels.json, which says what the others mean."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import ResNet
from utils.checkpoint import Checkpoint
from utils.errors import UserError
from utils.flops import network_cost

FORMAT = "switched-resnet-onnx-1"
NETWORK, INT8, LABELS = "network.onnx", "network_int8.onnx", "labels.json"
ROUTED = "routed.onnx"  # of earlier versions, which skipped blocks on single images only, in a graph of its own


@dataclass(frozen=True)
class Labels:
    """What a prediction needs of labels.json."""

    classes: list[str]
    image_size: int
    flops: float  # of one image with every block run
    flops_of_switched_blocks: list[float]


def describe(checkpoint: Checkpoint, deployed: ResNet) -> dict[str, Any]:
    """What labels.json says: classes, image size, FLOPs of one image, where the network comes from.

    The FLOPs are those of the folded network, which multiplying out can leave below the checkpoint's.
    """
    cost = network_cost(deployed, checkpoint.data["image_size"])
    return {
        "format": FORMAT,
        "classes": checkpoint.classes,
        "image_size": checkpoint.data["image_size"],
        "flops": cost.flops,
        "flops_of_switched_blocks": list(cost.blocks),
        "stage": checkpoint.stage,
        "dataset": checkpoint.data["name"],
        "metrics": checkpoint.metrics,
        "files": {},
    }


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
        return Labels(**{key: content[key] for key in Labels.__dataclass_fields__})
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give a folder that python -m deploy.export wrote") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not what this program writes ({error}): export the network again") from None
