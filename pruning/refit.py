"""Kept cores refitted: what a layer can still compute is brought next to what it computed, by least squares.

A form of a layer (``pruning.tucker``, say) is the best one in K-FAC's model, which treats the taps of a patch as
uncorrelated and every layer on its own.  Here the layers are gone through from the input on.  Each is given the patches
that it really gets, from the layers before it as they are by now, and the outputs that the unpruned network had for the
same images; so it makes up for correlated taps and for what the layers before it have lost.  Source: the
reconstruction of He et al., arXiv:1707.06168, section 3.1, here with low ranks on both sides.
"""

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import LowRankConv2d, ResNet, all_on
from pruning.capture import first_images
from pruning.channels import damped
from pruning.joint_fit import Moments, jointly_fitted, mixing, multiplied_out
from pruning.layers import ConvWeights, norm_behind, read_weights
from pruning.settings import Batches
from utils import parallel
from utils.modes import evaluation_mode

# That many determine a core: a quarter of them does nearly as well (ResNet-8 and 14, 16x16 pixels).
IMAGES = 2000
CHUNK = 32  # images whose unfolded patches are held in memory at once


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
        names: layers of both networks, from the input on.  All their convolutions are refitted, ranks stay.
        batches: called for each layer.  Where several processes share the batches, each passes its part of the images.
    """
    with evaluation_mode(network), evaluation_mode(smaller):
        for name in names:
            layer, norm = smaller.get_submodule(name), norm_behind(network, name)
            found = _measured(network, smaller, name, batches)
            metric = norm.weight.double().square() / (norm.running_var.double() + norm.eps)
            weights = _fitted(read_weights(smaller, name).to(torch.float64), found, metric)
            _write(layer, weights)
            intercept = found.y - multiplied_out(weights) @ found.z
            own = norm_behind(smaller, name)
            own.running_mean.copy_(norm.running_mean - intercept)
            own.running_var.copy_(norm.running_var)


def _fitted(weights: ConvWeights, found: Moments, metric: Tensor) -> ConvWeights:
    """The layer brought next to ``found``, moments of whole patches, under a diagonal metric [out].

    In closed form but for what comes before the core and, where it is depthwise, for the core itself; then all of it
    together; then in closed form again, since a descent ends near its minimum only.
    """
    weights = _behind_mixing(weights, found, metric)
    if weights.rotate_in is None:
        return weights
    return _behind_mixing(jointly_fitted(weights, found, metric), found, metric)


def _behind_mixing(weights: ConvWeights, found: Moments, metric: Tensor) -> ConvWeights:
    """The core and the rotation behind it (of a depthwise core the latter alone) in closed form."""
    Z, separable = mixing(weights), weights.depthwise
    free_rank = None if weights.rotate_out is None or separable else weights.rotate_out.shape[1]
    K, U = best_map(found if Z is None else found.through(Z), torch.diag(metric), free_rank)
    if separable:
        return ConvWeights(weights.core, weights.rotate_in, K, depthwise=True)
    return ConvWeights(K.reshape(-1, *weights.core.shape[1:]), weights.rotate_in, U)


def unfolded(layer: nn.Module, a: Tensor) -> Tensor:
    """The patches that a layer reads, a row for each image and position, for inputs a [N, in, H, W]."""
    windows = F.unfold(a, layer.kernel_size, padding=layer.padding, stride=layer.stride)
    return windows.transpose(1, 2).flatten(0, 1)


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
                z = unfolded(layer, a)
                part = row_sums(z, _rows(y))
                sums, n = part if sums is None else sums + part, z.shape[1]
    finally:
        for handle in handles:
            handle.remove()
    return moments(parallel.all_reduced(sums), n)


def _rows(y: Tensor) -> Tensor:
    """[N, C, H, W] -> [N * H * W, C]."""
    return y.permute(0, 2, 3, 1).flatten(0, 2)


def _write(layer: nn.Module, weights: ConvWeights) -> None:
    if not isinstance(layer, LowRankConv2d):
        layer.weight.copy_(weights.core)
        return
    layer.core.weight.copy_(weights.core)
    for rotation, matrix in ((layer.rotate_in, weights.rotate_in), (layer.rotate_out, weights.rotate_out)):
        if rotation is not None:
            rotation.weight.copy_(matrix[:, :, None, None])
