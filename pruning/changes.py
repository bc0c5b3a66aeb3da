"""The changes of an iteration, layer by layer: numbers, a table and a picture."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from models import LowRankConv2d
from models.edits import low_rank_layers
from pruning.eigenbasis import Eigenbasis
from pruning.layers import prunable_layers

SMALLEST_DRAWN = 1e-20  # eigenvalue: zero has no logarithm


@dataclass(frozen=True)
class LayerChange:
    """The change of one layer in one iteration."""

    name: str
    ranks_before: tuple[int, int]  # input and output directions of the core, or channels of a plain convolution
    ranks_after: tuple[int, int]
    parameters_before: int
    parameters_after: int
    flops_before: int  # for one image
    flops_after: int
    predicted_rise: float  # of the loss, in nats, where this layer alone changes
    form: str = ""  # that it takes, where forms compete


@dataclass(frozen=True)
class Pruned:
    """A smaller network, and the changes that led to it."""

    network: nn.Module
    bases: dict[str, Eigenbasis]  # of layers above 1x1; empty for criteria that work on whole channels
    changes: list[LayerChange]
    # Rise of the loss by all changes together, in nats, before refit and fine-tuning.  It is not the sum over layers:
    # their changes can add up or cancel.
    predicted_rise: float
    importances: dict[str, Tensor] = field(default_factory=dict)  # what an error of each output costs, [out]
    left_alone: dict[str, str] = field(default_factory=dict)  # why, by layer

    @property
    def nothing_changed(self) -> bool:
        return all(change.flops_before == change.flops_after for change in self.changes)


@dataclass(frozen=True)
class Report:
    """The changes that ``pruning.compress`` made to a network."""

    changes: list[LayerChange]
    left_alone: dict[str, str]  # why, by layer
    predicted_rise: float  # of the loss, in nats, before the refit
    flops: tuple[int, int]  # before and after
    parameters: tuple[int, int]

    def __str__(self) -> str:
        lines = [changes_table(self)]
        if self.flops[0] == self.flops[1]:
            lines.append("no cheaper form was found for any layer: the network is unchanged")
        (f, g), (p, q) = self.flops, self.parameters
        lines.append(f"FLOPs {f:,} -> {g:,} ({g / max(1, f):.1%}), parameters {p:,} -> {q:,} ({q / p:.1%})")
        return "\n".join(lines)


def changes_table(pruned: Pruned | Report) -> str:
    """The changes of one iteration as text: one line per layer, one for the sum and one for all together."""
    changes = pruned.changes
    wide = max(16, *(len(c.name) for c in changes), 0)
    lines = [f"{'layer':<{wide}} {'ranks in, out':>22} {'parameters':>21} {'MFLOPs':>17} {'predicted rise':>15}  form"]
    for c in changes:
        ranks = f"{c.ranks_before[0]},{c.ranks_before[1]} -> {c.ranks_after[0]},{c.ranks_after[1]}"
        lines.append(
            f"{c.name:<{wide}} {ranks:>22} {c.parameters_before:>9} -> {c.parameters_after:>8} "
            f"{c.flops_before / 1e6:>7.2f} -> {c.flops_after / 1e6:>6.2f} {c.predicted_rise:>15.5f}  {c.form}".rstrip()
        )
    lines.append(
        f"{'sum':<{wide}} {'':>22} {sum(c.parameters_before for c in changes):>9} -> "
        f"{sum(c.parameters_after for c in changes):>8} {sum(c.flops_before for c in changes) / 1e6:>7.2f} -> "
        f"{sum(c.flops_after for c in changes) / 1e6:>6.2f} {sum(c.predicted_rise for c in changes):>15.5f}"
    )
    lines.append(f"{'together':<{wide}} {'':>22} {'':>21} {'':>17} {pruned.predicted_rise:>15.5f}")
    if pruned.left_alone:
        reasons = sorted(set(pruned.left_alone.values()))
        names = {reason: [name for name, own in pruned.left_alone.items() if own == reason] for reason in reasons}
        lines.append("left unchanged: " + "; ".join(f"{reason}: {', '.join(own)}" for reason, own in names.items()))
    return "\n".join(lines)


def layer_ranks(network: nn.Module) -> dict[str, tuple[int, int]]:
    """Input and output directions (in plain layers channels) of every convolution that can be or was pruned."""
    low = {name: layer.core for name, layer in low_rank_layers(network).items() if isinstance(layer, LowRankConv2d)}
    layers = {**prunable_layers(network), **low}
    names = [name for name, _ in network.named_modules() if name in layers]
    return {name: (layers[name].in_channels, layers[name].out_channels) for name in names}


def ranks_picture(iterations: Sequence[tuple[str, Mapping[str, tuple[int, int]]]]) -> Figure:
    """The input ranks (above) and output ranks (below), one step line for each entry of ``iterations``.

    Args:
        iterations: a label and ``layer_ranks`` of the network, from the unpruned one to the last.
    """
    names = list(iterations[0][1])
    figure, axes = _two_axes(names, ("input directions", "output directions"))
    shades = [matplotlib.colormaps["viridis"](0.85 * i / max(1, len(iterations) - 1)) for i in range(len(iterations))]
    for side, axis in enumerate(axes):
        for shade, (label, ranks) in zip(shades, iterations, strict=True):
            heights = [ranks[name][side] for name in names]
            axis.stairs(heights, [n - 0.5 for n in range(len(names) + 1)], color=shade, label=label, linewidth=1.5)
        axis.set_ylim(bottom=0)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    return figure


def eigenvalues_picture(bases: Mapping[str, Eigenbasis]) -> Figure:
    """The eigenvalues of both factors, one box per layer: median, quartiles and, as whiskers, the extremes.

    The further a box reaches down, the more of the layer's directions matter little.
    """
    titles = (f"log10 of the eigenvalues\nof {sides}" for sides in ("A, input directions", "G, output directions"))
    figure, axes = _two_axes(list(bases), titles)
    for axis, values in zip(axes, ([b.d_a for b in bases.values()], [b.d_g for b in bases.values()]), strict=True):
        logarithms = [d.clamp(min=SMALLEST_DRAWN).log10().cpu().numpy() for d in values]
        axis.boxplot(logarithms, positions=range(len(bases)), whis=(0, 100), widths=0.6, manage_ticks=False)
    return figure


def _two_axes(names: Sequence[str], titles: Iterable[str]) -> tuple[Figure, Sequence[Axes]]:
    """Axes for input directions above those for output directions, over the layers of these names."""
    figure = Figure(figsize=(max(6.0, 0.32 * len(names)), 6.4), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    for axis, title in zip(axes, titles, strict=True):
        axis.set_ylabel(title)
        axis.grid(axis="y", alpha=0.3)
    labels = [name.removeprefix("blocks.") for name in names]
    axes[1].set_xticks(range(len(names)), labels, rotation=90, fontsize=7, parse_math=False)
    return figure, axes
