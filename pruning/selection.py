"""Selection: which directions of which layers go, until a share of them is gone or a budget is met."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pruning.combinations import Ways, least_regretted
from utils.errors import UserError

OBJECTIVES = ("saliency", "flops", "parameters", "latency")
SLACK = 0.02  # share of a budget that may be left unused where some combination of ranks uses it


@dataclass(frozen=True)
class Group:
    """Directions that one layer or block can lose, on one side or more; on each side the weakest go first."""

    saliencies: tuple[Tensor, ...]  # of each direction, one vector a side
    least: tuple[int, ...]  # directions that each side keeps in any case, see ``least_kept``
    # Directions kept on each side -> (FLOPs, parameters) of the rebuilt layer, and seconds for the objective "latency";
    # takes arrays too.
    cost: Callable
    # Of two sides: the saliency of every pair [first side, second side], which sums to those of both sides.
    pairs: Tensor | None = None
    channels: tuple[int, ...] | None = None  # of each side in the unpruned network, where they are more than now


@dataclass(frozen=True)
class Goal:
    """Where pruning stops: at a share of all directions or, where a budget is given, at the budget."""

    prune_ratio: float = 0.0
    flops: float | None = None  # of the whole network, for one image
    parameters: float | None = None

    @property
    def is_budget(self) -> bool:
        return self.flops is not None or self.parameters is not None


def part_of_the_way(now: float, target: float | None, iterations: int) -> float | None:
    """Where the first of so many iterations stops, if each takes away the same share: geometric steps to the target.

    A network that is already below the target has arrived.
    """
    return None if target is None else max(target, now * (target / now) ** (1 / iterations))


def least_kept(channels: int, prune_ratio_limit: float) -> int:
    """Directions that a side with ``channels`` in the unpruned network keeps: it loses at most the limit, never all."""
    return max(1, math.ceil(channels * (1 - prune_ratio_limit) - 1e-9))


def step_of(channels: int, round_to: int) -> int:
    """The multiple for a side of so many channels: ``round_to``, halved until four steps or more lead through it.

    Small layers would otherwise have no ranks to choose from.
    """
    while round_to > 1 and 4 * round_to > channels:
        round_to //= 2
    return round_to


def rounded_up(kept, size: int, multiple: int):
    """``kept`` (int or array) raised to the next multiple, so that no more is dropped than was chosen; at most size."""
    return np.minimum(-(-kept // multiple) * multiple, size)


def select(
    groups: Mapping[str, Group],
    goal: Goal,
    fixed: tuple[int, int],
    objective: str = "saliency",
    round_to: int = 1,
) -> dict[str, tuple[Tensor, ...]]:
    """Drop directions from the least regretted on until the goal is met.

    With the objective "saliency" all directions compete under one threshold, as in EigenDamage (arXiv:1905.05934),
    section 4.  With "flops", "parameters" or "latency" they compete by saliency over what the rebuilt layer really
    saves, in batches: a first direction alone often saves nothing, since its rotation has to be paid for; and what goes
    with a direction of one side is no longer counted on the other.  A budget is met from below, and what fits into it
    again is then given back, the most salient first.  Where that leaves more than ``SLACK`` of it unused, since few
    layers change in large steps, the ranks of all layers that lose least within the slack are looked for.

    Args:
        groups: what can be dropped, by layer or block.
        goal: where to stop.  Where the limits protect too much for a prune_ratio, fewer are dropped.
        fixed: FLOPs and parameters of everything outside of the groups.
        round_to: kept directions are raised to multiples of this, of less on small sides (``step_of``).

    Returns:
        the directions that each side of each group keeps, ascending.  Equal saliencies go in the order of groups,
        sides and indices, so a selection is reproducible.

    Raises:
        UserError: for a budget that the limits put out of reach.
    """
    walk = _Walk(groups, fixed, round_to)
    share = round(goal.prune_ratio * sum(walk.kept.values()))

    def reached() -> bool:
        if not goal.is_budget:
            return walk.dropped >= share
        flops, parameters = walk.cost()
        return (goal.flops is None or flops <= goal.flops) and (
            goal.parameters is None or parameters <= goal.parameters
        )

    steps = walk.by_saliency() if objective == "saliency" else walk.by_saving(OBJECTIVES.index(objective) - 1)
    taken = []
    while not reached():
        step = next(steps, None)
        if step is None:
            if goal.is_budget and objective == "latency":
                raise nothing_faster()
            if goal.is_budget:
                raise out_of_reach(goal, walk.cost())
            break
        side, count = step
        count = count if goal.is_budget else min(count, share - walk.dropped)
        walk.drop(side, count)
        taken.append((side, count))
    if goal.is_budget:
        _give_back(walk, taken, reached)
        _use_up(walk, goal)
    return {
        name: tuple(walk.order[name, i][-walk.rounded(name, i) :].sort().values for i in range(len(group.saliencies)))
        for name, group in groups.items()
    }


def smallest_cost(groups: Mapping[str, Group], fixed: tuple[int, int], round_to: int) -> tuple[int, int]:
    """FLOPs and parameters when every group is pruned down to its limits."""
    walk = _Walk(groups, fixed, round_to)
    for name, side in list(walk.kept):
        walk.drop((name, side), walk.kept[name, side] - groups[name].least[side])
    return walk.cost()


def check_reachable(goal: Goal, smallest: tuple[int, int]) -> None:
    """Refuse a budget below what the limits leave.

    Raises:
        UserError: says what the smallest network would cost.
    """
    if (goal.flops is not None and smallest[0] > goal.flops) or (
        goal.parameters is not None and smallest[1] > goal.parameters
    ):
        raise out_of_reach(goal, smallest)


def nothing_faster() -> UserError:
    """What to say where the objective "latency" ends before the target."""
    return UserError(
        "objective latency finds no form of any layer that would still be faster on this machine, short of the target: "
        "raise the target or use objective flops"
    )


def out_of_reach(goal: Goal, smallest: tuple[int, int]) -> UserError:
    """What to say where the smallest network would cost more than the budget."""
    kind = 0 if goal.flops is not None and smallest[0] > goal.flops else 1
    target, unit = (goal.flops, "FLOPs") if kind == 0 else (goal.parameters, "parameters")
    return UserError(
        f"target_{unit.lower()} asks for {target:,.0f} {unit}, but prune_ratio_limit leaves at least "
        f"{smallest[kind]:,}: raise the target or prune_ratio_limit"
    )


def _give_back(walk: "_Walk", taken: list, reached: Callable[[], bool]) -> None:
    closed = set()
    for side, count in reversed(taken):
        for _ in range(count):
            if side in closed:
                break
            walk.drop(side, -1)
            if not reached():
                walk.drop(side, 1)
                closed.add(side)


def _use_up(walk: "_Walk", goal: Goal) -> None:
    """Where no budget is used up to ``SLACK``, move to the ranks of least regret that do so, if there are any."""
    kinds = [k for k, budget in enumerate((goal.flops, goal.parameters)) if budget is not None]
    high = np.array([(goal.flops, goal.parameters)[k] for k in kinds], dtype=float)
    low = (1 - SLACK) * high
    now = np.array([walk.cost()[k] for k in kinds])
    # Nothing more can be used where nothing is gone.
    if not walk.groups or (now >= low).any() or walk.dropped == 0:
        return
    ways, ranks = [], []
    for name in walk.groups:
        counts, costs, regrets = walk.ways(name)
        ways.append(Ways(np.stack([costs[k] for k in kinds], axis=1).astype(float), regrets))
        ranks.append(counts)
    fixed = np.array([walk.fixed[k] for k in kinds])
    found = least_regretted(ways, low - fixed, high - fixed)
    for name, counts, way in zip(walk.groups, ranks, found or (), strict=False):
        for i, count in enumerate(counts[way]):
            walk.drop((name, i), walk.kept[name, i] - int(count))


class _Walk:
    """How far each side has been pruned, and what the network costs there.  A side is (name, index)."""

    def __init__(self, groups: Mapping[str, Group], fixed: tuple[int, int], round_to: int):
        self.groups, self.fixed = groups, fixed
        self.order, self.values, self.kept, self.steps = {}, {}, {}, {}
        for name, group in groups.items():
            for i, saliency in enumerate(group.saliencies):
                values, order = saliency.detach().double().cpu().sort(stable=True)
                self.order[name, i], self.values[name, i] = order, values.numpy()
                self.kept[name, i] = len(values)
                self.steps[name, i] = step_of(len(values) if group.channels is None else group.channels[i], round_to)
        self.dropped = 0
        self._costs = {name: self._cost(name) for name in groups}
        self._total = [fixed[k] + sum(cost[k] for cost in self._costs.values()) for k in range(2)]

    def rounded(self, name: str, i: int) -> int:
        return int(rounded_up(self.kept[name, i], len(self.values[name, i]), self.steps[name, i]))

    def cost(self) -> tuple[int, int]:
        return self._total[0], self._total[1]

    def drop(self, side: tuple[str, int], count: int) -> None:
        """Drop the next ``count`` directions of a side; a negative count gives them back."""
        name = side[0]
        self.kept[side] -= count
        self.dropped += count
        cost = self._cost(name)
        self._total = [self._total[k] + cost[k] - self._costs[name][k] for k in range(2)]
        self._costs[name] = cost

    def ways(self, name: str) -> tuple[np.ndarray, tuple[np.ndarray, ...], np.ndarray]:
        """Every form of a group: counts kept on each side [n, sides], what they cost, and the saliency that is lost.

        Directions go in the order that the walk has found.
        """
        group = self.groups[name]
        sizes = [len(self.values[name, i]) for i in range(len(group.least))]
        sides = [
            np.unique(rounded_up(np.arange(least, size + 1), size, self.steps[name, i]))
            for i, (least, size) in enumerate(zip(group.least, sizes, strict=True))
        ]
        counts = np.stack([axis.ravel() for axis in np.meshgrid(*sides, indexing="ij")], axis=1)
        if group.pairs is None:
            lost = [np.pad(self.values[name, i].cumsum(), (1, 0)) for i in range(len(sizes))]
            regrets = sum(values[size - kept] for values, size, kept in zip(lost, sizes, counts.T, strict=True))
        else:
            pairs = group.pairs.double()[self.order[name, 0]][:, self.order[name, 1]].numpy()
            # [c, r]: what the last c and r directions of the two orders keep.
            kept = np.pad(pairs[::-1, ::-1].cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
            regrets = pairs.sum() - kept[counts[:, 0], counts[:, 1]]
        return counts, tuple(np.broadcast_to(c, len(counts)) for c in group.cost(*counts.T)), regrets

    def by_saliency(self) -> Iterator[tuple[tuple[str, int], int]]:
        """Direction by direction, in ascending saliency."""
        candidates = []
        for position, (side, values) in enumerate(self.values.items()):
            group = self.groups[side[0]]
            going = values[: max(0, len(values) - group.least[side[1]])]
            candidates += [(value, position, side) for value in going]
        for _, _, side in sorted(candidates, key=lambda candidate: candidate[:2]):
            yield side, 1

    def by_saving(self, unit: int) -> Iterator[tuple[tuple[str, int], int]]:
        """Batch by batch from where the walk stands, by saliency per FLOP (0), parameter (1) or second (2) saved."""
        offers = {name: self._offer(name, unit) for name in self.groups}
        while offers:
            name = min(offers, key=lambda n: offers[n][0])
            ratio, side, count = offers[name]
            if math.isinf(ratio):
                return
            yield side, count
            offers[name] = self._offer(name, unit)

    def _cost(self, name: str) -> tuple[float, ...]:
        cost = self.groups[name].cost(*(self.rounded(name, i) for i in range(len(self.groups[name].least))))
        return tuple(value.item() if isinstance(value, np.generic | np.ndarray) else value for value in cost)

    def _offer(self, name: str, unit: int) -> tuple[float, tuple[str, int], int]:
        """The batch of one of a group's sides with the least saliency per unit saved."""
        group = self.groups[name]
        best = (math.inf, (name, 0), 0)
        for i, least in enumerate(group.least):
            kept = self.kept[name, i]
            if kept <= least:
                continue
            self._recount(name, i)
            values = self.values[name, i]
            gone = len(values) - kept
            regret = values[gone : len(values) - least].cumsum()
            counts = [self.rounded(name, j) for j in range(len(group.least))]
            counts[i] = rounded_up(np.arange(kept - 1, least - 1, -1), len(values), self.steps[name, i])
            saved = self._costs[name][unit] - np.asarray(group.cost(*counts)[unit])
            ratios = np.where(saved > 0, regret / np.where(saved > 0, saved, 1), math.inf)
            count = int(ratios.argmin())
            if ratios[count] < best[0]:
                best = (float(ratios[count]), (name, i), count + 1)
        return best

    def _recount(self, name: str, i: int) -> None:
        """Rank what a side keeps by its saliency among the directions that the other side keeps."""
        pairs = self.groups[name].pairs
        if pairs is None:
            return
        other = self.order[name, 1 - i][-self.kept[name, 1 - i] :]
        order, gone = self.order[name, i], len(self.order[name, i]) - self.kept[name, i]
        left = order[gone:].sort().values
        pairs = pairs if i == 0 else pairs.t()
        values, ranking = pairs[left][:, other].sum(dim=1).sort(stable=True)
        self.order[name, i] = torch.cat([order[:gone], left[ranking]])
        self.values[name, i] = np.concatenate([self.values[name, i][:gone], values.numpy()])
