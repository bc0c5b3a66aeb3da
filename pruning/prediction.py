"""The rise of the loss that changed kernels bring, to second order, with no factors in place of the Fisher."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import ResNet
from pruning.capture import visit_gradients
from utils import parallel


@dataclass(frozen=True)
class PredictedRise:
    """Of the loss, in nats."""

    layers: dict[str, float]  # when one layer alone is changed
    together: float  # when all of them are: their changes add up or cancel, image by image


def predicted_rise(
    network: ResNet,
    layers: Mapping[str, nn.Conv2d],
    changes: Mapping[str, Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    fisher_type: str,
    draws: torch.Generator,
    fisher_draws: int = 1,
) -> PredictedRise:
    """1/2 E[<grad W, D>^2], the quadratic form of the Fisher itself, for the change D of each layer's kernel.

    The product is the sum over positions of g (D * a), one convolution for each layer and draw: the gradient of an
    image's loss is never built.  It is exact to second order where the network's own prediction is what the loss is
    measured against; only the labels are drawn.

    Args:
        changes: D by layer, in the shape of the layer's kernel.
        fisher_type, draws, fisher_draws: as in ``pruning.factors.collect_factors``.
    """
    if not changes:
        return PredictedRise({}, 0.0)
    names = list(changes)
    products: dict[str, Tensor] = {}  # of the draw that is being visited, [N] for each layer
    sums = next(network.parameters()).new_zeros(len(names) + 1, dtype=torch.float64)

    def close_draw() -> None:
        if products:
            of_images = torch.stack([products[name] for name in names]).double()
            sums[:-1] += of_images.square().sum(dim=1)
            sums[-1] += of_images.sum(dim=0).square().sum()
            products.clear()

    def add(name: str, layer: nn.Conv2d, a: Tensor, g: Tensor) -> None:
        if name in products:  # the next draw has begun
            close_draw()
        change = changes[name].to(a)
        moved = F.conv2d(a, change, None, layer.stride, layer.padding, groups=layer.groups)
        products[name] = (g * moved).sum(dim=(1, 2, 3))

    visited = {name: layers[name] for name in names}
    images = visit_gradients(network, visited, batches, fisher_type, draws, add, fisher_draws)
    close_draw()
    *single, together = (0.5 * parallel.all_reduced(sums) / images).tolist()
    return PredictedRise(dict(zip(names, single, strict=True)), together)
