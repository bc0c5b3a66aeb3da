"""Which form every layer takes: the least summed rise of the loss at which a goal is met."""

from collections.abc import Mapping, Sequence

import numpy as np

from pruning.combinations import Ways, least_regretted
from pruning.forms import Form
from pruning.selection import SLACK, Goal, nothing_faster, out_of_reach

BISECTIONS = 60


def choose_forms(
    forms: Mapping[str, Sequence[Form]],
    rises: Mapping[str, Sequence[float]],
    goal: Goal,
    fixed: tuple[int, int],
    objective: str,
) -> dict[str, int]:
    """The index of the form of each layer.

    A price is put on what the objective counts: FLOPs, parameters, seconds or, for "saliency", what the budget is given
    in.  Each layer takes the form for which the rise of the loss and the price of what is left are least together, and
    the price is the lowest at which the budget is met (Lagrange; Everett 1963).  Where that leaves more than ``SLACK``
    of it unused, the forms of least summed rise within the slack are looked for.

    Args:
        forms: by layer, the present one first.
        rises: predicted of the loss, one for each form.
        goal: a budget.
        fixed: FLOPs and parameters of everything outside of the layers.

    Raises:
        UserError: for a budget out of reach.
    """
    costs = {name: np.array([_counts(form) for form in own], dtype=float) for name, own in forms.items()}
    regrets = {name: np.asarray(own, dtype=float) for name, own in rises.items()}
    kinds = [k for k, limit in enumerate((goal.flops, goal.parameters)) if limit is not None]
    outside = np.array(fixed, dtype=float)[kinds]
    high = np.array([limit for limit in (goal.flops, goal.parameters) if limit is not None], dtype=float) - outside
    unit = {"flops": 0, "parameters": 1, "latency": 2}.get(objective, kinds[0])

    def at(price: float) -> dict[str, int]:
        return {name: int((regrets[name] + price * costs[name][:, unit]).argmin()) for name in forms}

    def used(chosen: Mapping[str, int]) -> np.ndarray:
        return sum((costs[name][i, kinds] for name, i in chosen.items()), np.zeros(len(kinds)))

    def searched(low: np.ndarray) -> dict[str, int] | None:
        ways = [Ways(costs[name][:, kinds], regrets[name]) for name in forms]
        found = least_regretted(ways, low, high)
        return None if found is None else dict(zip(forms, found, strict=True))

    low_price, high_price = 1e-20, 1e20  # rises are in nats, prices in nats for a FLOP, a parameter, a second
    chosen = None
    for _ in range(BISECTIONS):
        price = (low_price * high_price) ** 0.5
        tried = at(price)
        if (used(tried) <= high).all():
            chosen, high_price = tried, price
        else:
            low_price = price
    least_used = (1 - SLACK) * (high + outside) - outside
    if chosen is None or (used(chosen) < least_used).all():
        chosen = searched(least_used) or chosen or searched(np.full(len(kinds), -np.inf))
    if chosen is None:
        raise nothing_faster() if objective == "latency" else out_of_reach(goal, smallest(forms, fixed))
    return chosen


def budget_of(
    goal: Goal, now: tuple[int, int], forms: Mapping[str, Sequence[Form]], fixed: tuple[int, int], objective: str
) -> Goal:
    """The goal itself or, for a share, so much off the FLOPs, or off the parameters where they are the objective.

    No more goes than the forms allow.

    Args:
        now: FLOPs and parameters of the network as it is.
    """
    if goal.is_budget:
        return goal
    kind = int(objective == "parameters")
    limit = max((1 - goal.prune_ratio) * now[kind], smallest(forms, fixed)[kind])
    return Goal(parameters=limit) if kind else Goal(flops=limit)


def smallest(forms: Mapping[str, Sequence[Form]], fixed: tuple[int, int]) -> tuple[int, int]:
    """The fewest FLOPs and the fewest parameters, each by itself, that the forms allow."""
    least = [min(_counts(form)[k] for form in own) for k in range(2) for own in forms.values()]
    return fixed[0] + sum(least[: len(forms)]), fixed[1] + sum(least[len(forms) :])


def _counts(form: Form) -> tuple[float, ...]:
    return form.flops, form.parameters, form.seconds
