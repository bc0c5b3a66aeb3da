"""The operating point of trained switches: one number added to all their logits, chosen on the validation images.

Training moves a switch for many images at once, so with a threshold of one half a block runs for nearly all or none of
them.  But the logits rank the images: a shift flips one image after the other, the least certain first, and so reaches
the computations in between.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from gating.steering import Budget
from models import ResNet
from training.evaluate import Evaluation
from utils.flops import NetworkCost

SEARCH = 5  # evaluations
REACH = 0.16  # share of all FLOPs that the search goes below the threshold's own computation, or around a target
NEAR = 0.005  # difference in computation, share of all FLOPs, below which a search is not worthwhile


@contextmanager
def gate_biases_restored(network: ResNet) -> Iterator[None]:
    """Restore the biases of the gates afterwards."""
    biases = gate_biases(network)
    try:
        yield
    finally:
        set_gate_biases(network, biases)


def gate_biases(network: ResNet) -> list[Tensor]:
    """Copies of the biases of the layers whose outputs are the switches' logits."""
    return [layer.bias.detach().clone() for layer in network.gate.last_layers]


@torch.no_grad()
def set_gate_biases(network: ResNet, biases: Sequence[Tensor], offset: float = 0.0) -> None:
    """Give these layers the biases, shifted by a number."""
    for layer, bias in zip(network.gate.last_layers, biases, strict=True):
        layer.bias.copy_(bias + offset)


@torch.no_grad()
def find_operating_point(
    network: ResNet, evaluated: Callable[[ResNet], Evaluation], budget: Budget, cost: NetworkCost, at_half: Evaluation
) -> Evaluation:
    """Shift the switches' logits to the offset that meets the budget best, and evaluate the network there.

    Bisection for the least computation at which the accuracy is kept (``REACH`` at most below that of the threshold of
    one half), or for the target computation.  The best of all offsets that were tried is kept; 0 is one of
    them.

    Args:
        evaluated: measures a network on the validation images.
        at_half: what it measures at the threshold of one half.
    """
    biases = gate_biases(network)
    tried = [(0.0, at_half)]  # offsets, and what was measured there

    def measured_at(computation: float) -> Evaluation:
        offset = offset_to(computation, at_half.probabilities, cost, network.free_switches)
        set_gate_biases(network, biases, offset)
        tried.append((offset, evaluated(network)))
        return tried[-1][1]

    for_accuracy = budget.target_computation is None
    if not for_accuracy:
        low, high = budget.target_computation - REACH, budget.target_computation + REACH
    elif budget.met(**at_half.metrics):
        low, high = max(cost.least, at_half.computation - REACH), at_half.computation
    else:
        low, high = at_half.computation, 1.0
        if high - low < NEAR or not budget.met(**measured_at(high).metrics):  # then nothing between is worth a look
            low = high
    for _ in range(SEARCH):
        if high - low < NEAR:
            break
        middle = (low + high) / 2
        downwards = budget.met(**measured_at(middle).metrics) == for_accuracy
        low, high = (low, middle) if downwards else (middle, high)
    offset, best = max(tried, key=lambda one: budget.score(**one[1].metrics))
    set_gate_biases(network, biases, offset)
    return best


def offset_to(computation: float, probabilities: Tensor, cost: NetworkCost, free: Sequence[int]) -> float:
    """The offset of all logits that makes the thresholded decisions cost about this share of all FLOPs.

    With one switch the share is exact to one image.  With several it is approximate, since a block that runs changes
    the features of later ones.  In float32 all logits above 17 have probability one and cannot be told apart.

    Args:
        probabilities: [N, K], of thresholded evaluation without an offset.
        free: indices of the switches that decide; fixed ones have no logits.
    """
    logits = torch.logit(probabilities[:, free].double(), eps=1e-12)
    blocks = torch.tensor(cost.blocks, dtype=torch.float64)[free].expand_as(logits)
    ranked, order = logits.flatten().sort(descending=True)
    shares = blocks.flatten()[order].cumsum(0) / (len(logits) * cost.flops) + cost.least
    opened = int((shares <= computation + 1e-12).sum())
    # Halfway between the last image that runs and the first that does not.
    above = ranked[opened - 1] if opened > 0 else ranked[0] + 2
    if opened == len(ranked):
        return max(0.0, 1 - above.item())
    return -((above + ranked[opened]) / 2).item()
