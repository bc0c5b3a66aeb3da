"""Measured speed for the results table: the exported networks run in turns, in one process, on the CPU."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from deploy.exported import exported_model
from deploy.session import ExportedNetwork
from deploy.timing import alternated
from utils.data.images import evenly_spaced
from utils.errors import UserError
from utils.runs.checkpoint import load_checkpoint
from utils.runs.records import DYNAMIC
from utils.runs.results import BATCH

TURN = 16  # single images of a network in a row: as in a stream, its weights are in the cache
TURNS = 16  # of different images, where networks decide image by image; the others take any image the same time
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
    images = [pixels[i : i + 1].numpy() for i in evenly_spaced(len(pixels), turns * TURN).tolist()]
    batch = pixels[evenly_spaced(len(pixels), BATCH)].numpy()

    def seconds(turns: list[list[np.ndarray]]) -> dict[str, float]:
        """Of a network's turn, the mean over all."""
        runs = {name: lambda i, network=network: [*map(network, turns[i])] for name, network in exported.items()}
        return {name: timing.median for name, timing in alternated(runs, len(turns), SECONDS, least=3).items()}

    # Images side by side in a turn are of different classes, where a data set is sorted.
    single, whole = seconds([images[i::turns] for i in range(turns)]), seconds([[batch]])
    return {name: {"latency_ms": 1e3 * single[name] / TURN, "throughput": BATCH / whole[name]} for name in exported}
