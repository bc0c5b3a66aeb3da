"""Optimisers, and learning-rate schedules as functions of progress, so that a resumed run needs no scheduler state."""

import math
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import SGD, Adam, Optimizer

from models import ResNet
from training.muon import Muon, filter_group


def sgd(network: ResNet, lr: float, momentum: float, weight_decay: float) -> SGD:
    """SGD with Nesterov's momentum (plain SGD where momentum is 0).

    The gates have no weight decay: it would pull them towards the same decision for all images.
    """
    gates, others = split_parameters(network)
    groups = [{"params": others}, {"params": gates, "weight_decay": 0.0}]
    return SGD(_filled(groups), lr, momentum, weight_decay=weight_decay, nesterov=momentum > 0)


def muon(network: ResNet, lr: float, momentum: float, weight_decay: float) -> Muon:
    """Orthogonal steps for the filters, and ``sgd`` for everything else."""
    gates, others = split_parameters(network)
    groups = [
        filter_group([p for p in others if p.dim() == 4]),
        {"params": [p for p in others if p.dim() != 4]},
        {"params": gates, "weight_decay": 0.0},
    ]
    return Muon(_filled(groups), lr, momentum, weight_decay=weight_decay, nesterov=momentum > 0)


def _filled(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the group of the gates where there are none."""
    return [group for group in groups if group["params"]]


def reinforcement_optimisers(network: ResNet, momentum: float, weight_decay: float) -> tuple[SGD, Adam]:
    """SGD for the network and Adam for its gates; their rates are set step by step.

    The gates learn from the policy gradient alone, which is proportional to alpha, rl_weight and a block's small share
    of the FLOPs; Adam's steps do not depend on its size.
    """
    gates, others = split_parameters(network)
    return SGD(others, 0.0, momentum, weight_decay=weight_decay, nesterov=momentum > 0), Adam(gates, 0.0)


OPTIMISERS = {"muon": muon, "sgd": sgd}  # of stage 1


def split_parameters(network: ResNet) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters of the gates and those of the rest."""
    gates = [] if network.gate is None else list(network.gate.parameters())
    of_gates = set(gates)
    return gates, [p for p in network.parameters() if p not in of_gates]


def scheduled(schedule: str, base: float, progress: float) -> float:
    """Learning rate after a share ``progress`` (0 to 1) of the training.

    ``cosine`` falls from ``base`` to 0 along half a cosine; ``step`` multiplies by 0.1 at 50% and at 75%.
    """
    if schedule == "cosine":
        return 0.5 * base * (1 + math.cos(math.pi * progress))
    return base * 0.1 ** sum(progress >= milestone for milestone in (0.5, 0.75))


def rates_of_epoch(epoch: int, epochs: int, base: float, schedule: str) -> Callable[[float], float]:
    """The learning rate in an epoch, counted from 1, as a function of the share of it that is done.

    Args:
        base: learning rate at the start of the first epoch.
        schedule: see ``scheduled``.
    """
    return lambda share: scheduled(schedule, base, (epoch - 1 + share) / epochs)


def set_learning_rate(optimiser: Optimizer, rate: float) -> None:
    """Give every parameter group the rate."""
    for group in optimiser.param_groups:
        group["lr"] = rate
