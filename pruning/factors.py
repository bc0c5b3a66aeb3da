"""Kronecker factors of the Fisher matrix, layer by layer.

For a layer with T = kh * kw taps and S output positions, the Fisher block F = E[vec(grad W) vec(grad W)^T] is
approximated by A (x) G.  Sources: KFC (arXiv:1602.01407), section 3, for convolutions; EigenDamage
(arXiv:1905.05934), section 4, for factors of the size of the channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.convolution import is_pointwise
from pruning.capture import Passes, visit_gradients
from pruning.layers import composed, weights_of
from utils import parallel
from utils.errors import UserError


@dataclass(frozen=True)
class Factors:
    """Kronecker factors of one layer, means over the images."""

    A: Tensor  # [in, in], E[sum over positions of a a^T], averaged over taps
    G: Tensor  # [out, out], E[mean over positions of g g^T]
    importance: Tensor | None = None  # [out], E[mean over positions of g^2], of a pointwise layer, too


def paddings(layer: nn.Module) -> tuple[tuple[int, int], tuple[int, int]]:
    """Pixels of zeros that a convolution adds before and after, along each axis; "same" may add one more after."""
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return ((0, 0), (0, 0)) if layer.padding == "valid" else tuple((p, p) for p in layer.padding)


def padded(layer: nn.Module, a: Tensor) -> Tensor:
    """A convolution's input with the zeros around it that the convolution adds."""
    (top, bottom), (left, right) = paddings(layer)
    return F.pad(a, (left, right, top, bottom)) if top or bottom or left or right else a


def input_factor(layer: nn.Module, a: Tensor) -> Tensor:
    """Sum over images of (1/T) sum over taps and output positions of a a^T, [in, in].

    The sum over windows is a sum over pixels, weighted by the number of windows that contain each pixel, so no window
    is unfolded.  Cost: 2 in^2 H W FLOPs per image, 1/9 of a 3x3 convolution's.

    Args:
        layer: a convolution without groups, or what has replaced one.
        a: [N, in, H, W].
    """
    window = {"kernel_size": layer.kernel_size, "dilation": layer.dilation, "stride": layer.stride}
    (top, _), (left, _) = paddings(layer)
    ones = padded(layer, torch.ones_like(a[:1, :1]))
    counts = F.fold(F.unfold(ones, **window), ones.shape[2:], **window)  # of the windows that contain each pixel
    counts = counts[:, :, top : top + a.shape[2], left : left + a.shape[3]]
    return _gram(a * counts, a) / (layer.kernel_size[0] * layer.kernel_size[1])


def output_factor(g: Tensor) -> Tensor:
    """Sum over images of the mean over positions of g g^T, [out, out], for g [N, out, H', W']."""
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


def narrowed(layer: nn.Module, kernel: Tensor, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and gradients at the narrower side of a pointwise layer, [N, m, H', W'] both, m = min(in, out).

    Every form of W is W after or before a map of the narrower side, so only that map's input and the gradient at its
    output matter.  With few outputs they are W a and g, with few inputs a and W^T g.

    Args:
        kernel: W [out, in].
    """
    stride = getattr(layer, "stride", (1, 1))
    a = a[:, :, :: stride[0], :: stride[1]]
    if kernel.shape[0] <= kernel.shape[1]:
        return torch.einsum("nihw,oi->nohw", a, kernel), g
    return a, torch.einsum("nohw,oi->nihw", g, kernel)


def collect_factors(network: nn.Module, layers: Mapping[str, nn.Module], passes: Passes) -> dict[str, Factors]:
    """Factors of every layer over all images; memory does not grow with the images.

    Those of a pointwise layer are of its narrower side, see ``narrowed``.  Sums are kept in float64.
    """
    sums: dict[str, list[Tensor]] = {}
    kernels = {
        name: composed(weights_of(layer))[:, :, 0, 0].to(next(layer.parameters()).dtype)
        for name, layer in layers.items()
        if is_pointwise(layer)
    }

    def add(name: str, layer: nn.Module, a: Tensor, g: Tensor) -> None:
        importance = g.square().mean(dim=(2, 3)).sum(dim=0)
        if name in kernels:
            a, g = narrowed(layer, kernels[name], a, g)
            A = _gram(a, a)
        else:
            A = input_factor(layer, a)
        found = [A.double(), output_factor(g).double(), importance.double()]
        if name in sums:
            for total, part in zip(sums[name], found, strict=True):
                total += part
        else:
            sums[name] = found

    images = visit_gradients(network, layers, passes, add)
    # In the same order in all processes.
    found = {name: Factors(*(parallel.all_reduced(total) / images for total in sums[name])) for name in layers}
    for name, own in found.items():
        if not (own.A.isfinite().all() and own.G.isfinite().all()):
            raise UserError(
                f"the Fisher of layer {name} is not finite: look for NaN or infinity in inputs, weights and losses, "
                f"and give a network in half precision as float32"
            )
    return found


def image_gradients(layer: nn.Module, a: Tensor, g: Tensor) -> Tensor:
    """The gradient of every image's loss in the layer's kernel, [N, out, in, kh, kw].

    Cost: that of the weight gradient; it and the unfolded windows of the batch are held in memory.
    """
    a = padded(layer, a).contiguous()
    (images, channels, *_), (n, c, down, right) = a.shape, a.stride()
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    # A view and one copy: several times as fast as torch's unfold.
    shape, steps = (images, channels, kh, kw, *g.shape[2:]), (n, c, dh * down, dw * right, sh * down, sw * right)
    windows = a.as_strided(shape, steps).reshape(images, channels * kh * kw, -1)
    return torch.bmm(g.flatten(2), windows.transpose(1, 2)).unflatten(2, (channels, kh, kw))


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
