"""The scalars of an epoch, by their TensorBoard tags, and the charts that show them together.

``Overview`` has the main curves of a run: it has to sort before all other groups, see ``utils.runs.tensorboard``.
"""

from training.evaluate import Evaluation
from training.supervised import EpochMeans

EPOCH_CHARTS = {
    "Overview": {
        "accuracy": ["Overview/accuracy_.*"],
        "loss": ["Overview/loss_.*"],
        "executed FLOPs, % of all": ["Overview/computation_percentage", "Policy/setpoint_computation_percentage"],
        "executed and all FLOPs": ["Overview/executed_flops", "Size/flops"],
        "learning rate": ["Overview/learning_rate"],
    },
    "Switches": {
        "share of images for which the block runs": ["Switches/runs_.*"],
        "accuracy with decisions and with every block run": [
            "Overview/accuracy_val",
            "Switches/accuracy_val_every_block",
        ],
    },
}


def epoch_scalars(
    train: EpochMeans,
    val: Evaluation,
    every_block: Evaluation,
    parameters: int,
    prune_ratio: float,
    learning_rate: float,
) -> dict[str, float]:
    """The scalars of one epoch, by their TensorBoard tags.

    Args:
        train: means over the epoch's training.
        val: evaluation with thresholded decisions, on the validation images (see ``Splits.val_name``).
        every_block: the same with every block run.
        parameters: of the network.
        prune_ratio: share of stage 1's parameters that is removed.
    """
    scalars = {
        "Overview/accuracy_train": train.accuracy,
        "Overview/accuracy_val": val.accuracy,
        "Switches/accuracy_val_every_block": every_block.accuracy,
        "Overview/computation_percentage": 100 * val.computation,
        "Overview/executed_flops": val.flops_executed,
        "Overview/learning_rate": learning_rate,
        "Overview/loss_train": train.loss,
        "Overview/loss_val": val.loss,
        "Size/flops": val.flops_all,
        "Size/parameters": parameters,
        "Size/prune_ratio": prune_ratio,
    }
    for switch, share in enumerate(val.run_shares, start=1):
        scalars[f"Switches/runs_{switch:02d}"] = share
    return scalars


def epoch_line(title: str, train: EpochMeans, val: Evaluation, every_block: Evaluation, val_name: str) -> str:
    """The line of an epoch in the log; arguments as in ``epoch_scalars``."""
    return (
        f"{title}  loss {train.loss:.4f}  accuracy {train.accuracy:.2%}  {val_name}: loss {val.loss:.4f}  accuracy "
        f"{val.accuracy:.2%} (every block {every_block.accuracy:.2%})  computation {val.computation:.1%}"
    )
