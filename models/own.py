"""Networks of one's own: made by a function of a Python file or of an installed module."""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.decisions import DecisionRule, thresholded
from models.resnet import RoutedOutput


def own_network(source: str) -> nn.Module:
    """Call the function that ``source`` names: "path/to/file.py:function" or "package.module:function".

    Raises:
        ValueError: in one sentence, for a file, a function or a network that is not there.
    """
    function = _function(source)
    try:
        network = function()
    except Exception as error:
        raise ValueError(
            f"{source} raised {type(error).__name__} ({error}): it has to return a network without being given anything"
        ) from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"{source} returned {type(network).__name__}: it has to return a torch.nn.Module")
    return network


def _function(source: str) -> Callable[[], Any]:
    place, colon, name = source.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise ValueError(
            f"network {source!r} names no function: write path/to/file.py:function or package.module:function"
        )
    try:
        module = _module(place)
    except Exception as error:
        raise ValueError(f"{place} cannot be imported ({type(error).__name__}: {error}): mend it there") from error
    function = getattr(module, name, None)
    if not callable(function):
        found = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{place} has no function {name}: it has {', '.join(found[:8]) or 'none'}")
    return function


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no such file in {Path.cwd()}" if not path.is_absolute() else "no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def picked_logits(output: Any) -> Tensor:
    """The scores [N, classes] in what a network returned: the tensor itself, or its attribute ``logits``.

    Raises:
        ValueError: where there is neither.
    """
    logits = getattr(output, "logits", output)
    if isinstance(output, dict):
        logits = output.get("logits")
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ValueError(f"the network returned {_described(output)}: it has to return scores [images, classes]")
    return logits


def _described(output: Any) -> str:
    return f"a tensor of shape {list(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"


class OwnNetwork(nn.Module):
    """A network of one's own, called as the switched ResNet is: without switches, every block runs.

    Args:
        source: names the function that makes it, see ``own_network``.
        num_classes: that it tells apart.
    """

    switches = 0
    gate = None

    def __init__(self, source: str, num_classes: int):
        super().__init__()
        self.architecture = {"network": source, "num_classes": num_classes}
        self.network = own_network(source)

    def forward(self, images: Tensor, decide: DecisionRule = thresholded, skip: bool | None = None) -> RoutedOutput:
        """[N, 3, H, W] -> logits [N, classes]; there is nothing to decide."""
        logits = picked_logits(self.network(images))
        none = torch.empty(len(images), 0, device=logits.device)
        return RoutedOutput(logits, none, none)
