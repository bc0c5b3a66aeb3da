"""Which layers can be pruned, and the plain tensors that surgery works on."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models import LowRankConv2d, ResNet


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


def prunable_layers(network: ResNet) -> dict[str, nn.Conv2d]:
    """The convolutions whose directions compete, by name: those larger than 1x1, outside of the gates.

    For a layer that was rebuilt before, the convolution is its core; the name is that of the whole layer.  1x1
    projections and the classifier are left alone: a rank-reduced pair rarely saves anything there, and together they
    hold under 1 % of the parameters of ResNet-32.  Depthwise cores have no directions to rotate, see
    ``separable_layers``.
    """
    layers: dict[str, nn.Conv2d] = {}
    for name, module in network.named_modules():
        if name.startswith("gate"):
            continue
        if isinstance(module, LowRankConv2d):
            if module.core.groups == 1:
                layers[name] = module.core
        elif isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1 and not name.endswith(".core"):
            layers[name] = module
    return layers


def separable_layers(network: ResNet) -> dict[str, nn.Conv2d]:
    """The depthwise cores of the layers that were rebuilt depthwise separable, by name of the layer."""
    modules = network.named_modules()
    return {name: m.core for name, m in modules if isinstance(m, LowRankConv2d) and m.core.groups > 1}


def competing_layers(network: ResNet) -> list[str]:
    """The names of both, from the input on."""
    competing = {**prunable_layers(network), **separable_layers(network)}
    return [name for name, _ in network.named_modules() if name in competing]


def norm_behind(network: ResNet, name: str) -> nn.BatchNorm2d:
    """The batch norm that a prunable layer's output goes through."""
    parent, _, child = name.rpartition(".")
    return network.stem[1] if parent == "stem" else getattr(network.get_submodule(parent), child.replace("conv", "bn"))


def unpruned_channels(network: ResNet, name: str) -> tuple[int, int]:
    """Input and output channels that a prunable layer had in stage 1's network, whatever it has lost since.

    Between the convolutions of a block there were as many channels as behind the second one.
    """
    weights = read_weights(network, name)
    inputs, outputs = weights.in_channels, weights.out_channels
    block, _, convolution = name.rpartition(".")
    if convolution == "conv1":
        return inputs, read_weights(network, f"{block}.conv2").out_channels
    if convolution == "conv2":
        return outputs, outputs
    return inputs, outputs


def rebuilt_layers(network: ResNet) -> list[str]:
    """The layers that pruning has rebuilt, from the input on: low-rank ones, and those behind pruned channels."""
    narrow = {f"{block}.conv2" for block in network.architecture["inner"]}
    return [name for name, m in network.named_modules() if isinstance(m, LowRankConv2d) or name in narrow]


def read_weights(network: ResNet, name: str) -> ConvWeights:
    """The weights of a prunable layer, copied."""
    layer = network.get_submodule(name)
    if not isinstance(layer, LowRankConv2d):
        return ConvWeights(layer.weight.detach().clone())
    return ConvWeights(
        layer.core.weight.detach().clone(),
        None if layer.rotate_in is None else layer.rotate_in.weight.detach()[:, :, 0, 0].clone(),
        None if layer.rotate_out is None else layer.rotate_out.weight.detach()[:, :, 0, 0].clone(),
        layer.core.groups > 1,
    )
