"""The choice of a form for every layer: the least summed rise of the loss that meets a goal."""

from collections.abc import Mapping, Sequence

import numpy as np

from pruning.combinations import Ways, least_regretted
from pruning.forms import Form
from pruning.goals import Goal, as_target, least_of, shortfall
from utils.errors import UserError

# Nats for saving the whole network.  Where forms are predicted to lose the same, as all are where no image has a
# gradient, nothing is saved beyond the goal.
TIE = 1e-9


def choose_forms(
    forms: Mapping[str, Sequence[Form]],
    rises: Mapping[str, Sequence[float]],
    goal: Goal,
    fixed: tuple[int, int],
    objective: str,
) -> dict[str, int]:
    """The index of each layer's form: of all combinations that reach the targets, the one with the least summed rise.

    Args:
        forms: by layer, the present one first.
        rises: predicted of the loss, one for each form.
        goal: targets, or a share, see ``pruning.goals.as_target``.
        fixed: FLOPs and parameters of everything outside of the layers.
        objective: quantity that a share refers to.

    Raises:
        UserError: if the target cannot be reached.
    """
    costs = [form_costs(own) for own in forms.values()]
    now = sum((own[0] for own in costs), np.asarray(fixed))
    goal = as_target(goal, now, least_of(costs, fixed), objective)
    ways = []
    for name, own in zip(forms, costs, strict=True):
        saved = ((own[0] - own)[:, goal.kinds] / now[goal.kinds]).mean(axis=1)
        ways.append(Ways(own[:, goal.kinds], np.asarray(rises[name]) + TIE * saved))
    chosen = least_regretted(ways, goal.limits - np.asarray(fixed)[goal.kinds])
    if chosen is None:
        raise UserError(f"{shortfall(goal, costs, fixed)}: raise the target")
    return dict(zip(forms, chosen, strict=True))


def form_costs(forms: Sequence[Form]) -> np.ndarray:
    """FLOPs and parameters of each form, [n, 2]."""
    return np.array([(form.flops, form.parameters) for form in forms])
