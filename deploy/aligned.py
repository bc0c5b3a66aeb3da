"""The same function with ranks that fill a CPU's vectors: channels of zeros inside the layers of low rank."""

import torch
from torch import nn

from models import LowRankConv2d, replace_layer
from utils.modes import copied


def vector_channels() -> int:
    """The channels that ONNX Runtime keeps side by side on this CPU: 8 with AVX2, 16 with AVX-512 and elsewhere."""
    return 8 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 16


@torch.no_grad()
def aligned(network: nn.Module, channels: int) -> nn.Module:
    """A copy in which the ranks of convolutions are multiples of ``channels`` where this saves time, if there are any.

    ONNX Runtime computes a convolution's outputs in blocks of so many channels, whatever their number.  Inputs that are
    no multiple of four, or fewer than a block, first have to be copied into another layout; a depthwise convolution
    between such layouts takes several times as long (docs/notebook.md, "Zeros that fill the vectors").

    A dense core with fewer inputs than a block is left as it is: zeros would add more products than the copy costs.
    """
    if not any(_ranks(layer, channels) != layer.ranks for layer in _layers(network)):
        return network
    wider = copied(network)
    for layer in _layers(wider):
        replace_layer(wider, layer, _padded(layer, _ranks(layer, channels)))
    return wider


def _layers(network: nn.Module) -> list[LowRankConv2d]:
    return [layer for layer in network.modules() if isinstance(layer, LowRankConv2d)]


def _ranks(layer: LowRankConv2d, channels: int) -> list[int | None]:
    whole = layer.depthwise or layer.kernel_size == (1, 1)
    return [
        rank if rank is None or (rank < channels and not whole) else -(-rank // channels) * channels
        for rank in layer.ranks
    ]


def _padded(layer: LowRankConv2d, ranks: list[int | None]) -> LowRankConv2d:
    padded = LowRankConv2d(layer, ranks, layer.depthwise, layer.bias is not None)
    padded.to(layer.core.weight.device, layer.core.weight.dtype).train(layer.training)
    for tensor, given in zip(padded.parameters(), layer.parameters(), strict=True):
        tensor.zero_()[tuple(slice(size) for size in given.shape)] = given
    return padded
