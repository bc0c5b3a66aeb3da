"""Static pruning of any network: measure, choose, rebuild, refit."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pruning.capture import Batches, Forward, LossFn, Passes, check_ran, images_of
from pruning.changes import Pruned, Report
from pruning.checks import check_copy, check_network, check_targets, check_used
from pruning.forms import form_costs
from pruning.goals import Goal, as_count, as_target, check_near, nearest, outside, shortfall
from pruning.layers import rebuilt_layers
from pruning.prune_channels import channel_groups, prune_channels
from pruning.prune_directions import direction_groups, prune_directions
from pruning.prune_forms import layer_forms, prune_to_forms
from pruning.refit import BATCHES, IMAGES, refit
from pruning.selection import group_costs
from pruning.settings import Method
from pruning.survey import Survey, survey
from training.norms import reestimate_batch_norms
from utils import parallel
from utils.errors import UserError
from utils.flops import NetworkCost, cost_on, network_cost
from utils.settings import checked_settings
from utils.sizes import Size, height_width

OWN_KEYWORDS = {"say": None, "seed": 0, "prune_ratio": None}  # of ``compress``, beside those of ``Method``


@parallel.alone()
def compress(
    network: nn.Module,
    batches: Batches | Iterable[tuple[Tensor, Any]],
    *,
    flops: float | None = None,
    parameters: float | None = None,
    loss_fn: LossFn | None = None,
    logits: Callable[[Any], Tensor] | None = None,
    **settings: Any,
) -> nn.Module:
    """A smaller copy of ``network``: layers in cheaper forms, chosen by the predicted rise of the loss.

    ``batches`` is a data loader, or a function that is called for each pass over the images and returns (inputs,
    labels) batch by batch; of more than ``fisher_images``, 3,000, only as many are used.  The network is measured in
    evaluation mode and left as it was; its copy is in its mode, ready for fine-tuning as it was trained.
    ``smaller.report`` holds what was done: printed, a table; ``pruning.edits_of`` with ``state_dict`` is what to save.

    Args:
        flops, parameters: target: a share up to 1, or a number above 100.  If the layers do not allow it, the nearest
            possible one, unless that is near nothing.
        loss_fn: from outputs and labels to each image's loss [N], for tasks that are not classification.
        logits: picks the scores [N, classes] from what the network returns.
        settings: fields of ``pruning.settings.Method``; ``seed`` of the random gradients; ``say``, called with lines of
            progress; ``prune_ratio``, instead of a target the share that goes: of the FLOPs or, with other values of
            ``objective``, of the parameters or of all directions.

    Raises:
        UserError: if the network does not return scores, without a target, or for batches of anything else.
    """
    say, seed, prune_ratio = (settings.pop(key, default) for key, default in OWN_KEYWORDS.items())
    method = checked_settings(Method, settings)
    check_network(network)
    check_targets(flops, parameters, prune_ratio)
    if not callable(batches):
        loader, batches = batches, lambda: loader
    draws = torch.Generator(next(network.parameters()).device).manual_seed(seed)
    forward = nn.Module.__call__ if logits is None else lambda net, x: logits(net(x))
    passes = method.passes(batches, draws, forward, loss_fn=loss_fn).some(method.fisher_images)
    passes = passes if say is None else replace(passes, say=say)
    x, _ = next(passes.on(network))
    check_copy(network, x[:2], forward)
    cost = cost_on(network, x[:1], forward)
    flops, parameters = as_count(flops, cost.flops), as_count(parameters, cost.parameters)
    goal = Goal(prune_ratio or 0.0, flops, parameters, nearest=True)
    pruned = prune_once(network, passes, cost=cost, goal=goal, method=method)
    if method.reestimate_batch_norm and not method.refit and not pruned.nothing_changed:
        reestimate_batch_norms(pruned.network, passes.on(pruned.network), forward)
    after = cost_on(pruned.network, x[:1], forward)
    check_used(pruned.network, after)
    counts = ((cost.flops, after.flops), (cost.parameters, after.parameters))
    pruned.network.report = Report(pruned.changes, pruned.left_alone, pruned.predicted_rise, *counts)
    passes.say(str(pruned.network.report))
    return pruned.network


def prune_once(network: nn.Module, passes: Passes, *, cost: NetworkCost, goal: Goal, method: Method) -> Pruned:
    """Prune every layer, or the channels inside of every block, once and rebuild the network.

    Raises:
        UserError: if the target cannot be reached, or the criterion does not suit the network.
    """
    x, labels = next(passes.on(network))
    found = survey(network, *passes.probe(x, labels), method.ignored_layers)
    check_ran(found.names, {name.removesuffix(".core") for name in cost.layers})
    if goal.nearest:
        asked, goal = goal, nearest(goal, *_reachable(network, found, cost, replace(method, round_to=1)))
        check_near(asked, goal, (cost.flops, cost.parameters), found.left_alone)
    asked, method = method.round_to, _fine_enough(network, found, cost, goal, method)
    if method.round_to < asked:
        passes.say(f"the target cannot be reached with round_to {asked}, so ranks are multiples of {method.round_to}")
    if method.forms_compete:
        pruned = prune_to_forms(network, found, passes, cost, goal, method)
    elif method.criterion == "eigendamage":
        pruned = prune_directions(network, found, passes, cost, goal, method)
    else:
        pruned = prune_channels(network, passes, cost, goal, method)
    if method.refit and not pruned.nothing_changed:
        names = rebuilt_layers(network, pruned.network, found.names)
        with passes.phase(f"refit of {len(names)} layers"):
            few = passes.some(min(IMAGES, BATCHES * images_of(x, labels)))
            refit(network, pruned.network, {name: found.norms[name] for name in names}, pruned.importances, few)
    return pruned


def check_goal(network: nn.Module, image_size: Size, goal: Goal, method: Method, forward: Forward) -> None:
    """Refuse targets that ``network`` cannot be brought to, before anything is measured.

    Raises:
        UserError: says what can be reached, and which setting prevents more.
    """
    cost, parameter = network_cost(network, image_size), next(network.parameters())
    x = parameter.new_zeros(2, 3, *height_width(image_size))

    def short_of(by: str = "the layers", **freed: Any) -> str | None:
        finest = replace(method, round_to=1, **freed)
        found = survey(network, x, forward, ignored=finest.ignored_layers)
        return shortfall(goal, *_reachable(network, found, cost, finest), by)

    short = short_of()
    if short is None:
        return
    for name, free, remedy in (
        ("prune_ratio_limit", math.nextafter(1, 0), "raise prune_ratio_limit"),
        ("ignored_layers", [], "ignore fewer layers"),
    ):
        if short_of(**{name: free}) is None:
            short = short_of(f"{name} {getattr(method, name)}")
            raise UserError(f"{short}: raise the target, or {remedy}")
    raise UserError(f"{short}, whatever prune_ratio_limit is: raise the target")


def _fine_enough(network: nn.Module, found: Survey, cost: NetworkCost, goal: Goal, method: Method) -> Method:
    """The settings with ``round_to`` halved as often as the goal needs; if none reaches it, down to 1."""
    if method.objective == "saliency" and not goal.has_target:
        return method  # a share of directions or channels
    goal = as_target(goal, (cost.flops, cost.parameters), (0, 0), method.objective)
    while method.round_to > 1 and shortfall(goal, *_reachable(network, found, cost, method)):
        method = replace(method, round_to=method.round_to // 2)
    return method


def _reachable(
    network: nn.Module, found: Survey, cost: NetworkCost, method: Method
) -> tuple[list[np.ndarray], np.ndarray]:
    """FLOPs and parameters of every form of each layer or block, [n, 2], and of everything outside of them."""
    if method.forms_compete:
        costs = [form_costs(own) for own in layer_forms(network, found, cost, method).values()]
    elif method.criterion == "eigendamage":
        costs = group_costs(direction_groups(network, found, cost, method, saliencies=None))
    else:
        costs = group_costs(channel_groups(network, cost, method, saliencies=None))
    return costs, outside(cost, costs)
