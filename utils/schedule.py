"""Learning-rate schedules as functions of progress, so that a resumed run needs no scheduler state."""

import math
from collections.abc import Sequence

from torch.optim import Optimizer

SCHEDULES = ("cosine", "step")
MILESTONES = (0.5, 0.75)


def scheduled(
    schedule: str, base: float, progress: float, milestones: Sequence[float] = MILESTONES, factor: float = 0.1
) -> float:
    """Learning rate after a share ``progress`` (0 to 1) of the training.

    ``cosine`` falls from ``base`` to 0 along half a cosine; ``step`` multiplies by ``factor`` at each milestone.
    """
    if schedule == "cosine":
        return 0.5 * base * (1 + math.cos(math.pi * progress))
    return base * factor ** sum(progress >= milestone for milestone in milestones)


def set_learning_rate(optimiser: Optimizer, rate: float) -> None:
    """Give every parameter group the rate."""
    for group in optimiser.param_groups:
        group["lr"] = rate
