"""One iteration of static pruning: measure, choose, rebuild."""

import math
from dataclasses import replace

import numpy as np
import torch

from models import ResNet
from pruning.changes import Pruned
from pruning.choice import form_costs
from pruning.goals import Goal, shortfall
from pruning.layers import rebuilt_layers
from pruning.prune_channels import channel_groups, prune_channels
from pruning.prune_directions import direction_groups, prune_directions
from pruning.prune_forms import layer_forms, prune_to_forms
from pruning.refit import refit
from pruning.selection import group_costs
from pruning.settings import EIGENBASIS_CRITERIA, Batches, Method
from utils.errors import UserError
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
    """Refuse budgets that ``network`` cannot be brought to, before anything is measured.

    Raises:
        UserError: says what can be reached, and which setting stands in the way.
    """
    cost = network_cost(network, image_size)
    short = shortfall(goal, *_reachable(network, cost, method))
    if short is None:
        return
    freed = {
        ("round_to",): replace(method, round_to=1),
        ("prune_ratio_limit",): replace(method, prune_ratio_limit=math.nextafter(1, 0)),
        ("round_to", "prune_ratio_limit"): replace(method, round_to=1, prune_ratio_limit=math.nextafter(1, 0)),
    }
    remedies = {"round_to": "lower round_to", "prune_ratio_limit": "raise prune_ratio_limit"}
    for names, freer in freed.items():
        if shortfall(goal, *_reachable(network, cost, freer)) is None:
            by = " and ".join(f"{name} {getattr(method, name):g}" for name in names)
            short = shortfall(goal, *_reachable(network, cost, method), by)
            raise UserError(f"{short}: raise the target, or {' and '.join(remedies[name] for name in names)}")
    raise UserError(f"{short}, whatever round_to and prune_ratio_limit are: raise the target")


def _reachable(network: ResNet, cost: NetworkCost, method: Method) -> tuple[list[np.ndarray], tuple[int, int]]:
    """FLOPs and parameters of every form of each layer or block, [n, 2], and of everything outside of them."""
    if method.forms_compete:
        forms, fixed = layer_forms(network, cost, method)
        return [form_costs(own) for own in forms.values()], fixed
    grouped = direction_groups if method.criterion in EIGENBASIS_CRITERIA else channel_groups
    groups, fixed = grouped(network, cost, method, saliencies=None)
    return group_costs(groups), fixed
