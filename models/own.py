"""Networks of users: made by a function of a Python file or of an installed module.

A checkpoint names the function, and calling it runs code.  So it is called only if ``allow`` has named it in this
process: loading somebody else's checkpoint runs no code.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from models.decisions import DecisionRule, thresholded
from models.edits import Edit, apply_edits, edits_of
from models.resnet import RoutedOutput
from models.user_code import user_module

_allowed: list[str] = []


def is_own(network: str) -> bool:
    """Whether the name of a network is that of a function: "path/to/file.py:function" or "package.module:function"."""
    return ":" in network


def allow(source: str) -> None:
    """Let this process call the function that ``source`` names, in checkpoints that name it by another path, too."""
    _allowed.append(source)


def own_network(source: str) -> nn.Module:
    """Call the function that ``source`` names.

    Raises:
        PermissionError: in one sentence, if the function was not allowed.
        ValueError: in one sentence, if file, function or network are missing.
    """
    known = [allowed for allowed in _allowed if _tail(allowed) == _tail(source)]
    if not known:
        raise PermissionError(
            f"loading the checkpoint would run the function {source}: add --network {source} to allow this"
        )
    source = source if source in known else known[-1]
    place, colon, name = source.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise ValueError(
            f"network {source!r} names no function: write path/to/file.py:function or package.module:function"
        )
    with ExitStack() as stack:
        try:
            module = stack.enter_context(user_module(place))
        except Exception as error:
            raise ValueError(
                f"{place} cannot be imported ({type(error).__name__}: {error}): correct it there"
            ) from error
        function = _function(module, place, name)
        try:
            network = function()
        except Exception as error:
            raise ValueError(
                f"{source} raised {type(error).__name__} ({error}): it must return a network when called without "
                f"arguments"
            ) from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"{source} returned {type(network).__name__}: it has to return a torch.nn.Module")
    return network


def _tail(source: str) -> tuple[str, str]:
    """The names of the file or module and of the function, without folders."""
    place, _, name = source.rpartition(":")
    return Path(place).name, name


def _function(module: ModuleType, place: str, name: str) -> Callable[[], Any]:
    function = getattr(module, name, None)
    if not callable(function):
        found = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{place} has no function {name}: it has {', '.join(found[:8]) or 'none'}")
    return function


def picked_logits(output: Any) -> Tensor:
    """The scores [N, classes] in what a network returned: the tensor itself, or its attribute ``logits``.

    Raises:
        ValueError: where there is neither.
    """
    logits = getattr(output, "logits", output)
    if isinstance(output, dict):
        logits = output.get("logits")
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ValueError(f"the network returned {kind_of(output)}: it has to return scores [images, classes]")
    return logits


def kind_of(output: Any) -> str:
    """What an output is, for messages."""
    return f"a tensor of shape {list(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"


class OwnNetwork(nn.Module):
    """A user's network, called as the switched ResNet is: without switches, every block runs.

    Args:
        source: names the function that makes it, see ``own_network``.
        num_classes: number of classes.
        edits: of the layers that static pruning has replaced, see ``models.edits.apply_edits``.

    Raises:
        ValueError: for a function or a layer that is not there.
    """

    switches, gate, fixed_switches = 0, None, MappingProxyType({})

    def __init__(self, source: str, num_classes: int, edits: Sequence[Edit] = ()):
        super().__init__()
        self.source, self.num_classes = source, num_classes
        self.network = apply_edits(own_network(source).float(), edits)

    @property
    def architecture(self) -> dict[str, Any]:
        """Arguments of ``models.build.build_network``."""
        return {"network": self.source, "num_classes": self.num_classes, "edits": edits_of(self.network)}

    def forward(self, images: Tensor, decide: DecisionRule = thresholded, skip: bool | None = None) -> RoutedOutput:
        """[N, 3, H, W] -> logits [N, classes]; there is nothing to decide."""
        logits = picked_logits(self.network(images))
        none = torch.empty(len(images), 0, device=logits.device)
        return RoutedOutput(logits, none, none)
