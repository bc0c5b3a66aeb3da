"""What the three training loops share: the optimiser and the figures that are recorded each epoch."""

import math
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from gating.supervised import EpochFigures
from models import LowRankConv2d, ResNet
from utils.checkpoint import Checkpoint
from utils.data import DataSet
from utils.errors import UserError
from utils.evaluate import Evaluation
from utils.flops import NetworkCost


def sgd(network: ResNet, lr: float, momentum: float, weight_decay: float) -> SGD:
    """SGD with Nesterov's momentum (plain SGD where momentum is 0).

    The gates are spared weight decay: it would pull them towards one answer for all images.
    """
    gates, others = split_parameters(network)
    groups = [{"params": others}, {"params": gates, "weight_decay": 0.0}]
    groups = [g for g in groups if g["params"]]
    return SGD(groups, lr, momentum, weight_decay=weight_decay, nesterov=momentum > 0, fused=_on_gpu(network))


def reinforcement_optimisers(network: ResNet, momentum: float, weight_decay: float) -> tuple[SGD, Adam]:
    """SGD for the network and Adam for its gates; their rates are set step by step.

    The gates learn from the policy gradient alone, whose size goes with alpha, rl_weight and a block's small share of
    the FLOPs; Adam's steps do not depend on that size.
    """
    gates, others = split_parameters(network)
    fused = _on_gpu(network)
    optimiser = SGD(others, 0.0, momentum, weight_decay=weight_decay, nesterov=momentum > 0, fused=fused)
    return optimiser, Adam(gates, 0.0, fused=fused)


def _on_gpu(network: ResNet) -> bool | None:
    """``fused`` of an optimiser: one kernel updates all weights on a GPU; on the CPU PyTorch chooses."""
    return next(network.parameters()).is_cuda or None


def restore_optimiser(optimiser: Optimizer, state: dict[str, Any]) -> None:
    """Give the optimiser the state of one that was saved, which may have run on another kind of device."""
    fused = [group["fused"] for group in optimiser.param_groups]
    optimiser.load_state_dict(state)
    for group, own in zip(optimiser.param_groups, fused, strict=True):
        group["fused"] = own


def split_parameters(network: ResNet) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters of the gates and those of the rest."""
    gates = [] if network.gate is None else list(network.gate.parameters())
    own = set(gates)
    return gates, [p for p in network.parameters() if p not in own]


def check_finite(network: ResNet, chosen: Evaluation, title: str) -> None:
    """Refuse to save a network that the last step of an epoch has ruined, which no training loss has shown yet.

    Raises:
        UserError: if its loss or one of its weights is not finite.
    """
    weights = all(torch.isfinite(tensor).all() for tensor in network.state_dict().values())
    if not math.isfinite(chosen.loss) or not weights:
        raise UserError(f"the loss is not finite ({title}): lower the learning rate; what was saved before is kept")


def epoch_scalars(
    train: EpochFigures,
    chosen: Evaluation,
    whole: Evaluation,
    parameters: int,
    prune_ratio: float,
    learning_rate: float,
) -> dict[str, float]:
    """The scalars of one epoch, by their TensorBoard tags.

    Args:
        train: figures of the epoch's training.
        chosen: evaluation with thresholded switches, on the images that choices look at.
        whole: the same with every block run.
        parameters: of the network.
        prune_ratio: share of stage 1's parameters that is gone.
    """
    scalars = {
        "Performance/train_loss": train.loss,
        "Performance/train_acc": train.accuracy,
        "Performance/val_loss": chosen.loss,
        "Performance/val_acc": chosen.accuracy,
        "Performance/val_acc_every_block": whole.accuracy,
        "Indicator/computation_percentage": 100 * chosen.computation,
        "Indicator/total_flops": chosen.flops_all,
        "Indicator/executed_flops": chosen.flops_executed,
        "Indicator/total_parameters": parameters,
        "Indicator/prune_ratio": prune_ratio,
        "Optimiser/learning_rate": learning_rate,
    }
    for switch, share in enumerate(chosen.passing, start=1):
        scalars[f"Switches/passing_{switch:02d}"] = share
    return scalars


def layer_scalars(network: ResNet, cost: NetworkCost) -> dict[str, float]:
    """Parameters and ranks of every convolution of the network, rotations counted with the layer they belong to."""
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


def check_data(checkpoint: Checkpoint, data: DataSet, image_size: int) -> None:
    """Refuse data that a checkpoint's network was not trained on.

    Raises:
        UserError: if the classes or the image size differ.
    """
    if list(data.classes) != checkpoint.classes:
        raise UserError(
            f"the checkpoint was trained on {len(checkpoint.classes)} classes ({', '.join(checkpoint.classes[:3])}, "
            f"...), the data has {len(data.classes)} ({', '.join(data.classes[:3])}, ...): use the same data"
        )
    if image_size != checkpoint.data["image_size"]:
        raise UserError(
            f"the checkpoint was trained on images of {checkpoint.data['image_size']} pixels, not {image_size}: "
            f"change resize"
        )
