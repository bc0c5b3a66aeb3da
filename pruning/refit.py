"""Refit of rebuilt layers: least squares towards the outputs of the unpruned network.

A form of a layer (see ``pruning.tucker``) is the best one in K-FAC's model, which treats the taps of a patch as
uncorrelated and every layer on its own.  Here the layers are refitted from the input on.  Each is fitted from the
patches that it really gets, from the refitted layers before it, to the outputs of the unpruned network for the same
images; so it compensates for correlated taps and for the losses of the layers before it.  Source: the reconstruction of
He et al., arXiv:1707.06168, section 3.1, here with low ranks on both sides.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from models import LOW_RANK
from pruning.capture import Passes, as_images, is_linear
from pruning.channels import damped
from pruning.factors import padded
from utils import parallel
from utils.modes import evaluation_mode, hooked, layer_input

# Enough images to determine a core: a quarter of 2,000 is nearly as good (ResNet-8 and 14, 16x16 pixels).
IMAGES = 512
BATCHES = 8  # at most: the smaller network runs on all of them at once, without storing features for gradients
# Positions used of each image: at least this many, or as many as give this many rows per unknown.
POSITIONS, ROWS = 64, 16
ENOUGH = 4  # rows for each unknown, below which fewer are fitted
MOST = 8192  # unknowns that are solved for
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


def rough_means(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Means of z [N, n] and y [N, out] over the rows of all processes.

    Of the first rows of a layer they are subtracted from all: products in float32 would lose small deviations beside a
    large mean.
    """
    total = parallel.all_reduced(torch.cat([z.sum(dim=0), y.sum(dim=0), z.new_full((1,), len(z))]))
    return tuple((total[:-1] / total[-1].clamp(min=1)).split([z.shape[1], y.shape[1]]))


def best_map(found: Moments, metric: Tensor, rank: int | None) -> tuple[Tensor, Tensor | None]:
    """K and U that minimise E |M^1/2 (y - b - U K z)|^2, b being the intercept.

    Without a rank U is the identity, and K = C S^-1 whatever the metric, S and C being the covariances of z with itself
    and of y with z.  With one this is reduced-rank regression (Izenman 1975): U spans the leading directions of
    M^1/2 C S^-1 C^T M^1/2, taken back from the metric, and K = (U^T M U)^-1 U^T M C S^-1.

    Args:
        metric: M [out, out], cost of an error of the outputs.
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


@dataclass(frozen=True)
class Wanted:
    """Outputs of a layer of the unpruned network."""

    rows: Tensor  # [N * positions, out], of some positions of each image
    positions: Tensor  # indices of those


@torch.no_grad()
def refit(
    network: nn.Module,
    smaller: nn.Module,
    norms: Mapping[str, str | None],
    importances: Mapping[str, Tensor],
    passes: Passes,
) -> None:
    """Refit layers of ``smaller``, in place and in the order given, to what they computed in ``network``.

    Both networks run once.  When the smaller one comes to a layer, those before it are refitted already, so the layer's
    input is what it will be.

    An error is weighed as the batch norm after the layer scales it, or by how much the loss depends on that output.
    The norm keeps its variance, so that its scale is the one of the fit, and its mean takes up the fit's intercept:
    measured again, on images without augmentation, both would differ.  Without a norm the layer's bias takes it up.

    Args:
        norms: layers of both networks that are refitted, in the order in which they run, with the batch norm behind
            each.  Low-rank ones lose nothing of their ranks; of a depthwise separable one, and where the images are too
            few for the whole, the last convolution is refitted; of a plain one the kernel.
        importances: what an error of each output of a layer without a norm costs, [out]; all the same if unknown.
    """
    batches = [x for x, _ in passes.on(network) if len(x)]  # of a small last batch a process may have no image
    # All are run at once, so of several sizes only the most frequent one, as of sentences.
    most = Counter(batch.shape[1:] for batch in batches).most_common(1)[0][0]
    batches = [batch for batch in batches if batch.shape[1:] == most]
    x = torch.cat(batches)
    wanted = _outputs(network, norms, batches, passes)

    def refitted(name: str):
        def hook(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            _refit_layer(layer, as_images(layer, layer_input(args, kwargs), len(x)), wanted.pop(name), *sides[name])

        return hook

    sides = {name: _sides(network, smaller, name, norm, importances) for name, norm in norms.items()}
    layers = ((name, smaller.get_submodule(name)) for name in norms)
    refitting = (layer.register_forward_pre_hook(refitted(name), with_kwargs=True) for name, layer in layers)
    with hooked(refitting), evaluation_mode(smaller):
        passes.forward(smaller, x)


def _outputs(
    network: nn.Module, norms: Mapping[str, str | None], batches: Sequence[Tensor], passes: Passes
) -> dict[str, Wanted]:
    """The outputs of the layers for all images, at the same positions of each."""
    parts: dict[str, list[Tensor]] = {name: [] for name in norms}
    positions: dict[str, Tensor] = {}
    seen, images = [0], _of_all(sum(len(x) for x in batches))

    def keep(name: str):
        def hook(layer: nn.Module, args: tuple, output: Tensor) -> None:
            y = as_images(layer, output, seen[0])
            if name not in positions:
                unknowns = getattr(layer, "in_channels", 1) * math.prod(getattr(layer, "kernel_size", (1, 1)))
                of_image = y[0, 0].numel()
                count = min(of_image, max(POSITIONS, -(-ROWS * unknowns // images)))
                drawn = torch.randperm(of_image, generator=torch.Generator().manual_seed(0))[:count]
                positions[name] = drawn.sort().values.to(y.device)
            parts[name].append(_rows(y, positions[name]))

        return hook

    keeping = (network.get_submodule(name).register_forward_hook(keep(name)) for name in norms)
    with hooked(keeping), evaluation_mode(network):
        for x in batches:
            seen[0] = len(x)
            passes.forward(network, x.clone())
    return {name: Wanted(torch.cat(parts.pop(name)), positions[name]) for name in norms}


def _sides(
    network: nn.Module, smaller: nn.Module, name: str, norm: str | None, importances: Mapping[str, Tensor]
) -> tuple[Tensor, nn.Module | None]:
    """The cost of an error of each output, [out], and the norm of the smaller network that takes up the intercept."""
    if norm is None:
        *_, last = smaller.get_submodule(name).parameters()
        return importances.get(name, last.new_ones(len(last))).double(), None
    whole, own = network.get_submodule(norm), smaller.get_submodule(norm)
    own.running_mean.copy_(whole.running_mean)
    own.running_var.copy_(whole.running_var)
    scale = torch.ones_like(whole.running_var) if whole.weight is None else whole.weight
    return scale.double().square() / (whole.running_var.double() + whole.eps), own


def _refit_layer(layer: nn.Module, a: Tensor, wanted: Wanted, costs: Tensor, norm: nn.Module | None) -> None:
    part, rank = _free_part(layer, _of_all(len(wanted.rows)))
    chunks = zip(a.split(CHUNK), wanted.rows.split(CHUNK * len(wanted.positions)), strict=True)
    bias = 0 if layer.bias is None else layer.bias
    if part is None:
        intercept = bias + _mean_error(layer, chunks, wanted.positions)
    else:
        pairs = ((patches(layer, inputs, wanted.positions, part), y) for inputs, y in chunks)
        intercept = _refit_part(layer, part, rank, pairs, costs)
    if norm is not None:
        norm.running_mean.copy_(norm.running_mean - intercept + bias)
    elif layer.bias is not None:
        layer.bias.copy_(intercept)


def _mean_error(layer: nn.Module, chunks: Iterable[tuple[Tensor, Tensor]], positions: Tensor) -> Tensor:
    """The mean over the rows of all processes of the wanted outputs less those of the layer, [out] in float64."""
    sums = 0.0
    for a, y in chunks:
        # Not through hooks: one of this layer's hooks calls this.
        outputs = layer.forward(a[..., 0].transpose(1, 2) if is_linear(layer) else a)
        errors = (y - _rows(as_images(layer, outputs, len(a)), positions)).double()
        sums = sums + torch.cat([errors.sum(dim=0), errors.new_full((1,), len(errors))])
    total = parallel.all_reduced(sums)
    return total[:-1] / total[-1]


def _refit_part(
    layer: nn.Module, part: nn.Module, rank: int | None, pairs: Iterable[tuple[Tensor, Tensor]], costs: Tensor
) -> Tensor:
    """Fit a part of a layer to the pairs of its inputs z and wanted outputs y; returns the intercept, [out]."""
    sums, shift = 0.0, None
    for z, y in pairs:
        if shift is None:
            shift = rough_means(z, y)
        sums = sums + row_sums(z - shift[0], y - shift[1])
    n = sums.shape[1] - 1
    found = moments(parallel.all_reduced(sums), n)
    found = replace(found, z=found.z + shift[0], y=found.y + shift[1])
    K, U = best_map(found, torch.diag(costs), rank)
    part.weight.copy_(K.reshape(part.weight.shape))
    if U is not None:
        layer.rotate_out.weight.copy_(U.reshape(layer.rotate_out.weight.shape))
    return found.y - (K if U is None else U @ K) @ found.z


def _of_all(count: int) -> int:
    """The sum over all processes."""
    return int(parallel.all_reduced(torch.tensor(float(count))))


def _free_part(layer: nn.Module, rows: int) -> tuple[nn.Module | None, int | None]:
    """The part to refit: a core with the rotation after it, which has the rank given, or the last convolution alone.

    None if the images are too few, or for a linear layer: then only the mean is refitted.  The factors of a linear
    layer, which often has many outputs that matter together, are better as they are in the metric of the Fisher
    (docs/notebook.md, "The refit of linear layers").
    """
    if is_linear(layer):
        return None, None
    core = getattr(layer, "core", layer)
    low = isinstance(layer, LOW_RANK)
    unknowns = core.weight[0].numel()
    if not (low and layer.depthwise) and unknowns <= min(MOST, rows / ENOUGH):
        return core, layer.ranks[1] if low else None
    last = getattr(layer, "rotate_out", None)
    return (last if last is not None and last.weight[0].numel() <= rows / ENOUGH else None), None


def patches(layer: nn.Module, a: Tensor, positions: Tensor, part: nn.Module) -> Tensor:
    """The inputs of a part of a convolution, one row per image and position, for its inputs a [N, in, H, W].

    Args:
        positions: indices of the output positions.
        part: the core, or the layer itself where it is plain; or the rotation behind the core.
    """
    if isinstance(layer, LOW_RANK) and getattr(layer, "rotate_in", None) is not None:
        a = layer.rotate_in(a)
    core = getattr(layer, "core", layer)
    if part is core:
        return _windows(core, a, positions)
    return _rows(core(a), positions)


def _rows(y: Tensor, positions: Tensor) -> Tensor:
    """[N * positions, channels] of y [N, channels, H, W]."""
    return y.flatten(2)[:, :, positions].transpose(1, 2).flatten(0, 1)


def _windows(core: nn.Module, a: Tensor, positions: Tensor) -> Tensor:
    """[N * positions, in * taps], the windows that a convolution reads."""
    a = padded(core, a)
    width = (a.shape[3] - core.dilation[1] * (core.kernel_size[1] - 1) - 1) // core.stride[1] + 1
    corners = positions // width * core.stride[0] * a.shape[3] + positions % width * core.stride[1]
    rows, columns = (torch.arange(k, device=a.device) * d for k, d in zip(core.kernel_size, core.dilation, strict=True))
    taps = (rows[:, None] * a.shape[3] + columns).flatten()
    windows = a.flatten(2)[:, :, corners[:, None] + taps]  # [N, in, positions, taps]
    return windows.transpose(1, 2).flatten(2).flatten(0, 1)
