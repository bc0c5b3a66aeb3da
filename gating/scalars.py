"""The scalars of an epoch and of a network, by their TensorBoard tags, and the charts that show them together.

``Overview`` is what a run is judged by: it has to sort before all other groups, see ``utils.tensorboard``.
"""

from torch import nn

from gating.reinforce import ReinforceMeans
from gating.steering import Steering
from gating.supervised import EpochMeans
from models import LowRankConv2d, ResNet
from utils.evaluate import Evaluation
from utils.flops import NetworkCost

EPOCH_CHARTS = {
    "Overview": {
        "accuracy": ["Overview/accuracy_.*"],
        "loss": ["Overview/loss_.*"],
        "computation, % of all FLOPs": ["Overview/computation_percentage", "Policy/setpoint_computation_percentage"],
        "executed and all FLOPs": ["Overview/executed_flops", "Size/flops"],
        "learning rate": ["Overview/learning_rate"],
    },
    "Switches": {
        "share of images that each lets pass": ["Switches/passing_.*"],
        "accuracy as they decide and with every block": ["Overview/accuracy_val", "Switches/accuracy_val_every_block"],
    },
}
POLICY_CHARTS = EPOCH_CHARTS | {
    "Overview": EPOCH_CHARTS["Overview"] | {"alpha": ["Overview/alpha"]},
    "Policy": {
        "return": ["Policy/return$"],
        "deviation of the return and of the advantage": ["Policy/.*_deviation"],
        "entropy": ["Policy/entropy"],
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
        val: evaluation with thresholded switches, on the images that choices look at.
        every_block: the same with every block run.
        parameters: of the network.
        prune_ratio: share of stage 1's parameters that is gone.
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
    for switch, share in enumerate(val.passing, start=1):
        scalars[f"Switches/passing_{switch:02d}"] = share
    return scalars


def layer_scalars(network: ResNet, cost: NetworkCost) -> dict[str, float]:
    """Parameters and ranks of every convolution of the network, rotations counted with the layer they belong to.

    For ``metrics.jsonl``: three curves a layer with a point a pruning would bury TensorBoard's others.
    """
    scalars = {}
    for name, module in network.named_modules():
        if isinstance(module, LowRankConv2d):
            core = module.core
        elif isinstance(module, nn.Conv2d) and name in cost.layers and not _inside_low_rank(network, name):
            core = module
        else:
            continue
        scalars[f"Layers/parameters/{name}"] = sum(p.numel() for p in module.parameters())
        scalars[f"Layers/rank_in/{name}"] = core.in_channels
        scalars[f"Layers/rank_out/{name}"] = core.out_channels
    return scalars


def _inside_low_rank(network: ResNet, name: str) -> bool:
    return isinstance(network.get_submodule(name.rpartition(".")[0]), LowRankConv2d)


def epoch_line(title: str, train: EpochMeans, val: Evaluation, every_block: Evaluation, val_name: str) -> str:
    """What the log says of an epoch; arguments as in ``epoch_scalars``."""
    return (
        f"{title}  loss {train.loss:.4f}  accuracy {train.accuracy:.2%}  {val_name}: loss {val.loss:.4f}  accuracy "
        f"{val.accuracy:.2%} (every block {every_block.accuracy:.2%})  computation {val.computation:.1%}"
    )


def policy_scalars(train: EpochMeans, at_half: Evaluation, steering: Steering) -> dict[str, float]:
    """What the policy did in an epoch of stage 3, in a closing one nothing.

    Args:
        at_half: the network at the threshold of one half that it was trained with.
        steering: as the epoch was steered.
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
        trained = f"switches as they are  loss {train.loss:.4f}"
    return (
        f"{title}  {trained}  {val_name}: accuracy {val.accuracy:.2%} (every block {every_block.accuracy:.2%})  "
        f"computation {val.computation:.1%} (threshold 0.5: {at_half.accuracy:.2%} at {at_half.computation:.1%})"
    )
