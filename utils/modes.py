"""Temporary states: hooks on modules, evaluation mode, frozen parameters; and copies."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
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
def gradients_for(parameters: Iterable[Tensor], wanted: bool) -> Iterator[None]:
    """Whether these parameters have gradients; afterwards each has one if it had one before."""
    changed = [p for p in parameters if p.requires_grad != wanted]
    try:
        for parameter in changed:
            parameter.requires_grad_(wanted)
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(not wanted)


def frozen(network: nn.Module) -> AbstractContextManager[None]:
    """No parameter has a gradient."""
    return gradients_for(network.parameters(), wanted=False)


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
