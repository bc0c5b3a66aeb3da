"""A picture of the ranks that every iteration left, layer by layer."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from models import ResNet
from pruning.layers import prunable_layers, separable_layers


def layer_ranks(network: ResNet) -> dict[str, tuple[int, int]]:
    """Input and output directions of every convolution that can be or was pruned (channels where it is a plain one)."""
    layers = {**prunable_layers(network), **separable_layers(network)}
    return {name: (conv.in_channels, conv.out_channels) for name, conv in layers.items()}


def ranks_picture(path: Path, iterations: Sequence[tuple[str, Mapping[str, tuple[int, int]]]]) -> None:
    """Draw the input ranks above and the output ranks below, a step line for each entry of ``iterations``.

    Args:
        path: the PNG to write.
        iterations: a label and ``layer_ranks`` of the network, from the unpruned one to the last.
    """
    names = list(iterations[0][1])
    figure, axes = plt.subplots(2, 1, sharex=True, figsize=(max(6.0, 0.32 * len(names)), 6.4), layout="constrained")
    shades = [matplotlib.colormaps["viridis"](0.85 * i / max(1, len(iterations) - 1)) for i in range(len(iterations))]
    for side, (axis, title) in enumerate(zip(axes, ("input directions", "output directions"), strict=True)):
        for i, (label, ranks) in enumerate(iterations):
            heights = [ranks[name][side] for name in names]
            axis.stairs(heights, [n - 0.5 for n in range(len(names) + 1)], color=shades[i], label=label, linewidth=1.5)
        axis.set_ylabel(title)
        axis.set_ylim(bottom=0)
        axis.grid(axis="y", alpha=0.3)
    axes[1].set_xticks(range(len(names)), [name.removeprefix("blocks.") for name in names], rotation=90, fontsize=7)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
