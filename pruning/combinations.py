"""One form for every layer so that summed costs stay within budgets: the multiple-choice knapsack problem."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

GAP = 1e-4  # relative gap between the solution found and the lower bound
SECONDS = 60.0  # time limit of the search; networks of 109 layers with 86 forms each took 3
ROWS = 1e6  # budgets are scaled to this: the solver's tolerances are absolute, 1e-6


@dataclass(frozen=True)
class Ways:
    """The forms that one layer can take."""

    costs: np.ndarray  # [n, kinds], FLOPs and parameters, say
    regrets: np.ndarray  # [n], regret of each


def least_regretted(layers: Sequence[Ways], budgets: np.ndarray) -> list[int] | None:
    """One way of each layer, of least summed regret, with every summed cost at most its budget.

    An integer program with one variable of 0 or 1 for each way (scipy's HiGHS).  Its tolerance for the objective is
    absolute, so the program is solved again in units of its solution if that is far below the largest regret.

    Args:
        budgets: [kinds], of the sums over layers.

    Returns:
        the index of the way of each layer, None where no combination fits.
    """
    if not layers:
        return [] if (np.asarray(budgets) >= 0).all() else None
    kept = [undominated(ways) for ways in layers]
    layers = [Ways(ways.costs[some], ways.regrets[some]) for ways, some in zip(layers, kept, strict=True)]
    layer, index = np.repeat(np.arange(len(layers)), [len(some) for some in kept]), np.concatenate(kept)
    regrets = np.concatenate([ways.regrets - ways.regrets.min() for ways in layers])
    costs = np.concatenate([ways.costs - ways.costs.min(axis=0) for ways in layers])
    budgets = budgets - sum(ways.costs.min(axis=0) for ways in layers)
    if (budgets < 0).any():
        return None
    limits, unit = budgets, regrets.max()
    while True:
        open_ways = np.flatnonzero((costs <= limits).all(axis=1) & (regrets <= unit))
        if len(np.unique(layer[open_ways])) < len(layers):
            return None
        chosen = open_ways[_solved(layer[open_ways], len(layers), costs[open_ways], regrets[open_ways], limits, unit)]
        if len(chosen) == 0:
            return None
        used, lost = costs[chosen].sum(axis=0), regrets[chosen].sum()
        if (used > budgets).any():  # by the solver's tolerance
            limits = limits - 2 * np.maximum(used - budgets, 0)
        elif lost > 0.01 * unit or lost == 0:
            return index[chosen].tolist()
        else:
            unit = lost


def _solved(
    layer: np.ndarray, layers: int, costs: np.ndarray, regrets: np.ndarray, limits: np.ndarray, unit: float
) -> np.ndarray:
    """Positions of the ways that the integer program chooses, by layer; none where it has no solution."""
    ones = csr_array((np.ones(len(layer)), (layer, np.arange(len(layer)))), shape=(layers, len(layer)))
    rows = costs.T * (ROWS / np.where(limits > 0, limits, 1))[:, None]
    found = milp(
        regrets / (unit or 1),
        integrality=np.ones(len(layer)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(ones, 1, 1), LinearConstraint(rows, -np.inf, ROWS * (limits > 0))],
        options={"mip_rel_gap": GAP, "time_limit": SECONDS},
    )
    return np.array([], dtype=int) if found.x is None else np.flatnonzero(found.x > 0.5)


def undominated(ways: Ways) -> np.ndarray:
    """Indices of the ways that no other matches or beats in all costs and in regret."""
    left, kept = np.lexsort((*ways.costs.T, ways.regrets)), []
    while len(left):
        kept.append(left[0])
        left = left[(ways.costs[left] < ways.costs[left[0]]).any(axis=1)]
    return np.array(kept)
