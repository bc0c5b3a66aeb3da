"""One iteration of static pruning: measure, choose, rebuild."""

from dataclasses import replace

import torch

from models import ResNet
from pruning.changes import Pruned
from pruning.layers import rebuilt_layers
from pruning.prune_channels import channel_groups, prune_channels
from pruning.prune_depthwise import prune_to_depthwise, separable_groups
from pruning.prune_directions import direction_groups, prune_directions
from pruning.refit import refit
from pruning.selection import Goal, check_reachable, smallest_cost
from pruning.settings import EIGENBASIS_CRITERIA, Batches, Method
from utils.flops import NetworkCost, network_cost


def prune_once(
    network: ResNet, batches: Batches, draws: torch.Generator, *, cost: NetworkCost, goal: Goal, method: Method
) -> Pruned:
    """Prune every layer, or the channels inside of every block, once and rebuild the network.

    Args:
        batches: called for each pass over the images that the Fisher is measured on.
        draws: generator of the labels of the "true" Fisher, on the network's device.
        cost: of the network.
        goal: where to stop.

    Raises:
        UserError: for a budget out of reach, or a criterion that the network does not suit.
    """
    prune, _ = _family(method)
    pruned = prune(network, batches, draws, cost, goal, method)
    if method.refit and not pruned.nothing_changed:
        refit(network, pruned.network, rebuilt_layers(pruned.network), batches)
    return pruned


def check_goal(network: ResNet, image_size: int, goal: Goal, method: Method) -> None:
    """Refuse a budget that ``network`` cannot be brought to, before anything is measured.

    Raises:
        UserError: says what the smallest network would cost.
    """
    cost = network_cost(network, image_size)
    _, grouped = _family(method)
    groups, fixed = grouped(network, cost, replace(method, seconds=None), saliencies=None)
    check_reachable(goal, smallest_cost(groups, fixed, method.round_to))


def _family(method: Method):
    """What prunes a network by this method, and what tells which of its parts compete."""
    if method.criterion not in EIGENBASIS_CRITERIA:
        return prune_channels, channel_groups
    if method.decomposition == "depthwise":
        return prune_to_depthwise, separable_groups
    return prune_directions, direction_groups
