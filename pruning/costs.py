"""What a layer costs in each form that surgery can give it: FLOPs and parameters, for arrays of ranks too, and time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Count = Any  # an int, or an integer array that broadcasts


class Convolution(NamedTuple):
    """A convolution with bias; a kernel of k pixels is padded by k // 2."""

    inputs: int
    outputs: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1


Chain = tuple[Convolution, ...]  # convolutions in a row
Seconds = Callable[[Chain, int], float]  # of a chain on one square image of so many pixels a side


@dataclass(frozen=True)
class LayerShape:
    """The sizes of a convolution between optional rotations, see ``models.LowRankConv2d``."""

    channels: tuple[int, int]  # in and out, outside
    ranks: tuple[int, int]  # c and r: in and out of the core as it is
    rotated: tuple[bool, bool]  # whether there is a rotation before and behind the core
    taps: int
    positions: tuple[int, int]  # pixels of input and output
    depthwise: bool = False  # every channel of the core is filtered on its own; then c = r
    # What measures a form's time.  Where it is given, the fastest form counts as the cheapest.
    seconds: Seconds | None = None

    def cost(self, c: Count, r: Count) -> tuple[Count, Count]:
        """FLOPs for one image and parameters with a core of c -> r channels.

        A side that keeps its rank goes on as it is; a side that loses directions has a rotation, at the input's
        resolution before the core and at the output's behind it.
        """
        before = self.channels[0] * c * ((c < self.ranks[0]) | self.rotated[0])
        behind = r * self.channels[1] * ((r < self.ranks[1]) | self.rotated[1])
        core = r * self.taps if self.depthwise else c * r * self.taps
        flops = 2 * (before * self.positions[0] + (core + behind) * self.positions[1])
        return flops, before + core + behind

    def chain(self, c: int, r: int, separable: bool = False) -> Chain:
        """The convolutions of the form with a core of c -> r channels, or of the depthwise separable one (c = r)."""
        separable = separable or self.depthwise
        stride = round((self.positions[0] / self.positions[1]) ** 0.5)
        core = Convolution(c, r, round(self.taps**0.5), stride, c if separable else 1)
        before = (Convolution(self.channels[0], c),) if separable or c < self.ranks[0] or self.rotated[0] else ()
        behind = (Convolution(r, self.channels[1]),) if separable or r < self.ranks[1] or self.rotated[1] else ()
        return (*before, core, *behind)

    def time(self, c: Count, r: Count, separable: bool = False) -> Count:
        """Seconds of that form for one image, measured."""
        size = round(self.positions[0] ** 0.5)
        timed = np.vectorize(lambda c, r: self.seconds(self.chain(int(c), int(r), separable), size), otypes=[float])
        return timed(c, r)


def cheapest_ranks(shape: LayerShape, c: Count, r: Count) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of the cheapest of the forms that keep c and r directions: both sides reduced, one of them, or none.

    A rotation costs something itself, so dropping few directions of a side can cost more than it saves; that side is
    then left whole.  A form is taken if it has fewer FLOPs than the layer has now without having more parameters; of
    those, where times are measured, if it is also faster.
    """
    whole_c, whole_r = shape.ranks
    c, r = np.broadcast_arrays(np.asarray(c), np.asarray(r))
    best_c, best_r = np.full_like(c, whole_c), np.full_like(r, whole_r)
    most_flops, most_parameters = shape.cost(whole_c, whole_r)
    least = most_flops if shape.seconds is None else shape.time(whole_c, whole_r)
    for form_c, form_r in ((c, r), (c, whole_r), (whole_c, r)):
        flops, parameters = shape.cost(form_c, form_r)
        price = flops if shape.seconds is None else shape.time(form_c, form_r)
        better = (price < least) & (flops < most_flops) & (parameters <= most_parameters)
        best_c, best_r = np.where(better, form_c, best_c), np.where(better, form_r, best_r)
        least = np.where(better, price, least)
    return best_c, best_r


def cheapest_cost(shape: LayerShape, c: Count, r: Count) -> tuple[np.ndarray, ...]:
    """FLOPs, parameters and, where times are measured, seconds of the form that ``cheapest_ranks`` chooses."""
    ranks = cheapest_ranks(shape, c, r)
    return shape.cost(*ranks) if shape.seconds is None else (*shape.cost(*ranks), shape.time(*ranks))
