"""The layers that can be pruned, and their weights as plain tensors."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models import LOW_RANK, LowRankConv2d
from models.convolution import is_pointwise
from models.lowrank import multiplied_out
from pruning.survey import Survey, outermost, unsuited


@dataclass(frozen=True)
class ConvWeights:
    """A convolution between optional rotations, as plain matrices.

    The map is rotate_out . core . rotate_in; a rotation that is None is the identity.
    """

    core: Tensor  # [r, c, kh, kw], or [c, 1, kh, kw] where it is depthwise
    rotate_in: Tensor | None = None  # [c, in]
    rotate_out: Tensor | None = None  # [out, r]
    depthwise: bool = False  # every channel of the core is filtered on its own; then it has both rotations

    @property
    def in_channels(self) -> int:
        return self.core.shape[1] if self.rotate_in is None else self.rotate_in.shape[1]

    @property
    def out_channels(self) -> int:
        return self.core.shape[0] if self.rotate_out is None else self.rotate_out.shape[0]

    def to(self, dtype: torch.dtype) -> "ConvWeights":
        sides = (None if side is None else side.to(dtype) for side in (self.rotate_in, self.rotate_out))
        return ConvWeights(self.core.to(dtype), *sides, self.depthwise)

    @property
    def ranks(self) -> tuple[int | None, int | None]:
        """(rank_in, rank_out) as ``models.LowRankConv2d`` takes them."""
        return (
            None if self.rotate_in is None else self.rotate_in.shape[0],
            None if self.rotate_out is None else self.rotate_out.shape[1],
        )


def prunable_layers(network: nn.Module, found: Survey | None = None) -> dict[str, nn.Conv2d]:
    """The convolutions whose single directions compete, by name: those larger than 1x1.

    For a layer that was rebuilt before, the convolution is its core; the name is that of the whole layer.  Depthwise
    cores have no directions to rotate.

    Args:
        found: leaves out the layers that it leaves alone.  Without it the gates of the switched ResNet are left out.
    """
    layers: dict[str, nn.Conv2d] = {}
    for name, module in outermost(network):
        core = module.core if isinstance(module, LowRankConv2d) else module
        left_out = name.startswith("gate.") or unsuited(module) if found is None else name not in found.norms
        if not left_out and isinstance(core, nn.Conv2d) and core.groups == 1 and not is_pointwise(core):
            layers[name] = core
    return layers


def rebuilt_layers(network: nn.Module, smaller: nn.Module, names: Iterable[str]) -> list[str]:
    """Those among the named layers that pruning has rebuilt: of low rank, or with fewer inputs than they had."""
    found = []
    for name in names:
        before, after = network.get_submodule(name), smaller.get_submodule(name)
        fewer = getattr(before, "in_channels", 0) > getattr(after, "in_channels", 0)
        if isinstance(after, LOW_RANK) or fewer:
            found.append(name)
    return found


def weights_of(layer: nn.Module) -> ConvWeights:
    """A layer's weights; a linear layer counts as a 1x1 convolution."""
    if not isinstance(layer, LOW_RANK):
        return ConvWeights(_kernel(layer))
    rotations = (getattr(layer, side, None) for side in ("rotate_in", "rotate_out"))
    matrices = (None if rotation is None else _kernel(rotation)[:, :, 0, 0] for rotation in rotations)
    return ConvWeights(_kernel(layer.core), *matrices, layer.depthwise)


def _kernel(layer: nn.Module) -> Tensor:
    weight = layer.weight.detach()
    return weight if weight.dim() == 4 else weight[:, :, None, None]


def composed(weights: ConvWeights) -> Tensor:
    """The kernel [out, in, kh, kw] that rotations and core multiply out to, in float64."""
    exact = weights.to(torch.float64)
    return multiplied_out(exact.core, exact.rotate_in, exact.rotate_out, exact.depthwise)
