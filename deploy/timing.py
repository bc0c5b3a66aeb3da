"""Times of competitors, measured in turns in one run, so that disturbances affect all of them."""

import random
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

MOST = 200  # rounds
# Runs item i (an image, or a batch) to its end.
Run = Callable[[int], object]
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Timing:
    """Seconds that a competitor takes for one item: quartiles over the rounds for each item, averaged over items."""

    median: float
    lower_quartile: float
    upper_quartile: float


def alternated(competitors: Mapping[Name, Run], items: int, seconds: float, least: int = 5) -> dict[Name, Timing]:
    """Time every competitor on every item, in turns whose order changes, after a round that is not counted.

    Args:
        items: number of items of each round.
        seconds: about how long all of it may take.
        least: rounds at least, even if they take longer.
    """
    order = list(competitors)
    shuffle = random.Random(0).shuffle
    started = time.perf_counter()
    for item in range(items):
        for name in order:
            competitors[name](item)
    once = time.perf_counter() - started
    rounds = max(least, min(MOST, int(seconds / max(once, 1e-9)) - 1))
    taken = {name: np.empty((rounds, items)) for name in order}
    for round_ in range(rounds):
        for item in range(items):
            shuffle(order)
            for name in order:
                started = time.perf_counter()
                competitors[name](item)
                taken[name][round_, item] = time.perf_counter() - started
    return {name: _summary(taken[name]) for name in competitors}


def _summary(taken: np.ndarray) -> Timing:
    """Median and quartiles of the seconds [rounds, items]."""
    lower, median, upper = np.quantile(taken, (0.25, 0.5, 0.75), axis=0).mean(axis=1).tolist()
    return Timing(median, lower, upper)
