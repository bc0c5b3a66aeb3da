"""Kept cores refitted: what a layer can still compute is brought next to what it computed, by least squares.

A form of a layer (``pruning.tucker``, say) is the best one in K-FAC's model, which treats the taps of a patch as
uncorrelated and every layer on its own.  Here the layers are gone through from the input on.  Each is given the patches
that it really gets, from the layers before it as they are by now, and the outputs that the unpruned network had for the
same images; so it makes up for correlated taps and for what the layers before it have lost.  Source: the
reconstruction of He et al., arXiv:1707.06168, section 3.1, here with low ranks on both sides.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import LowRankConv2d, ResNet, all_on
from pruning.capture import first_images
from pruning.channels import damped
from pruning.layers import norm_behind
from pruning.settings import Batches
from utils import parallel
from utils.modes import evaluation_mode

# That many determine a core: a quarter of them does nearly as well (ResNet-8 and 14, 16x16 pixels).
IMAGES = 2000
CHUNK = 32  # images whose unfolded patches are held in memory at once


@dataclass(frozen=True)
class Moments:
    """Means and centred covariances of inputs z [n] and wanted outputs y [out] over images and positions, float64."""

    zz: Tensor  # [n, n]
    yz: Tensor  # [out, n]
    z: Tensor  # [n]
    y: Tensor  # [out]


def moments(sums: Tensor, n: int) -> Moments:
    """From the sums of [z, y, 1] [z, 1]^T over all rows, as ``row_sums`` returns them."""
    count = sums[-1, -1]
    z, y = sums[-1, :-1] / count, sums[n:-1, -1] / count
    both = sums[:-1, :-1] / count - torch.outer(torch.cat([z, y]), z)
    return Moments(both[:n], both[n:], z, y)


def row_sums(z: Tensor, y: Tensor) -> Tensor:
    """Sum over rows of [z, y, 1] [z, 1]^T, [n + out + 1, n + 1] in float64, for z [N, n] and y [N, out].

    The products are those of the rows' own type: sums of a batch, which are added up in float64.
    """
    ones = z.new_ones(len(z), 1)
    right = torch.cat([z, ones], dim=1)
    return (torch.cat([z, y, ones], dim=1).t() @ right).double()


def best_map(found: Moments, metric: Tensor, rank: int | None) -> tuple[Tensor, Tensor | None]:
    """K and U that bring U K z, with an intercept, next to y: the least E |M^1/2 (y - b - U K z)|^2.

    Without a rank U is the identity, and K = C S^-1 whatever the metric, S and C being the covariances of z with itself
    and of y with z.  With one this is reduced-rank regression (Izenman 1975): U spans the leading directions of
    M^1/2 C S^-1 C^T M^1/2, taken back from the metric, and K = (U^T M U)^-1 U^T M C S^-1.

    Args:
        metric: M [out, out], what an error of the outputs costs.
        rank: columns of U.

    Returns:
        K [rank or out, n] and U [out, rank], orthonormal, or None.
    """
    whole = torch.linalg.solve(damped(found.zz), found.yz.t()).t()
    if rank is None:
        return whole, None
    metric = damped(metric)
    values, vectors = torch.linalg.eigh(metric)
    root = vectors * values.sqrt() @ vectors.t()
    explained = root @ whole @ found.yz.t() @ root
    leading = torch.linalg.eigh((explained + explained.t()) / 2).eigenvectors[:, -rank:]
    U = torch.linalg.qr(torch.linalg.solve(root, leading)).Q
    weighted = U.t() @ metric
    return torch.linalg.solve(weighted @ U, weighted @ whole), U


@torch.no_grad()
def refit(network: ResNet, smaller: ResNet, names: Sequence[str], batches: Batches) -> None:
    """Refit layers of ``smaller``, in place and in the order given, to what they computed in ``network``.

    An error counts as what the batch norm behind makes of it.  The norm keeps its variance, so that it does to the new
    outputs what the fit is about, and its mean takes up the fit's intercept: measured anew, on images without
    augmentation, both would be others.  For each layer both networks run as far as that layer.

    Args:
        names: layers of both networks, from the input on: low-rank ones lose nothing of their ranks, of a depthwise
            separable one the last convolution is refitted, of a plain one the kernel.
        batches: called for each layer.  Where several processes share the batches, each passes its part of the images.
    """
    with evaluation_mode(network), evaluation_mode(smaller):
        for name in names:
            layer, norm = smaller.get_submodule(name), norm_behind(network, name)
            found = _measured(network, smaller, name, batches)
            metric = torch.diag(norm.weight.double().square() / (norm.running_var.double() + norm.eps))
            K, U = best_map(found, metric, _free_rank(layer))
            _write(layer, K, U)
            intercept = found.y - (K if U is None else U @ K) @ found.z
            own = norm_behind(smaller, name)
            own.running_mean.copy_(norm.running_mean - intercept)
            own.running_var.copy_(norm.running_var)


def patches(layer: nn.Module, a: Tensor) -> Tensor:
    """What the refitted part of a layer reads, a row for each image and position, for inputs a [N, in, H, W]."""
    if isinstance(layer, LowRankConv2d):
        a = a if layer.rotate_in is None else layer.rotate_in(a)
        if layer.core.groups > 1:
            return _rows(layer.core(a))
    kernel = layer.core if isinstance(layer, LowRankConv2d) else layer
    unfolded = F.unfold(a, kernel.kernel_size, padding=kernel.padding, stride=kernel.stride)
    return unfolded.transpose(1, 2).flatten(0, 1)


class _Reached(Exception):
    """The layer in question has run: the rest of the network is not needed."""


def _measured(network: ResNet, smaller: ResNet, name: str, batches: Batches) -> Moments:
    layer, seen = smaller.get_submodule(name), {}

    def keep_output(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        seen["output"] = output
        raise _Reached

    def keep_input(_: nn.Module, inputs: tuple[Tensor]) -> None:
        seen["input"] = inputs[0]
        raise _Reached

    sums, n = None, 0
    handles = [
        network.get_submodule(name).register_forward_hook(keep_output),
        layer.register_forward_pre_hook(keep_input),
    ]
    try:
        for x, _ in first_images(batches(), IMAGES):
            if len(x) == 0:  # the last batch may be too small for all processes
                continue
            for run in (network, smaller):
                with suppress(_Reached):
                    run(x, decide=all_on, skip=False)
            for a, y in zip(seen["input"].split(CHUNK), seen["output"].split(CHUNK), strict=True):
                z = patches(layer, a)
                part = row_sums(z, _rows(y))
                sums, n = part if sums is None else sums + part, z.shape[1]
    finally:
        for handle in handles:
            handle.remove()
    return moments(parallel.all_reduced(sums), n)


def _rows(y: Tensor) -> Tensor:
    """[N, C, H, W] -> [N * H * W, C]."""
    return y.permute(0, 2, 3, 1).flatten(0, 2)


def _free_rank(layer: nn.Module) -> int | None:
    """The rank of a rotation behind the core, which is refitted with it."""
    if not isinstance(layer, LowRankConv2d) or layer.rotate_out is None or layer.core.groups > 1:
        return None
    return layer.rotate_out.in_channels


def _write(layer: nn.Module, K: Tensor, U: Tensor | None) -> None:
    if not isinstance(layer, LowRankConv2d):
        changed = layer
    else:
        changed = layer.core if layer.core.groups == 1 else layer.rotate_out
    changed.weight.copy_(K.view_as(changed.weight))
    if U is not None:
        layer.rotate_out.weight.copy_(U[:, :, None, None])
