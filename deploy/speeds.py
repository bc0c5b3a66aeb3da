"""Measured speed for the results table: the exported networks run in turns, in one process, on the CPU."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from deploy.exported import exported_model
from deploy.session import ExportedNetwork
from deploy.timing import alternated
from utils.data.images import evenly_spaced
from utils.errors import UserError
from utils.runs.checkpoint import load_checkpoint
from utils.runs.records import DYNAMIC
from utils.runs.results import BATCH

TURN = 32  # images of a network in a row
TURNS = 8  # of different images, where networks decide image by image; the others take any image the same time
SECONDS = 2.0  # of each of the two measurements, where every network is fast enough for the least number of rounds


def measured_speeds(checkpoints: dict[str, Path], pixels: Tensor) -> dict[str, dict[str, Any]]:
    """Latency and throughput of every checkpoint that can be read.

    Stages 1 and 2 run every block, as their FLOPs are counted; stage 3 and cascades skip, on single images and in
    batches.

    Args:
        checkpoints: files by a name of their own.
        pixels: test images, uint8 [N, 3, H, W].

    Returns:
        for each name latency_ms, of one image, and throughput, images per second in batches of ``BATCH``.
    """
    exported = {}
    for name, path in checkpoints.items():
        # Moved or removed since, or a user's network that ONNX cannot express: its row has no speeds.
        with suppress(UserError):
            checkpoint = load_checkpoint(path)
            size, switches = checkpoint.data["image_size"], checkpoint.stage in DYNAMIC
            model = exported_model(checkpoint.network(), checkpoint.normaliser(), size, switches)
            exported[name] = ExportedNetwork(model)
    return speeds(exported, pixels)


def speeds(exported: dict[str, ExportedNetwork], pixels: Tensor) -> dict[str, dict[str, float]]:
    """Latency and throughput of every network, see ``measured_speeds``."""
    turns = TURNS if any(network.decides for network in exported.values()) else 1
    # Images of a turn are far apart: of different classes, where a data set is sorted.
    images = pixels[evenly_spaced(len(pixels), turns * TURN).view(TURN, turns).t().flatten()]
    single = milliseconds(exported, images, 1, SECONDS, least=3)
    whole = milliseconds(exported, pixels[evenly_spaced(len(pixels), BATCH)], BATCH, SECONDS, least=3)
    return {name: {"latency_ms": single[name], "throughput": 1e3 / whole[name]} for name in exported}


def milliseconds(
    networks: Mapping[str, ExportedNetwork], pixels: Tensor, batch: int, seconds: float, least: int = 5
) -> dict[str, float]:
    """Milliseconds for an image, medians; all networks in turns.

    A turn computes ``TURN`` images or one batch, batch by batch: after each change of the network its weights are read
    from main memory first, which single images in a stream do not wait for.

    Args:
        pixels: uint8 [N, 3, H, W], a multiple of a turn.
        batch: images that are computed together.
        seconds, least: see ``deploy.timing.alternated``.
    """
    turns = [[part.numpy() for part in turn.split(batch)] for turn in pixels.cpu().split(max(batch, TURN))]
    runs = {name: lambda i, network=network: [*map(network, turns[i])] for name, network in networks.items()}
    taken = alternated(runs, len(turns), seconds, least)
    return {name: 1e3 * timing.median * len(turns) / len(pixels) for name, timing in taken.items()}
