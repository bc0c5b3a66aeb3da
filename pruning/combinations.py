"""Which way of every layer to choose so that their costs add up to a budget: a knapsack, solved over all of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Sums of costs that are told apart: up to so many the answer is exact, beyond it the least regretted one stands for its
# neighbours.
STATES = 4096
WAYS = 256  # of one layer, the same


@dataclass(frozen=True)
class Ways:
    """The forms that one layer can take."""

    costs: np.ndarray  # [n, kinds], FLOPs and parameters, say
    regrets: np.ndarray  # [n], saliency that goes with each


def least_regretted(layers: Sequence[Ways], low: np.ndarray, high: np.ndarray) -> list[int] | None:
    """One way of each layer, of least summed regret, with every summed cost at most ``high`` and one at least ``low``.

    Dynamic programming over the layers on the sums that are reached (the multiple-choice knapsack, Dudzinski and
    Walukiewicz 1987).  Sums that the layers still to come cannot bring into the window are dropped at once.

    Args:
        low, high: [kinds], of the sum over layers; infinite where a kind is free.

    Returns:
        the index of the way of each layer, None where no sum was found within the window.
    """
    kept = [_thinned(ways.costs, ways.regrets, WAYS) for ways in layers]
    least = np.array([ways.costs.min(axis=0) for ways in layers])
    most = np.array([ways.costs.max(axis=0) for ways in layers])
    sums, regrets = np.zeros((1, len(high))), np.zeros(1)
    steps = []
    for i, (ways, chosen) in enumerate(zip(layers, kept, strict=True)):
        reached = (sums[:, None] + ways.costs[chosen]).reshape(-1, len(high))
        total = (regrets[:, None] + ways.regrets[chosen]).reshape(-1)
        ahead = slice(i + 1, None)
        alive = (reached + least[ahead].sum(axis=0) <= high).all(axis=1)
        alive &= (reached + most[ahead].sum(axis=0) >= low).any(axis=1)
        alive = np.flatnonzero(alive)
        if len(alive) == 0:
            return None
        alive = alive[_thinned(reached[alive], total[alive], STATES)]
        sums, regrets = reached[alive], total[alive]
        steps.append((alive // len(chosen), chosen[alive % len(chosen)]))
    state, found = int(regrets.argmin()), []
    for before, way in reversed(steps):
        found.append(int(way[state]))
        state = before[state]
    return found[::-1]


def _thinned(costs: np.ndarray, regrets: np.ndarray, limit: int) -> np.ndarray:
    """Indices of the least regretted of equal costs or, where more than ``limit`` are left, of neighbouring ones."""
    found = _first_of_each(costs, regrets)
    if len(found) <= limit:
        return found
    costs, regrets = costs[found], regrets[found]
    spans = np.ptp(costs, axis=0)
    bins = int(limit ** (1 / max(1, np.count_nonzero(spans))))
    cells = np.floor((costs - costs.min(axis=0)) / np.where(spans > 0, spans, 1) * (bins - 1))
    return found[_first_of_each(cells, regrets)]


def _first_of_each(keys: np.ndarray, regrets: np.ndarray) -> np.ndarray:
    """Indices of the least regretted of every different row of ``keys``."""
    order = np.lexsort((regrets, *keys.T))
    new = np.ones(len(order), dtype=bool)
    new[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
    return order[new]
