"""The rise of the loss that changed kernels bring, to second order, with no factors in place of the Fisher."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models import ResNet
from pruning.capture import visit_gradients
from pruning.factors import image_gradients
from utils import parallel

CHUNK = 32  # images whose gradients are held in memory at once


@dataclass(frozen=True)
class PredictedRise:
    """Of the loss, in nats."""

    layers: dict[str, float]  # when one layer alone is changed
    together: float  # when all of them are: their changes add up or cancel, image by image


def predicted_rise(
    network: ResNet,
    layers: Mapping[str, nn.Module],
    changes: Mapping[str, Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    fisher_type: str,
    draws: torch.Generator,
    fisher_draws: int = 1,
) -> PredictedRise:
    """1/2 E[<grad W, D>^2], the quadratic form of the Fisher itself, for the change D of each layer's kernel.

    It is exact to second order where the network's own prediction is what the loss is measured against; only the labels
    are drawn.

    Args:
        layers: convolutions, or low-rank layers as a whole.
        changes: D by layer, [out, in, kh, kw].
        fisher_type, draws, fisher_draws: as in ``pruning.factors.collect_factors``.
    """
    if not changes:
        return PredictedRise({}, 0.0)
    names = list(changes)
    products: dict[str, Tensor] = {}  # of the draw that is being visited, [N] for each layer
    sums = next(network.parameters()).new_zeros(len(names) + 1, dtype=torch.float64)

    def close_draw() -> None:
        if products:
            of_images = torch.stack([products[name] for name in names])
            sums[:-1] += of_images.square().sum(dim=1)
            sums[-1] += of_images.sum(dim=0).square().sum()
            products.clear()

    def add(name: str, layer: nn.Module, a: Tensor, g: Tensor) -> None:
        if name in products:  # the next draw has begun
            close_draw()
        products[name] = _products(layer, a, g, changes[name][None])[:, 0]

    visited = {name: layers[name] for name in names}
    images = visit_gradients(network, visited, batches, fisher_type, draws, add, fisher_draws)
    close_draw()
    *single, together = (0.5 * parallel.all_reduced(sums) / images).tolist()
    return PredictedRise(dict(zip(names, single, strict=True)), together)


def predicted_rises(
    network: ResNet,
    layers: Mapping[str, nn.Module],
    changes: Mapping[str, Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    fisher_type: str,
    draws: torch.Generator,
    fisher_draws: int = 1,
) -> dict[str, Tensor]:
    """Of many changes of each layer, one at a time: 1/2 E[<grad W, D>^2] for each D, [K] by layer.

    An image's gradient is built once for all of them, so they cost little more than one.

    Args:
        changes: the D of each layer, [K, out, in, kh, kw].
    """
    sums = {name: own.new_zeros(len(own), dtype=torch.float64) for name, own in changes.items()}

    def add(name: str, layer: nn.Module, a: Tensor, g: Tensor) -> None:
        sums[name] += _products(layer, a, g, changes[name]).square().sum(dim=0)

    visited = {name: layers[name] for name, own in changes.items() if len(own)}
    images = visit_gradients(network, visited, batches, fisher_type, draws, add, fisher_draws)
    return {name: 0.5 * parallel.all_reduced(total) / images for name, total in sums.items()}


def _products(layer: nn.Module, a: Tensor, g: Tensor, changes: Tensor) -> Tensor:
    """<grad W, D> of every image and change, [N, K] in float64."""
    rows = changes.to(a).flatten(1).t()
    parts = zip(a.split(CHUNK), g.split(CHUNK), strict=True)
    return torch.cat([image_gradients(layer, *part).flatten(1) @ rows for part in parts]).double()
