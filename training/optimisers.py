"""Optimisers, and learning-rate schedules as functions of progress, so that a resumed run needs no scheduler state."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import nn
from torch.optim import SGD, Adam, Optimizer

from models import ResNet
from training.muon import Muon, filter_group

MILESTONES = (0.5, 0.75)

AnyOptimiser = TypeVar("AnyOptimiser", bound=Optimizer)


def sgd(network: ResNet, lr: float, momentum: float, weight_decay: float) -> SGD:
    """SGD with Nesterov's momentum (plain SGD where momentum is 0).

    The gates have no weight decay: it would pull them towards the same decision for all images.
    """
    gates, others = split_parameters(network)
    groups = [{"params": others}, {"params": gates, "weight_decay": 0.0}]
    groups = [g for g in groups if g["params"]]
    nesterov = momentum > 0
    return _portable(SGD(groups, lr, momentum, weight_decay=weight_decay, nesterov=nesterov, fused=_on_gpu(network)))


def muon(network: ResNet, lr: float, momentum: float, weight_decay: float) -> Muon:
    """Orthogonal steps for the filters, and ``sgd`` for everything else."""
    gates, others = split_parameters(network)
    groups = [
        filter_group([p for p in others if p.dim() == 4]),
        {"params": [p for p in others if p.dim() != 4]},
        {"params": gates, "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    nesterov = momentum > 0
    return _portable(Muon(groups, lr, momentum, weight_decay=weight_decay, nesterov=nesterov, fused=_on_gpu(network)))


def reinforcement_optimisers(network: ResNet, momentum: float, weight_decay: float) -> tuple[SGD, Adam]:
    """SGD for the network and Adam for its gates; their rates are set step by step.

    The gates learn from the policy gradient alone, which is proportional to alpha, rl_weight and a block's small share
    of the FLOPs; Adam's steps do not depend on its size.
    """
    gates, others = split_parameters(network)
    fused = _on_gpu(network)
    optimiser = SGD(others, 0.0, momentum, weight_decay=weight_decay, nesterov=momentum > 0, fused=fused)
    return _portable(optimiser), _portable(Adam(gates, 0.0, fused=fused))


OPTIMISERS = {"muon": muon, "sgd": sgd}  # of stage 1


def _on_gpu(network: ResNet) -> bool | None:
    """``fused`` of an optimiser: one kernel updates all weights on a GPU; on the CPU PyTorch chooses."""
    return next(network.parameters()).is_cuda or None


def _portable(optimiser: AnyOptimiser) -> AnyOptimiser:
    """The optimiser, able to load the state of one that ran on another kind of device.

    ``fused`` decides where Adam's counts of steps have to be, so it is set before the state is loaded.
    """

    def keep_fused(optimiser: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        groups = zip(state["param_groups"], optimiser.param_groups, strict=True)
        return {**state, "param_groups": [{**saved, "fused": group["fused"]} for saved, group in groups]}

    optimiser.register_load_state_dict_pre_hook(keep_fused)
    return optimiser


def split_parameters(network: ResNet) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters of the gates and those of the rest."""
    gates = [] if network.gate is None else list(network.gate.parameters())
    of_gates = set(gates)
    return gates, [p for p in network.parameters() if p not in of_gates]


def scheduled(
    schedule: str, base: float, progress: float, milestones: Sequence[float] = MILESTONES, factor: float = 0.1
) -> float:
    """Learning rate after a share ``progress`` (0 to 1) of the training.

    ``cosine`` falls from ``base`` to 0 along half a cosine; ``step`` multiplies by ``factor`` at each milestone.
    """
    if schedule == "cosine":
        return 0.5 * base * (1 + math.cos(math.pi * progress))
    return base * factor ** sum(progress >= milestone for milestone in milestones)


def rates_of_epoch(epoch: int, epochs: int, base: float, **schedule: Any) -> Callable[[float], float]:
    """The learning rate in an epoch, counted from 1, as a function of the share of it that is done.

    Args:
        base: learning rate at the start of the first epoch.
        schedule: further arguments of ``scheduled``.
    """
    return lambda share: scheduled(base=base, progress=(epoch - 1 + share) / epochs, **schedule)


def set_learning_rate(optimiser: Optimizer, rate: float) -> None:
    """Give every parameter group the rate."""
    for group in optimiser.param_groups:
        group["lr"] = rate
