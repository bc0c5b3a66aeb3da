"""The scalars of stage 3's epochs by their TensorBoard tags, and the charts that show them together."""

from gating.reinforce import ReinforceMeans
from gating.steering import Steering
from training.evaluate import Evaluation
from training.scalars import EPOCH_CHARTS
from training.supervised import EpochMeans

POLICY_CHARTS = EPOCH_CHARTS | {
    "Overview": EPOCH_CHARTS["Overview"] | {"alpha": ["Overview/alpha"]},
    "Policy": {
        "return": ["Policy/return$"],
        "deviation of the return and of the advantage": ["Policy/.*_deviation"],
        "entropy": ["Policy/entropy"],
    },
}


def policy_scalars(train: EpochMeans, at_half: Evaluation, steering: Steering) -> dict[str, float]:
    """Scalars of the policy in an epoch of stage 3; none in a closing epoch.

    Args:
        at_half: evaluation at the threshold of one half, as in training.
        steering: of the epoch.
    """
    scalars = {"Policy/accuracy": at_half.accuracy, "Policy/computation_percentage": 100 * at_half.computation}
    if not isinstance(train, ReinforceMeans):
        return scalars
    scalars |= {
        "Overview/alpha": train.alpha,
        "Policy/return": train.total_return,
        "Policy/return_deviation": train.return_deviation,
        "Policy/advantage_deviation": train.advantage_deviation,
        "Policy/entropy": train.entropy,
        "Policy/sampled_share_of_skippable_flops": train.executed,
    }
    if not steering.fixed:
        scalars["Policy/setpoint_computation_percentage"] = 100 * steering.setpoint
    return scalars


def policy_line(
    title: str, train: EpochMeans, val: Evaluation, every_block: Evaluation, at_half: Evaluation, val_name: str
) -> str:
    """What the log says of an epoch of stage 3; arguments as in ``epoch_scalars`` and ``policy_scalars``."""
    if isinstance(train, ReinforceMeans):
        trained = (
            f"alpha {train.alpha:.3g}  loss {train.loss:.4f}  return {train.total_return:.4f}  entropy "
            f"{train.entropy:.3f}"
        )
    else:
        trained = f"gates frozen  loss {train.loss:.4f}"
    return (
        f"{title}  {trained}  {val_name}: accuracy {val.accuracy:.2%} (every block {every_block.accuracy:.2%})  "
        f"computation {val.computation:.1%} (threshold 0.5: {at_half.accuracy:.2%} at {at_half.computation:.1%})"
    )
