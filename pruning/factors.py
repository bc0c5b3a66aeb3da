"""Kronecker factors of the Fisher matrix, layer by layer.

For a layer with T = kh * kw taps and S output positions, the Fisher block F = E[vec(grad W) vec(grad W)^T] is
approximated by A (x) G.  Sources: KFC (arXiv:1602.01407), section 3, for convolutions; EigenDamage
(arXiv:1905.05934), section 4, for factors of the size of the channels.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import ResNet
from pruning.capture import visit_gradients
from utils import parallel


@dataclass(frozen=True)
class Factors:
    """Kronecker factors of one layer, means over the images."""

    A: Tensor  # [in, in], E[sum over positions of a a^T], averaged over taps
    G: Tensor  # [out, out], E[mean over positions of g g^T]


def window_counts(size: int, kernel: int, stride: int, padding: int) -> Tensor:
    """How many windows of a convolution touch each pixel along one axis, [size]: 2, 3, ..., 3, 2 for 3, 1, 1."""
    windows = (size + 2 * padding - kernel) // stride + 1
    counts = torch.zeros(size + 2 * padding)
    for start in range(0, windows * stride, stride):
        counts[start : start + kernel] += 1
    return counts[padding : padding + size]


@functools.lru_cache(maxsize=64)  # a GPU would be waited for twice a layer and batch
def _windows(
    height: int, width: int, kernel: tuple, stride: tuple, padding: tuple, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, float | None]:
    """How many windows touch each pixel, [height, width] on the device, and this number where it is one for all."""
    axes = zip((height, width), kernel, stride, padding, strict=True)
    counts = torch.outer(*(window_counts(*axis) for axis in axes))
    common = counts[0, 0].item() if (counts == counts[0, 0]).all() else None
    return counts.to(device, dtype), common


def input_factor(layer: nn.Module, a: Tensor) -> Tensor:
    """Sum over images of (1/T) sum over taps and output positions of a a^T, [in, in].

    Every pixel stands in as many windows as touch it, so the sum over windows is a sum over pixels weighted by those
    counts: no window is ever unfolded.  Cost: 2 in^2 H W FLOPs an image, 1/9 of a 3x3 convolution's.

    Args:
        layer: ``nn.Conv2d`` (without dilation or groups) or ``nn.Linear``.
        a: [N, in, H, W], or [N, in] for a linear layer.
    """
    if isinstance(layer, nn.Linear):
        return a.t() @ a
    weights, common = _windows(*a.shape[2:], layer.kernel_size, layer.stride, layer.padding, a.device, a.dtype)
    taps = layer.kernel_size[0] * layer.kernel_size[1]
    weighted, scale = (a * weights, 1.0) if common is None else (a, common)
    return _gram(weighted, a) * (scale / taps)


def output_factor(g: Tensor) -> Tensor:
    """Sum over images of the mean over positions of g g^T, [out, out], for g [N, out, H', W'] or [N, out]."""
    if g.dim() == 2:
        return g.t() @ g
    return _gram(g, g) / g[0, 0].numel()


def _gram(x: Tensor, y: Tensor) -> Tensor:
    """Sum over images and positions of x y^T, [channels, channels], for x, y [N, channels, H, W] of one layout.

    Each layout has a product that reads it in place: with channels last all pixels are the rows of one matrix, with
    channels first every image is a matrix of its own (copying them into one costs several times the product).
    """
    if x.is_contiguous(memory_format=torch.channels_last):
        rows = (t.permute(0, 2, 3, 1).reshape(-1, t.shape[1]) for t in (x, y))
        return torch.mm(next(rows).t(), next(rows))
    zero = x.new_zeros(x.shape[1], y.shape[1])
    return torch.addbmm(zero, x.flatten(2), y.flatten(2).transpose(1, 2))


def collect_factors(
    network: ResNet,
    layers: Mapping[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    fisher_type: str,
    draws: torch.Generator,
    fisher_draws: int = 1,
) -> dict[str, Factors]:
    """Factors of every layer over all images of ``batches``; memory does not grow with the images.

    Sums are kept in float64.  The other arguments are those of ``pruning.capture.visit_gradients``.
    """
    sums: dict[str, list[Tensor]] = {}

    def add(name: str, layer: nn.Module, a: Tensor, g: Tensor) -> None:
        A, G = input_factor(layer, a).double(), output_factor(g).double()
        if name in sums:
            sums[name][0] += A
            sums[name][1] += G
        else:
            sums[name] = [A, G]

    images = visit_gradients(network, layers, batches, fisher_type, draws, add, fisher_draws)
    # In one order in all processes.
    return {name: Factors(*(parallel.all_reduced(total) / images for total in sums[name])) for name in layers}


def image_gradients(layer: nn.Module, a: Tensor, g: Tensor) -> Tensor:
    """The gradient of every image's loss in the layer's kernel, [N, out, in, kh, kw].

    Cost: that of the weight gradient; it and the unfolded windows of the batch are held in memory.
    """
    windows = F.unfold(a, layer.kernel_size, padding=layer.padding, stride=layer.stride)  # [N, in * T, S]
    return torch.bmm(g.flatten(2), windows.transpose(1, 2)).unflatten(2, (a.shape[1], *layer.kernel_size))


def rotated_gradient_squares(
    layer: nn.Conv2d, a: Tensor, g: Tensor, Q_a: Tensor | None = None, Q_g: Tensor | None = None
) -> Tensor:
    """Sum over images of (Q_g^T grad W Q_a)^2, entry by entry, [out, in, kh, kw], grad W being one image's gradient.

    Without rotations this is the sum of the squared gradients themselves, the diagonal of the Fisher.

    Source: EK-FAC (arXiv:1806.03884), section 3.1, the re-scaling in the Kronecker-factored eigenbasis.  Cost: that of
    ``image_gradients`` plus two 1x1 rotations.
    """
    if Q_a is not None:
        a = torch.einsum("nihw,ij->njhw", a, Q_a.to(a))
    if Q_g is not None:
        g = torch.einsum("nohw,op->nphw", g, Q_g.to(g))
    return image_gradients(layer, a, g).square().sum(dim=0)
