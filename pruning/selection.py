"""Selection of the directions or channels to remove, if they are removed one by one."""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pruning.choice import choose
from pruning.goals import Goal, shortfall
from utils.errors import UserError


@dataclass(frozen=True)
class Group:
    """The directions that one layer or block can lose, on one side or two; on each side the least salient go first."""

    saliencies: Tensor  # [n] of the directions of one side, or [n, m] of the pairs of directions of two sides
    counts: tuple[np.ndarray, ...]  # how many directions each side may keep, ascending, see ``counts_kept``
    cost: Callable  # directions kept on each side -> (FLOPs, parameters) of the rebuilt layer; takes arrays too

    def sides(self) -> list[np.ndarray]:
        """The saliency of each direction: of all pairs that it is in."""
        values = self.saliencies.detach().double().cpu().numpy()
        return [values] if values.ndim == 1 else [values.sum(axis=1), values.sum(axis=0)]

    def orders(self) -> list[np.ndarray]:
        """The directions of each side, the last one to go first."""
        return [side.argsort(kind="stable")[::-1] for side in self.sides()]

    def forms(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Every form: directions kept on each side [n, sides], FLOPs and parameters [n, 2], saliency lost [n]."""
        counts = np.stack([axis.ravel() for axis in np.meshgrid(*self.counts, indexing="ij")], axis=1)
        costs = np.stack(np.broadcast_arrays(*self.cost(*counts.T)), axis=1)
        kept = self.saliencies.detach().double().cpu().numpy()[np.ix_(*self.orders())]
        for axis in range(kept.ndim):
            kept = kept.cumsum(axis)
        return counts, costs, kept.flat[-1] - kept[tuple(counts.T - 1)]


def least_kept(channels: int, prune_ratio_limit: float) -> int:
    """Directions that a side with ``channels`` in the unpruned network keeps: it loses at most the limit, never all."""
    return max(1, math.ceil(channels * (1 - prune_ratio_limit) - 1e-9))


def step_of(channels: int, round_to: int) -> int:
    """The rounding step for a side of so many channels: ``round_to``, or in smaller ones half of the channels or less.

    Otherwise small layers would have no choice of ranks.
    """
    if channels >= round_to:
        return round_to
    while round_to > 1 and 2 * round_to > channels:
        round_to //= 2
    return round_to


def counts_kept(now: int, channels: int, prune_ratio_limit: float, round_to: int) -> np.ndarray:
    """How many of ``now`` directions a side may keep, ascending: multiples of ``step_of`` within the limit, or all.

    Args:
        channels: of the side in the unpruned network, which limit and step count from.
    """
    step = step_of(channels, round_to)
    first = -(-least_kept(channels, prune_ratio_limit) // step) * step
    return np.append(np.arange(first, now, step), now)


def select(
    groups: Mapping[str, Group], goal: Goal, fixed: tuple[int, int], objective: str = "saliency"
) -> dict[str, tuple[Tensor, ...]]:
    """The directions that each side of each group keeps, ascending.

    With the objective "saliency" all directions compete under one threshold, as in EigenDamage (arXiv:1905.05934),
    section 4, until the share of them is gone or the targets are reached; counts are raised to the next that is
    allowed.  Otherwise, of all combinations of counts that reach the targets, the one that loses least saliency is
    taken: a single direction often saves nothing, since its rotation costs FLOPs itself, and a pair of directions that
    is removed with one side is not counted again on the other.  A share is then one of the FLOPs or parameters, see
    ``pruning.goals.as_target``.

    Args:
        groups: what can be dropped, by layer or block.
        fixed: FLOPs and parameters of everything outside of the groups.

    Returns:
        indices, by group and side.  Equal saliencies go in the order of groups, sides and indices.

    Raises:
        UserError: if the groups cannot reach the target.
    """
    if objective == "saliency":
        chosen = _one_threshold(groups, goal, fixed)
    else:
        chosen = _least_saliency(groups, goal, fixed, objective)
    return {
        name: tuple(
            torch.from_numpy(np.sort(order[:count])) for order, count in zip(group.orders(), chosen[name], strict=True)
        )
        for name, group in groups.items()
    }


def group_costs(groups: Mapping[str, Group]) -> list[np.ndarray]:
    """FLOPs and parameters of every form of each group, [n, 2]."""
    return [group.forms()[1] for group in groups.values()]


def _one_threshold(groups: Mapping[str, Group], goal: Goal, fixed: tuple[int, int]) -> dict[str, Sequence[int]]:
    sides = [pair for g in groups.values() for pair in zip(g.counts, map(np.sort, g.sides()), strict=True)]
    going = [side[: len(side) - allowed[0]] for allowed, side in sides]
    values = np.concatenate([*going, []])
    order = np.repeat(np.arange(len(sides)), [len(side) for side in going])[values.argsort(kind="stable")]

    def kept(dropped: int) -> dict[str, Sequence[int]]:
        gone = np.bincount(order[:dropped], minlength=len(sides))
        counts = iter(a[np.searchsorted(a, len(side) - n)] for (a, side), n in zip(sides, gone, strict=True))
        return {name: [int(next(counts)) for _ in group.counts] for name, group in groups.items()}

    def met(dropped: int) -> bool:
        counts = kept(dropped)
        used = sum((np.array(group.cost(*counts[name])) for name, group in groups.items()), np.asarray(fixed))
        return bool((used[goal.kinds] <= goal.limits).all())

    if not goal.has_target:
        return kept(min(round(goal.prune_ratio * sum(len(side) for _, side in sides)), len(order)))
    dropped = bisect_left(range(len(order) + 1), True, key=met)
    if dropped > len(order):
        raise UserError(f"{shortfall(goal, group_costs(groups), fixed)}: raise the target")
    return kept(dropped)


def _least_saliency(
    groups: Mapping[str, Group], goal: Goal, fixed: tuple[int, int], objective: str
) -> dict[str, Sequence[int]]:
    forms = [group.forms() for group in groups.values()]
    chosen = choose([own for _, own, _ in forms], [lost for *_, lost in forms], goal, fixed, objective)
    return {name: counts[i] for name, (counts, *_), i in zip(groups, forms, chosen, strict=True)}
