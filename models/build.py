"""From the description in a checkpoint to a network with fresh weights."""

from typing import Any

from torch import nn

from models.cascade import Cascade, Member
from models.own import OwnNetwork, is_own
from models.resnet import NETWORKS, ResNet

CASCADE = "cascade"


def build_network(network: str, **architecture: Any) -> nn.Module:
    """The network that an architecture describes: the switched ResNet, a cascade, or one of the user's own.

    Args:
        network: "resnet", "cascade", or the function that makes a user's network (``models.own``).
        architecture: arguments of ``ResNet``, ``Cascade`` or ``OwnNetwork``; members of a cascade are architectures
            themselves, with ``mean`` and ``std`` beside.

    Raises:
        ValueError: for an unknown network.
    """
    if network == CASCADE:
        return Cascade([_member(**member) for member in architecture.pop("members")], **architecture)
    if is_own(network):
        return OwnNetwork(network, **architecture)
    if network not in NETWORKS:
        raise ValueError(f"network {network!r} is unknown: use one of {', '.join(NETWORKS)}")
    return ResNet(**architecture)


def _member(mean: list[float], std: list[float], **architecture: Any) -> Member:
    return Member(build_network(**architecture), mean, std)
