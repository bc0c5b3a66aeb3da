"""FLOPs and parameters of a layer in each form that surgery can give it, also for arrays of ranks."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from pruning.layers import weights_of
from utils.flops import NetworkCost

Count = Any  # an int, or an integer array that broadcasts


@dataclass(frozen=True)
class LayerShape:
    """The sizes of a convolution between optional rotations, see ``models.LowRankConv2d``."""

    channels: tuple[int, int]  # in and out, outside
    ranks: tuple[int, int]  # c and r: in and out of the core as it is
    rotated: tuple[bool, bool]  # whether there is a rotation before and behind the core
    taps: int
    positions: tuple[int, int]  # pixels of input and output
    depthwise: bool = False  # every channel of the core is filtered on its own; then c = r

    def cost(self, c: Count, r: Count) -> tuple[Count, Count]:
        """FLOPs for one image and parameters with a core of c -> r channels.

        A side that keeps its rank does not change; a side that loses directions has a rotation, at the input's
        resolution before the core and at the output's after it.
        """
        before = self.channels[0] * c * ((c < self.ranks[0]) | self.rotated[0])
        behind = r * self.channels[1] * ((r < self.ranks[1]) | self.rotated[1])
        core = r * self.taps if self.depthwise else c * r * self.taps
        flops = 2 * (before * self.positions[0] + (core + behind) * self.positions[1])
        return flops, before + core + behind


def layer_shape(layer: nn.Module, cost: NetworkCost, name: str) -> LayerShape:
    """The sizes of a layer of this name; a core has the input and output resolution of its whole layer."""
    weights, counted = weights_of(layer), cost.layers.get(name) or cost.layers[f"{name}.core"]
    return LayerShape(
        (weights.in_channels, weights.out_channels),
        (weights.core.shape[0] if weights.depthwise else weights.core.shape[1], weights.core.shape[0]),
        (weights.rotate_in is not None, weights.rotate_out is not None),
        weights.core[0, 0].numel(),
        (counted.positions_in, counted.positions_out),
        weights.depthwise,
    )


def cheapest_ranks(shape: LayerShape, c: Count, r: Count) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of the cheapest of the forms that keep c and r directions: both sides reduced, one of them, or none.

    A rotation costs something itself, so dropping few directions of a side can cost more than it saves; that side is
    then left whole.  A form is taken if it has fewer FLOPs than the layer has now without having more parameters.
    """
    whole_c, whole_r = shape.ranks
    c, r = np.broadcast_arrays(np.asarray(c), np.asarray(r))
    best_c, best_r = np.full_like(c, whole_c), np.full_like(r, whole_r)
    least, most_parameters = shape.cost(whole_c, whole_r)
    for form_c, form_r in ((c, r), (c, whole_r), (whole_c, r)):
        flops, parameters = shape.cost(form_c, form_r)
        better = (flops < least) & (parameters <= most_parameters)
        best_c, best_r = np.where(better, form_c, best_c), np.where(better, form_r, best_r)
        least = np.where(better, flops, least)
    return best_c, best_r


def cheapest_cost(shape: LayerShape, c: Count, r: Count) -> tuple[np.ndarray, np.ndarray]:
    """FLOPs and parameters of the form that ``cheapest_ranks`` chooses."""
    return shape.cost(*cheapest_ranks(shape, c, r))
