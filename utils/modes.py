"""Training and evaluation mode, module by module."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def mode_kept(network: nn.Module, training: bool) -> Iterator[None]:
    """The network in training or evaluation mode; afterwards every module is in the mode it was in."""
    modes = {module: module.training for module in network.modules()}
    network.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
