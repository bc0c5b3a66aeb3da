"""The files of an exported network, and labels.json, which describes them."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.exported import members
from deploy.folder import finish
from deploy.folding import deployable
from models import Cascade, OwnNetwork, ResNet
from utils.data.augment import Normalisation
from utils.errors import UserError
from utils.flops import network_cost
from utils.runs.checkpoint import Checkpoint
from utils.sizes import Size, parse_size

NETWORK_HELP = "functions that build your own networks, as given to main_prune.py; the checkpoint may call them"
FORMAT = "switched-resnet-onnx-1"
NETWORK, INT8, LABELS = "network.onnx", "network_int8.onnx", "labels.json"
ROUTED = "routed.onnx"  # of earlier versions, which skipped blocks on single images only, in a graph of its own


@dataclass(frozen=True)
class Labels:
    """The entries of labels.json that a prediction needs."""

    classes: list[str]
    image_size: Size
    flops: float  # of one image with every block run
    flops_of_switched_blocks: list[float]
    fixed_blocks: list[int] = field(default_factory=list)  # whose switch no longer decides, counted from 1
    members: list[float] = field(default_factory=list)  # of a cascade: FLOPs of each with every block run


def describe(checkpoint: Checkpoint, network: ResNet | Cascade) -> dict[str, Any]:
    """The content of labels.json: classes, image size, FLOPs of one image, origin of the network.

    The FLOPs are those of the folded network, which may have fewer than the checkpoint's.
    """
    size = checkpoint.data["image_size"]
    if isinstance(network, Cascade):
        flops = [_flops_run(*member, size) for member in members(network)]
        cost, fixed = network_cost(network, size), []
    elif isinstance(network, OwnNetwork):
        cost, flops, fixed = network_cost(network, size), [], []
    else:
        deployed = deployable(network, checkpoint.normaliser())
        cost, flops = network_cost(deployed, size), []
        fixed = [switch + 2 for switch in sorted(deployed.fixed_switches)]  # the first block has no switch
    return {
        "format": FORMAT,
        "classes": checkpoint.classes,
        "image_size": size,
        "flops": cost.flops,
        "flops_of_switched_blocks": list(cost.blocks),
        "fixed_blocks": fixed,
        "members": flops,
        "stage": checkpoint.stage,
        "dataset": checkpoint.data["name"],
        "metrics": checkpoint.metrics,
        "files": {},
    }


def _flops_run(network: ResNet | OwnNetwork, normalisation: Normalisation, image_size: Size) -> int:
    """FLOPs of an image with every remaining block run."""
    if isinstance(network, OwnNetwork):
        return network_cost(network, image_size).flops
    network = deployable(network, normalisation)
    cost = network_cost(network, image_size)
    return cost.flops - sum(cost.blocks[switch] for switch, on in network.fixed_switches.items() if not on)


def read_labels(folder: Path) -> Labels:
    """Read labels.json of an exported folder.

    Raises:
        UserError: if it is missing, damaged or of another program.
    """
    path = folder / LABELS
    try:
        finish(folder)
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}")
        parse_size(content["image_size"])
        return Labels(**{key: content[key] for key in Labels.__dataclass_fields__ if key in content})
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist: give the folder that python -m deploy.export wrote") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not what this program writes ({error}): export the network again") from None
