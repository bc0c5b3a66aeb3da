"""Where pruning stops: targets for FLOPs and parameters, shares, and what can be reached.

Throughout, ``costs`` are FLOPs and parameters of every form of each layer, [n, 2], and ``fixed`` those of everything
outside of the layers, [2].
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pruning.combinations import Ways, least_regretted
from utils.errors import UserError
from utils.flops import NetworkCost

OBJECTIVES = ("saliency", "flops", "parameters")
WORTHWHILE = 0.1  # of what is to be removed


@dataclass(frozen=True)
class Goal:
    """Where an iteration stops: at targets or, without any, after a share is removed."""

    prune_ratio: float = 0.0
    flops: float | None = None  # of the whole network, for one image
    parameters: float | None = None
    nearest: bool = False  # whether the nearest target that can be reached stands for one that cannot

    @property
    def has_target(self) -> bool:
        return self.flops is not None or self.parameters is not None

    @property
    def kinds(self) -> list[int]:
        """The quantities that have a target: FLOPs (0), parameters (1) or both."""
        return [k for k, limit in enumerate((self.flops, self.parameters)) if limit is not None]

    @property
    def limits(self) -> np.ndarray:
        """The target of each of ``kinds``."""
        return np.array([limit for limit in (self.flops, self.parameters) if limit is not None], dtype=float)


def as_count(target: float | None, whole: float) -> float | None:
    """A target as a count, of which up to 1 is a share of the whole; 0 and None are none."""
    return target * whole if target and target <= 1 else target or None


def part_of_the_way(now: float, target: float | None, iterations: int) -> float | None:
    """The goal of the first of so many iterations that each remove the same share: geometric steps to the target."""
    return None if target is None else max(target, now * (target / now) ** (1 / iterations))


def as_target(goal: Goal, now: Sequence[float], least: Sequence[float], objective: str) -> Goal:
    """The goal itself or, for a share, the present FLOPs (or parameters, if they are the objective) less that share.

    Args:
        now: FLOPs and parameters of the network as it is.
        least: the fewest of each that can be reached.
    """
    if goal.has_target:
        return goal
    kind = int(objective == "parameters")
    limit = float(max((1 - goal.prune_ratio) * now[kind], least[kind]))
    return Goal(parameters=limit) if kind else Goal(flops=limit)


def least_of(costs: Sequence[np.ndarray], fixed: Sequence[float]) -> tuple[int, int]:
    """The fewest FLOPs and the fewest parameters, each by itself."""
    least = sum((own.min(axis=0) for own in costs), np.asarray(fixed))
    return int(least[0]), int(least[1])


def outside(cost: NetworkCost, costs: Sequence[np.ndarray]) -> np.ndarray:
    """FLOPs and parameters of everything outside of the layers, each of which costs most as it is, [2]."""
    return np.array([cost.flops, cost.parameters]) - sum(own.max(axis=0) for own in costs)


def fewest_parameters(costs: Sequence[np.ndarray], fixed: Sequence[float], flops: float) -> int:
    """The fewest parameters with at most so many FLOPs, which can be reached."""
    chosen = least_regretted([Ways(own[:, :1], own[:, 1]) for own in costs], np.array([flops - fixed[0]]))
    return int(fixed[1]) + sum(int(own[i, 1]) for own, i in zip(costs, chosen, strict=True))


def nearest(goal: Goal, costs: Sequence[np.ndarray], fixed: Sequence[float]) -> Goal:
    """The targets, raised to what can be reached; FLOPs come first where both together cannot."""
    limits = zip((goal.flops, goal.parameters), least_of(costs, fixed), strict=True)
    flops, parameters = (None if limit is None else max(limit, least) for limit, least in limits)
    if flops is not None and parameters is not None:
        parameters = max(parameters, fewest_parameters(costs, fixed, flops))
    return Goal(goal.prune_ratio, flops, parameters)


def check_near(asked: Goal, nearest: Goal, now: Sequence[float], left_alone: Mapping[str, str]) -> None:
    """Refuse a target if what can be removed is next to nothing: the layers would be ruined to remove it.

    Args:
        now: FLOPs and parameters of the network as it is.
        left_alone: why, by layer.

    Raises:
        UserError: says what can be reached, and what prevents more.
    """
    for k, wanted, found in zip(asked.kinds, asked.limits, nearest.limits, strict=True):
        if 0 < now[k] - found < WORTHWHILE * (now[k] - wanted):
            name = ("flops", "parameters")[k]
            counts = Counter(left_alone.values()).most_common()
            reasons = ", ".join(f"{count} {reason}" for reason, count in counts) or "none"
            raise UserError(
                f"{name}={wanted / now[k]:.3g} of the network is out of reach: its layers can leave no fewer than "
                f"{found / now[k]:.2%}; raise it, or change why layers are left alone ({reasons})"
            )


def shortfall(goal: Goal, costs: Sequence[np.ndarray], fixed: Sequence[float], by: str = "the layers") -> str | None:
    """Why no choice of forms meets the targets, with the least that can be reached; None if one does.

    Args:
        by: what sets the limit.
    """
    names, least = ("FLOPs", "parameters"), least_of(costs, fixed)
    for k, limit in zip(goal.kinds, goal.limits, strict=True):
        if least[k] > limit:
            asked = f"target_{names[k].lower()} asks for {limit:,.0f} {names[k]}"
            return f"{asked}, but {by} can leave no fewer than {least[k]:,}"
    if len(goal.kinds) == 2:
        parameters = fewest_parameters(costs, fixed, goal.flops)
        if parameters > goal.parameters:
            return (
                f"target_flops ({goal.flops:,.0f}) and target_parameters ({goal.parameters:,.0f}) can be met one by "
                f"one, but not together: with so few FLOPs {by} can leave no fewer than {parameters:,} parameters"
            )
    return None
