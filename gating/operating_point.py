"""The operating point of trained switches: one number added to all their logits, chosen on the validation images.

Training moves a switch for many images at once, and a threshold of one half then opens or closes a block for nearly all
of them.  But the logits rank the images: a shift closes or opens one image after the other, those that the policy is
least sure about first, and so reaches computations in between.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from gating.steering import Budget
from models import ResNet
from training.evaluate import Evaluation, evaluate
from utils.data.augment import Normalisation
from utils.data.images import Images
from utils.flops import NetworkCost

SEARCH = 5  # evaluations
REACH = 0.16  # share of all FLOPs that the search goes below the threshold's own computation, or around a target
NEAR = 0.005  # share of all FLOPs that is not worth a search


@contextmanager
def gate_biases_restored(network: ResNet) -> Iterator[None]:
    """Afterwards the switches stand as they stood before."""
    biases = [layer.bias.clone() for layer in network.gate.last_layers]
    try:
        yield
    finally:
        with torch.no_grad():
            for layer, bias in zip(network.gate.last_layers, biases, strict=True):
                layer.bias.copy_(bias)


@torch.no_grad()
def find_operating_point(
    network: ResNet,
    images: Images,
    normalisation: Normalisation,
    budget: Budget,
    cost: NetworkCost,
    at_half: Evaluation,
    precision: torch.dtype = torch.float32,
) -> Evaluation:
    """Shift the switches' logits to what serves the budget best, and evaluate the network there.

    Bisection for the least computation at which the accuracy is kept (``REACH`` at most below that of the threshold of
    one half), or for the target computation.  Of all points that were tried the best one stays, this threshold among
    them.

    Args:
        at_half: the network's evaluation on ``images`` at the threshold of one half.
        precision: of evaluation, as in ``training.evaluate.evaluate``.
    """
    layers = network.gate.last_layers
    biases = [layer.bias.clone() for layer in layers]
    best, best_offset = at_half, 0.0

    def moved(offset: float) -> None:
        for layer, bias in zip(layers, biases, strict=True):
            layer.bias.copy_(bias + offset)

    def kept(computation: float) -> bool:
        """Whether the budget is met there."""
        nonlocal best, best_offset
        offset = offset_to(computation, at_half.probabilities, cost)
        moved(offset)
        tried = evaluate(network, images, normalisation, cost, precision=precision)
        if budget.score(tried.accuracy, tried.computation) > budget.score(best.accuracy, best.computation):
            best, best_offset = tried, offset
        return budget.met(tried.accuracy, tried.computation)

    for_accuracy = budget.target_computation is None
    if not for_accuracy:
        low, high = budget.target_computation - REACH, budget.target_computation + REACH
    elif budget.met(at_half.accuracy, at_half.computation):
        low, high = max(1 - cost.skippable, at_half.computation - REACH), at_half.computation
    else:
        low, high = at_half.computation, 1.0
        if high - low < NEAR or not kept(high):  # then nothing between is worth a look
            low = high
    for _ in range(SEARCH):
        if high - low < NEAR:
            break
        middle = (low + high) / 2
        low, high = (low, middle) if kept(middle) == for_accuracy else (middle, high)
    moved(best_offset)
    return best


def offset_to(computation: float, probabilities: Tensor, cost: NetworkCost) -> float:
    """The offset of all logits that makes the thresholded decisions cost about this share of all FLOPs.

    Exactly this share, to an image, where no switch looks at what those before it decided, and as far as probabilities
    tell logits apart: in float32 all above 17 are one.

    Args:
        probabilities: [N, K], of thresholded evaluation without an offset.
    """
    logits = torch.logit(probabilities.double(), eps=1e-12)
    blocks = torch.tensor(cost.blocks, dtype=torch.float64).expand_as(logits)
    ranked, order = logits.flatten().sort(descending=True)
    shares = blocks.flatten()[order].cumsum(0) / (len(logits) * cost.flops) + 1 - cost.skippable
    opened = int((shares <= computation + 1e-12).sum())
    # Halfway between the last that passes and the first that does not.
    above = ranked[opened - 1] if opened > 0 else ranked[0] + 2
    if opened == len(ranked):
        return max(0.0, 1 - above.item())
    return -((above + ranked[opened]) / 2).item()
