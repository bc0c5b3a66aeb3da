"""What ``compress`` cannot work on, each refused in one sentence before anything is measured."""

import numbers

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from pruning.survey import outermost
from utils.errors import UserError


def check_network(network: nn.Module) -> None:
    """Refuse networks that cannot be compressed as they are.

    Raises:
        UserError: says why, and what to give instead.
    """
    modules = [*network.modules()]
    if any(isinstance(m, torch.jit.ScriptModule) for m in modules):
        raise UserError(
            "the network, or a part of it, was compiled by TorchScript, which hides its layers: give the original "
            "module"
        )
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in modules):
        # It would be compiled again for every hook.
        raise UserError(
            "the network, or a part of it, was compiled by torch.compile: give the original network, or "
            "network._orig_mod, and compile the result"
        )
    parameters = [*network.parameters()]
    if not parameters:
        raise UserError("the network has no parameters: give one that is not quantised")
    if any(is_lazy(p) for p in parameters):
        raise UserError("the network has lazy layers without weights: run it on a batch first, and load its weights")
    if any(layer is network for _, layer in outermost(network)):
        raise UserError("the network is a single layer, which has no place for its parts: give nn.Sequential(layer)")
    if "report" in network._modules or "report" in network._parameters or "report" in network._buffers:
        raise UserError("the network has a part called report, where its copy keeps the table: rename that part")


def check_ratio(prune_ratio: float | None) -> None:
    """Refuse what is no share.

    Raises:
        UserError: says what to give.
    """
    if prune_ratio is not None and not (isinstance(prune_ratio, numbers.Real) and 0 <= prune_ratio < 1):
        raise UserError(f"prune_ratio is {prune_ratio!r}: give a share from 0 on and below 1, such as 0.3")


def check_target(name: str, target: float | None) -> None:
    """Refuse what is neither a share nor a count.

    Raises:
        UserError: says what to give.
    """
    if target is not None and not (isinstance(target, numbers.Real) and (0 < target <= 1 or target > 100)):
        raise UserError(f"{name} is {target!r}: give a share above 0 and up to 1, such as 0.5, or a number above 100")
