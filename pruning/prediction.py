"""The predicted rise of the loss by changed layers, to second order, with the Fisher itself instead of its factors.

For the change D of a layer's kernel it is 1/2 E[<grad W, D>^2], the quadratic form of the Fisher itself: exact to
second order if the loss is measured against the network's own prediction; only the gradients at the scores are sampled.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning.capture import Passes, visit_gradients
from pruning.factors import image_gradients, narrowed
from pruning.tucker import Coordinates
from pruning.two_factors import Pointwise
from utils import parallel

ENTRIES = 2**24  # of images' gradients that are held in memory at once
WINDOWS = 2**20  # of their inputs' windows: more do not fit into a cache


@dataclass(frozen=True)
class PredictedRise:
    """The predicted rise of the loss, in nats."""

    layers: dict[str, float]  # when one layer alone is changed
    together: float  # when all are changed: the changes add up or cancel, image by image


@dataclass(frozen=True)
class Trials:
    """Forms of one layer that are tried: corners of its core, see ``pruning.tucker.Coordinates``, and other changes."""

    coordinates: Coordinates | Pointwise
    corners: Sequence[tuple[int, int]]  # ranks (c, r)
    changes: Tensor | None = None  # [K, out, in, kh, kw] of the kernel, in the coordinates of the core


def predicted_rise(
    network: nn.Module, layers: Mapping[str, nn.Module], changes: Mapping[str, Tensor], passes: Passes
) -> PredictedRise:
    """Predicted rise for one change of each layer, and for all of them together.

    Args:
        layers: convolutions and linear layers, or what has replaced them, as a whole.
        changes: D by layer, [out, in, kh, kw].
    """
    if not changes:
        return PredictedRise({}, 0.0)
    names = list(changes)
    products: dict[str, Tensor] = {}  # of the batch that is being visited, [N] for each layer
    sums = next(network.parameters()).new_zeros(len(names) + 1, dtype=torch.float64)

    def close_batch() -> None:
        if products:
            of_images = torch.stack([products[name] for name in names])
            sums[:-1] += of_images.square().sum(dim=1)
            sums[-1] += of_images.sum(dim=0).square().sum()
            products.clear()

    def add(name: str, layer: nn.Module, a: Tensor, g: Tensor) -> None:
        if name in products:  # the next batch has begun
            close_batch()
        products[name] = _changed_outputs(layer, a, changes[name].to(a)).mul_(g).flatten(1).double().sum(dim=1)

    images = visit_gradients(network, {name: layers[name] for name in names}, passes, add)
    close_batch()
    *single, together = (0.5 * parallel.all_reduced(sums) / images).tolist()
    return PredictedRise(dict(zip(names, single, strict=True)), together)


def _changed_outputs(layer: nn.Module, a: Tensor, change: Tensor) -> Tensor:
    """The change of the layer's output by a change D of its kernel; times the gradient there it is <grad W, D>."""
    stride, dilation = getattr(layer, "stride", 1), getattr(layer, "dilation", 1)
    return nn.functional.conv2d(a, change, None, stride, getattr(layer, "padding", 0), dilation)


def try_forms(
    network: nn.Module, layers: Mapping[str, nn.Module], trials: Mapping[str, Trials], passes: Passes
) -> dict[str, Tensor]:
    """Predict all forms on trial in one pass over the images.

    An image's gradient is computed once for all, in the coordinates of the core.  There the product with a corner is a
    cumulative sum of products of entries, so all corners together cost as much as one.

    Returns:
        predicted rise for each form of each layer, one at a time: corners first, then the other changes, [K].
    """
    sums: dict[str, Tensor | float] = dict.fromkeys(trials, 0.0)

    def add(name: str, layer: nn.Module, a: Tensor, g: Tensor) -> None:
        for products in _products(layer, a, g, trials[name]):
            sums[name] = sums[name] + products.double().square().sum(dim=0)

    visited = {name: layers[name] for name in trials}
    images = visit_gradients(network, visited, passes, add)
    return {name: 0.5 * parallel.all_reduced(total) / images for name, total in sums.items()}


def _products(layer: nn.Module, a: Tensor, g: Tensor, own: Trials) -> Iterator[Tensor]:
    """<grad W, D> of images and changes, [n, K] for a few images at a time, in the type of ``a``."""
    at, P, core = own.coordinates, own.coordinates.P.to(a), own.coordinates.core.to(a)
    c, r = (
        torch.tensor([corner[side] for corner in own.corners], dtype=torch.long, device=a.device) for side in (0, 1)
    )
    if isinstance(at, Pointwise):
        a, g = narrowed(layer, at.kernel, a, g)
        rows = torch.einsum("nihw,pi->nphw", a, core) * torch.einsum("nohw,op->nphw", g, P)
        yield -rows.sum(dim=(2, 3)) @ (torch.arange(rows.shape[1], device=a.device)[:, None] >= r).to(rows)
        return
    a, g = torch.einsum("nihw,ij->njhw", a, at.Q.to(a)), torch.einsum("nohw,op->nphw", g, P)
    (inputs, place_c), (outputs, place_r) = (side.unique(return_inverse=True) for side in (c, r))
    into = (torch.arange(a.shape[1], device=a.device)[:, None] < inputs).to(a)
    out = (torch.arange(g.shape[1], device=a.device)[:, None] < outputs).to(a)
    changes = None if own.changes is None else own.changes.to(a).flatten(1).t()
    at_once = max(1, min(ENTRIES // core.numel(), WINDOWS // (core[0].numel() * g[0, 0].numel())))
    for part_a, part_g in zip(a.split(at_once), g.split(at_once), strict=True):
        gradients = image_gradients(layer, part_a, part_g)
        entries = (gradients * core).sum(dim=(3, 4))
        kept = torch.einsum("npj,pr,jc->nrc", entries, out, into)[:, place_r, place_c]
        found = [kept - entries.sum(dim=(1, 2))[:, None]]
        if changes is not None:
            found.append(gradients.flatten(1) @ changes)
        yield torch.cat(found, dim=1)
