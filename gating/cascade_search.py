"""The search for a cascade: which networks, in which order, with which thresholds.

Every network is evaluated once.  The answers and the cost of every cascade follow from those predictions, image by
image, so thresholds are read off the sorted confidences.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations, product

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from utils.parallel import hide_progress_bar

LEVELS = 200  # of what the first of three members hands on; the second threshold is exact for each


@dataclass(frozen=True)
class Predictions:
    """What one network answers for N images, and what that costs."""

    probabilities: Tensor  # [N, classes]
    executed: Tensor  # [N] in float64, FLOPs spent on each image


@dataclass(frozen=True)
class Candidate:
    """A network alone, or a cascade of some."""

    members: tuple[int, ...]  # indices of the networks, in the order in which they run
    thresholds: tuple[float, ...]  # of every member but the last
    answer: str  # "last" or "mean", see ``models.cascade``
    accuracy: float
    flops: float  # executed, mean over the images


@dataclass(frozen=True)
class Outcome:
    """What a cascade did, image by image."""

    correct: Tensor  # bool [N]
    executed: Tensor  # [N] in float64
    members_run: Tensor  # int64 [N], 1 for what the first answered
    members: int


def outcome(predictions: Sequence[Predictions], candidate: Candidate, labels: Tensor) -> Outcome:
    """Run a candidate on predictions, as ``models.cascade.Cascade`` runs on images."""
    first, *others = (predictions[i] for i in candidate.members)
    answer, executed = first.probabilities.clone(), first.executed.clone()
    total, run = first.probabilities.clone(), torch.ones(len(labels), dtype=torch.int64)
    rows = torch.arange(len(labels))
    for position, (network, threshold) in enumerate(zip(others, candidate.thresholds, strict=True), start=2):
        rows = rows[answer[rows].amax(dim=1) < threshold]
        total[rows] += network.probabilities[rows]
        answer[rows] = total[rows] / position if candidate.answer == "mean" else network.probabilities[rows]
        executed[rows] += network.executed[rows]
        run[rows] = position
    return Outcome(answer.argmax(dim=1) == labels, executed, run, len(candidate.members))


def candidates(
    predictions: Sequence[Predictions],
    labels: Tensor,
    reference: int | None = None,
    among: Collection[int] | None = None,
) -> list[Candidate]:
    """Every network alone, and the cascades of two or three that no other cascade beats, cheapest first.

    That is in accuracy at fewer FLOPs or, with a ``reference``, in its margin over that network (``_points``).

    Exact for pairs: every number of images that can be handed on is tried.  For triples the first member hands on one
    of ``LEVELS`` numbers of images, spread evenly, and the second again every number of those.

    Args:
        predictions: of networks on the same N images, in any order; cheaper ones run first.
        labels: int64 [N].
        reference: index of the network that ``cheapest_within`` compares with.
        among: indices of the networks to use; None: all.
    """
    expected = None if reference is None else (predictions[reference].probabilities.argmax(dim=1) == labels).double()
    among = range(len(predictions)) if among is None else among
    order = sorted(among, key=lambda i: predictions[i].executed.mean().item())
    tried = [*product((*combinations(order, 2), *combinations(order, 3)), ("last", "mean"))]
    best = torch.empty(0, 6, dtype=torch.float64)  # accuracy, FLOPs, margin, two thresholds, index in ``tried``
    for index, (members, answer) in enumerate(tqdm(tried, "cascades", leave=False, disable=hide_progress_bar())):
        points = _points([predictions[i] for i in members], answer, labels, expected)
        points = F.pad(F.pad(points, (0, 5 - points.shape[1])), (0, 1), value=index)
        best = torch.cat([best, points])
        best = best[torch.cat([_undominated(best[:, [0, 1]]), _undominated(best[:, [2, 1]])]).unique()]
    found = [_alone(i, predictions[i], labels) for i in order]
    for accuracy, flops, _, *thresholds, index in best.tolist():
        members, answer = tried[int(index)]
        found.append(Candidate(members, tuple(thresholds[: len(members) - 1]), answer, accuracy, flops))
    return sorted(found, key=lambda c: (c.flops, -c.accuracy))


def frontier(found: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that no other one beats in accuracy and FLOPs, cheapest first."""
    return [found[i] for i in _undominated(torch.tensor([(c.accuracy, c.flops) for c in found], dtype=torch.float64))]


def _alone(index: int, network: Predictions, labels: Tensor) -> Candidate:
    accuracy = (network.probabilities.argmax(dim=1) == labels).double().mean().item()
    return Candidate((index,), (), "last", accuracy, network.executed.mean().item())


def _points(networks: Sequence[Predictions], answer: str, labels: Tensor, expected: Tensor | None) -> Tensor:
    """Cascades of two or three networks, one row each: accuracy, FLOPs, margin and the thresholds, in float64.

    The margin is by how much accuracy exceeds that of the reference, less the standard error of this difference; the
    accuracy itself without ``expected``, whether the reference is right, [N].
    """
    given = [network.probabilities for network in networks]
    if answer == "mean":
        given = list(torch.stack(given).cumsum(dim=0) / torch.arange(1, len(given) + 1).view(-1, 1, 1))
    right = [(p.argmax(dim=1) == labels).double() for p in given]
    confidence = [p.amax(dim=1) for p in given]
    differing = [torch.zeros_like(own) if expected is None else (own != expected).double() for own in right]
    sums = [torch.stack(of) for of in zip(right, [network.executed for network in networks], differing, strict=True)]
    last = len(networks) - 2  # the switch whose every threshold is tried
    order, cuts, thresholds = _sorted(confidence[last])
    gains = sums[-1] - sums[last]
    gains[1] = sums[-1][1]  # handing on adds FLOPs and takes none away
    gains = gains[:, order]
    if last == 0:
        reached, first = torch.ones(1, len(labels), dtype=torch.bool), None
        start = sums[0].sum(dim=1).view(3, 1, 1)
    else:
        _, levels, first = _sorted(confidence[0])
        first = first[torch.linspace(0, len(levels) - 1, min(LEVELS, len(levels))).long()]
        reached = confidence[0] < first[:, None]
        start = torch.where(reached, sums[1][:, None], sums[0][:, None])
        start[1] = sums[0][1] + reached * sums[1][1]
        reached, start = reached[:, order], start.sum(dim=2)[:, :, None]
    n = len(labels)
    accuracy, flops, differ = (start + (gains[:, None] * reached).cumsum(dim=2))[:, :, cuts] / n
    margin = accuracy
    if expected is not None:
        gain = accuracy - expected.mean()
        margin = gain - ((differ - gain.square()).clamp(min=0) / (n - 1)).sqrt()
    # Of each level only the undominated ones, so that few points are left to compare.
    better = _rising(accuracy) | _rising(margin)
    level, cut = better.nonzero(as_tuple=True)
    found = [
        accuracy[better],
        flops[better],
        margin[better],
        *([] if first is None else [first[level]]),
        thresholds[cut],
    ]
    return torch.stack(found, dim=1)


def _rising(values: Tensor) -> Tensor:
    """Whether each of the values [levels, n] is above all before it of its level."""
    before = torch.cat([values.new_full((len(values), 1), -torch.inf), values.cummax(dim=1).values[:, :-1]], dim=1)
    return values > before


def _sorted(confidence: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The images by rising confidence, where in that order a threshold can lie, and such a threshold for each.

    A cut is the position of the last image below; equal confidences stay together.
    """
    order = confidence.argsort()
    ascending = confidence[order]
    above = torch.cat([ascending[1:], ascending.new_ones(1)])
    cuts = (above > ascending).nonzero().squeeze(1)
    low, high = ascending[cuts], above[cuts]
    # In the precision in which confidences are compared, where nothing may lie between two of them.
    middle = ((low.double() + high.double()) / 2).to(confidence.dtype)
    return order, cuts, torch.where(middle > low, middle, high).double()


def _undominated(points: Tensor) -> Tensor:
    """Indices of the rows (accuracy, FLOPs, ...) that no other row beats, by rising FLOPs."""
    by_accuracy = points[:, 0].argsort(descending=True, stable=True)
    order = by_accuracy[points[by_accuracy, 1].argsort(stable=True)]
    best_before = torch.cat([points.new_full((1,), -torch.inf), points[order, 0].cummax(dim=0).values[:-1]])
    return order[points[order, 0] > best_before]


def cheapest_within(
    found: Sequence[Candidate], predictions: Sequence[Predictions], labels: Tensor, reference: int, drop: float
) -> Candidate | None:
    """The candidate of fewest FLOPs whose accuracy stays within ``drop`` of a network's, by one standard error.

    Many thousands of cascades are compared on the same images, so the winner's accuracy is too optimistic.
    Therefore the mean difference to the reference, image by image, has to exceed ``-drop`` by its standard error.
    Chosen on 5,000 images and tested on 5,000 others (12 splits of CIFAR-10's test images, four networks), this broke
    the budget in 17 to 33% of the splits for 2 to 8% more FLOPs; the plain rule in 50 to 67%, two-fold cross-fitting
    in 42 to 58%.

    Args:
        found: cheapest first, as ``candidates`` returns them for this reference.
        reference: index of the network to be compared with; it is within any budget itself.

    Returns:
        None where no candidate is within the budget.
    """
    expected = (predictions[reference].probabilities.argmax(dim=1) == labels).double()
    for candidate in found:
        if candidate.accuracy < expected.mean() - drop - 1e-9:
            continue
        gain = outcome(predictions, candidate, labels).correct.double() - expected
        if candidate.members == (reference,) or gain.mean() + drop >= gain.std() / len(labels) ** 0.5 - 1e-9:
            return candidate
    return None


def best_under(found: Sequence[Candidate], flops: float) -> Candidate | None:
    """The most accurate candidate of at most so many executed FLOPs, the cheapest of equals, or None."""
    return max((c for c in found if c.flops <= flops), key=lambda c: (c.accuracy, -c.flops), default=None)
