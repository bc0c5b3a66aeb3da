"""Small networks as training and pruning leave them: batch norms that matter, low ranks, undecided switches."""

import copy
import functools
import string
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from models import ResNet, build_network
from models.edits import DEPTHWISE, TUCKER
from utils.data.augment import Normalisation
from utils.runs.checkpoint import Checkpoint, save_checkpoint

# Of every form: both sides, one side, a wide rotation, a strided core, a 1x1 shortcut, a depthwise core.
RANKS = {
    "stem.0": (None, 4),
    "blocks.0.conv1": (4, 3),
    "blocks.0.conv2": (8, None),
    "blocks.1.conv1": (4, 8),
    "blocks.1.conv2": (None, 8),
    "blocks.1.shortcut.0": (7, 9),
    "blocks.2.conv1": (15, 32),
    "blocks.2.conv2": (12, 12),
    "blocks.2.shortcut.0": (8, 8),
}
SEPARABLE = ["blocks.2.conv2"]
IDENTITY = {"set_aside": torch.arange(5), "train": "3f", "val": "a0", "test": "77"}
STAGES = ("sp", "pruned", "rl_pruned")
NORMALISATION = Normalisation((0.49, 0.48, 0.44), (0.2, 0.25, 0.3))


def varied_images(count: int, size: int = 16, seed: int = 1) -> Tensor:
    """uint8 [count, 3, size, size]: each a colour, a slope and noise of its own strength."""
    generator = torch.Generator().manual_seed(seed)
    colour, slope, strength = (torch.rand(count, 3, 1, 1, generator=generator) for _ in range(3))
    ramp = torch.linspace(-1, 1, size)
    noise = torch.rand(count, 3, size, size, generator=generator) - 0.5
    return (255 * (colour + slope * ramp + strength * noise)).clamp(0, 255).to(torch.uint8)


def edits_to(ranks: Mapping[str, Sequence[int | None]], depthwise: Sequence[str] = ()) -> list[dict]:
    """The edits that give convolutions these ranks, by name."""
    return [
        {"name": name, "form": DEPTHWISE if name in depthwise else TUCKER, "ranks": list(pair), "bias": False}
        for name, pair in ranks.items()
    ]


def small_network(gate: str = "rnn", classes: int = 3, width: int = 4, **more) -> ResNet:
    """A network of depth 8 as it starts; ``more`` goes to ``build_network``."""
    torch.manual_seed(0)
    return build_network("resnet", depth=8, num_classes=classes, width=width, gate=gate, **more)


def lively_network(stage: str, gate: str, seed: int = 0) -> ResNet:
    """A copy of a network of depth 8 and 10 classes whose batch norms have run on images.

    Args:
        stage: "sp" has full layers, the others have low-rank ones; the switches of "rl_pruned" skip half of the blocks.
    """
    return copy.deepcopy(_lively_network(stage, gate, seed))


@functools.cache
def _lively_network(stage: str, gate: str, seed: int) -> ResNet:
    width, size = 8, 16
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    edits = [] if stage == "sp" else edits_to(RANKS, SEPARABLE)
    network = build_network("resnet", depth=8, num_classes=10, width=width, gate=gate, edits=edits)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0, 0.3, generator=generator)
    network.train()
    with torch.no_grad():
        for i in range(20):
            network(NORMALISATION.apply(varied_images(32, size, seed=100 * seed + i)))
    network.eval()
    network.classifier.weight.data *= 10
    return network if stage != "rl_pruned" or network.gate is None else _undecided(network, size)


def _undecided(network: ResNet, size: int) -> ResNet:
    """Teach the switches to let bright images pass, each from a brightness of its own."""
    pixels = varied_images(64, size, seed=3)
    brightness = pixels.float().mean(dim=(1, 2, 3))
    levels = torch.linspace(0, 1, network.switches + 2)[1:-1]
    wanted = (brightness[:, None] > brightness.quantile(levels)).float()
    # The gates alone learn: nothing is propagated through the blocks.
    network.requires_grad_(False).gate.requires_grad_(True)
    optimiser = torch.optim.Adam(network.gate.parameters(), lr=0.05)
    for _ in range(40):
        optimiser.zero_grad()
        probabilities = network(NORMALISATION.apply(pixels)).probabilities
        nn.functional.binary_cross_entropy(probabilities, wanted).backward()
        optimiser.step()
    return network.requires_grad_(True)


def checkpoint_of(network: nn.Module, stage: str = "rl_pruned", size: int = 16, **changed) -> Checkpoint:
    """What a stage saves of a network that tells classes a, b, c and so on apart."""
    given = {
        "stage": stage,
        "architecture": network.architecture,
        "weights": network.state_dict(),
        "seed": 0,
        "normalisation": asdict(NORMALISATION),
        "classes": list(string.ascii_lowercase[: network.architecture.get("num_classes")]),
        "data": {"name": "shapes", "image_size": size, "flip": True, "val_fraction": 0.1, "split_seed": 0, **IDENTITY},
        "metrics": {"accuracy": 0.5, "computation": 0.5},
        "original": {"accuracy": 0.5, "parameters": 1, "flops": 1},
    }
    return Checkpoint(**{**given, **changed})


def checkpoint_file(path: Path, network: nn.Module, *given, **changed) -> Path:
    save_checkpoint(path, checkpoint_of(network, *given, **changed))
    return path
