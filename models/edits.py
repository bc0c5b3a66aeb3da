"""The edits that static pruning makes to a network, as plain data: a checkpoint holds them."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from models.convolution import is_pointwise
from models.lowrank import LOW_RANK, low_rank, replace_layer

# The forms that a layer can take.
TUCKER, DEPTHWISE, TWO_FACTORS = "tucker", "depthwise", "two_factors"
ANOTHER = "use the network that was pruned"

Edit = Mapping[str, Any]


def low_rank_layers(network: nn.Module) -> dict[str, nn.Module]:
    """The layers that pruning has rebuilt, by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, LOW_RANK)}


def edits_of(network: nn.Module) -> list[dict[str, Any]]:
    """The forms of the layers that pruning has changed: one dictionary per layer, see ``apply_edits``."""
    return [
        {"name": name, "form": _form(layer), "ranks": layer.ranks, "bias": layer.bias is not None}
        for name, layer in low_rank_layers(network).items()
    ]


def _form(layer: nn.Module) -> str:
    if layer.depthwise:
        return DEPTHWISE
    return TWO_FACTORS if is_pointwise(layer) else TUCKER


def apply_edits(network: nn.Module, edits: Sequence[Edit]) -> nn.Module:
    """Give the layers of a new network, in place, the forms that another one has; its weights can then be loaded.

    Args:
        edits: of ``edits_of``: the name of a layer, its form ("tucker", "depthwise" or "two_factors"), the ranks before
            and behind its core (None where there is no rotation), and whether it has a bias.

    Raises:
        ValueError: if the network lacks a layer, or the layer cannot have this form.
    """
    layers = dict(network.named_modules())
    for edit in edits:
        name, form = edit["name"], edit["form"]
        if form not in (TUCKER, DEPTHWISE, TWO_FACTORS):
            raise ValueError(f"the edits give the layer {name!r} the form {form!r}, which is unknown: {ANOTHER}")
        old = layers.get(name)
        if not isinstance(old, (nn.Conv2d, nn.Linear, *LOW_RANK)):
            raise ValueError(f"the edits name the layer {name!r}, which is no convolution or linear layer: {ANOTHER}")
        try:
            new = low_rank(old, edit["ranks"], form == DEPTHWISE, edit["bias"])
        except ValueError as error:
            raise ValueError(f"the edits do not fit the layer {name!r} ({error}): {ANOTHER}") from error
        replace_layer(network, old, new)
    return network
