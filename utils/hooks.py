"""Hooks on modules, for a while."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from utils.modes import plain_attention


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that were registered, removed at the end.

    Meanwhile PyTorch's fused transformer layers are off: they do not call the layers that they are made of.
    """
    handles = list(handles)
    try:
        with plain_attention():
            yield
    finally:
        for handle in handles:
            handle.remove()


def layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a layer that was called with these arguments: PyTorch's layers call it ``input``."""
    return args[0] if args else kwargs["input"]
