"""What ``compress`` cannot work on, each refused in one sentence before anything is measured."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from models.edits import low_rank_layers
from pruning.capture import Forward
from pruning.changes import Report
from pruning.survey import outermost
from utils.errors import UserError
from utils.flops import NetworkCost
from utils.modes import copied, evaluation_mode

RUNS = 16  # of a network whose copy computes something else, to tell those that draw at random


def check_network(network: nn.Module) -> None:
    """Refuse networks that cannot be compressed as they are.

    Raises:
        UserError: says why, and what to give instead.
    """
    if not isinstance(network, nn.Module):
        raise UserError(f"the network is a {type(network).__name__}: give a torch.nn.Module")
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
    if not any(True for _ in network.parameters()):
        raise UserError("the network has no parameters: give one that is not quantised")
    if not isinstance(getattr(network, "report", None), Report | None):
        raise UserError("the network has an attribute report, where compress leaves its own: give it another name")
    if any(layer is network for _, layer in outermost(network)):
        raise UserError("the network is a single layer, which has no place for its parts: give nn.Sequential(layer)")


def check_targets(flops: float | None, parameters: float | None, prune_ratio: float | None) -> None:
    """Refuse no target, two kinds of them, and what is neither a share nor a count.

    Raises:
        UserError: says what to give.
    """
    if flops is None and parameters is None and prune_ratio is None:
        raise UserError("compress has no target: give flops= or parameters=, for example flops=0.5 for half")
    if prune_ratio is not None and (flops is not None or parameters is not None):
        raise UserError("prune_ratio stands instead of a target, but flops or parameters is given, too: leave one out")
    if prune_ratio is not None and not 0 <= prune_ratio < 1:
        raise UserError(f"prune_ratio is {prune_ratio!r}: give a share from 0 on and below 1, such as 0.3")
    for name, target in (("flops", flops), ("parameters", parameters)):
        if target is not None and not (0 < target <= 1 or target > 100):
            raise UserError(
                f"{name} is {target!r}: give a share above 0 and up to 1, such as 0.5, or a number above 100"
            )


def check_used(network: nn.Module, cost: NetworkCost) -> None:
    """Refuse a network that goes on calling a layer that was replaced.

    Raises:
        UserError: names the layer.
    """
    old = [name for name in low_rank_layers(network) if f"{name}.core" not in cost.layers]
    if old:
        raise UserError(
            f"the network does not call layer {', '.join(old)} after it was replaced, because a function or a tuple "
            f"holds the old one, or a new one is no nn.Conv2d: leave it as it is with ignored_layers={old}"
        )


@torch.no_grad()
def check_copy(network: nn.Module, x: Tensor, forward: Forward) -> None:
    """Refuse a network that cannot be copied, or of which a copy computes something else.

    Raises:
        UserError: if one does, though the network itself computes the same again and again.
    """
    with evaluation_mode(network):
        first = tree_leaves(forward(network, x.clone()))
        forward(network, x.flip(0))  # so that features that it has kept, and the copy with it, are of other images
    try:
        copy = copied(network)
        with evaluation_mode(copy):
            found = tree_leaves(forward(copy, x.clone()))
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"a copy of the network cannot be made or run ({reason}): leave out what prevents this, such as a lock"
        ) from error
    if all(map(_near, first, found)):
        return
    with evaluation_mode(network):  # does it compute the same whenever it runs?
        runs = [tree_leaves(forward(network, x.clone())) for _ in range(RUNS)]
    if all(all(map(_near, first, other)) for other in runs):
        raise UserError(
            "a copy of the network does not compute the same: leave out what prevents this, such as a hook with a "
            "function that holds the network that it was made for"
        )


def _near(one: Any, other: Any) -> bool:
    return not isinstance(one, Tensor) or torch.allclose(one, other, equal_nan=True)
