"""The choice of a form for every layer: the least summed rise of the loss that meets a goal."""

from collections.abc import Sequence

import numpy as np

from pruning.combinations import Ways, least_regretted
from pruning.goals import Goal, as_target, least_of, shortfall
from utils.errors import UserError

# Nats for saving the whole network.  Where forms are predicted to lose the same, as all are where no image has a
# gradient, nothing is saved beyond the goal.
TIE = 1e-9


def choose(
    costs: Sequence[np.ndarray], rises: Sequence[np.ndarray], goal: Goal, fixed: Sequence[int], objective: str
) -> list[int]:
    """The index of each layer's form: of all combinations that reach the targets, the one with the least summed rise.

    Args:
        costs: FLOPs and parameters [n, 2] of the forms of each layer or block, which costs most as it is.
        rises: predicted of the loss, [n] for each.
        goal: targets, or a share, see ``pruning.goals.as_target``.
        fixed: FLOPs and parameters of everything outside of the layers.
        objective: quantity that a share refers to.

    Raises:
        UserError: if the target cannot be reached.
    """
    now = sum((own.max(axis=0) for own in costs), np.asarray(fixed))
    goal = as_target(goal, now, least_of(costs, fixed), objective)
    whole, outside = (np.asarray(pair)[goal.kinds] for pair in (now, fixed))
    used = [own[:, goal.kinds] for own in costs]
    ways = [Ways(u, rise - TIE * (u / whole).mean(axis=1)) for u, rise in zip(used, rises, strict=True)]
    chosen = least_regretted(ways, goal.limits - outside)
    if chosen is None:
        raise UserError(f"{shortfall(goal, costs, fixed)}: raise the target")
    return chosen
