"""One iteration of static pruning: measure, choose, rebuild."""

from dataclasses import replace

import torch

from models import ResNet
from pruning.changes import Pruned
from pruning.choice import smallest
from pruning.layers import rebuilt_layers
from pruning.prune_channels import channel_groups, prune_channels
from pruning.prune_directions import direction_groups, prune_directions
from pruning.prune_forms import layer_forms, prune_to_forms
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
    if method.forms_compete:
        prune = prune_to_forms
    else:
        prune = prune_directions if method.criterion in EIGENBASIS_CRITERIA else prune_channels
    pruned = prune(network, batches, draws, cost, goal, method)
    if method.refit and not pruned.nothing_changed:
        refit(network, pruned.network, rebuilt_layers(pruned.network), batches)
    return pruned


def check_goal(network: ResNet, image_size: int, goal: Goal, method: Method) -> None:
    """Refuse a budget that ``network`` cannot be brought to, before anything is measured.

    Raises:
        UserError: says what the smallest network would cost.
    """
    cost, untimed = network_cost(network, image_size), replace(method, seconds=None)
    if method.forms_compete:
        least = smallest(*layer_forms(network, cost, untimed))
    else:
        grouped = direction_groups if method.criterion in EIGENBASIS_CRITERIA else channel_groups
        least = smallest_cost(*grouped(network, cost, untimed, saliencies=None), method.round_to)
    check_reachable(goal, least)
