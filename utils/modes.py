"""Temporary states: hooks on modules, evaluation mode, frozen parameters; and copies."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """The network in evaluation mode; afterwards every module is in the mode it was in."""
    modes = {module: module.training for module in network.modules()}
    try:
        network.eval()
        yield
    finally:
        with suppress(NotImplementedError):  # of programs from torch.export, which have one mode
            network.train(modes[network])  # some networks then drop what they have cached for evaluation
        for module, mode in modes.items():
            module.training = mode


def copied(network: nn.Module) -> nn.Module:
    """A deep copy; features that the network has kept, as for Grad-CAM, are copied without their graph."""
    kept = (t for module in network.modules() for t in tree_leaves(vars(module)) if isinstance(t, Tensor))
    return copy.deepcopy(network, {id(t): t.detach().clone() for t in kept if not t.is_leaf})


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """No parameter has a gradient; afterwards those have one again that had one before."""
    trainable = [p for p in network.parameters() if p.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def trainable(parameters: Iterable[Tensor]) -> Iterator[None]:
    """These parameters have gradients; afterwards only those that had them before."""
    without = [p for p in parameters if not p.requires_grad]
    try:
        for parameter in without:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in without:
            parameter.requires_grad_(False)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Transformer layers run operator by operator, not fused."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that were registered, removed at the end.

    Meanwhile PyTorch's fused transformer layers are off: they do not call the layers that they are made of.
    """
    with plain_attention(), ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield


def layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a layer that was called with these arguments: PyTorch's layers call it ``input``."""
    return args[0] if args else kwargs["input"]
