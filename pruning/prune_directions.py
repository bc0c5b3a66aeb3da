"""An iteration in the eigenbasis: every 3x3 convolution loses directions and becomes a bottleneck, as published.

Source: EigenDamage (arXiv:1905.05934), section 4.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from pruning.capture import Passes
from pruning.changes import LayerChange, Pruned
from pruning.costs import cheapest_cost, cheapest_ranks, layer_shape
from pruning.eigenbasis import Eigenbasis, curvature, eigenbasis, eigendamage, gradient_squares, rotate
from pruning.factors import collect_factors
from pruning.goals import Goal, outside
from pruning.layers import composed, prunable_layers, weights_of
from pruning.prediction import predicted_rise
from pruning.selection import Group, counts_kept, group_costs, select
from pruning.settings import Method
from pruning.surgery import merged, rebuild, truncated
from pruning.survey import Survey
from utils.flops import NetworkCost


def prune_directions(
    network: nn.Module, found: Survey, passes: Passes, cost: NetworkCost, goal: Goal, method: Method
) -> Pruned:
    """Measure, choose and rebuild, see ``pruning.compress.prune_once``."""
    layers = prunable_layers(network, found)
    bases, spectra = measured(network, layers, passes, method)
    saliencies = {}
    for name, core in layers.items():
        saliency = eigendamage(rotate(core.weight.detach(), bases[name]), spectra[name])
        saliencies[name] = saliency.sum(dim=(2, 3)).t()  # of pairs of an input and an output direction
    groups = direction_groups(network, found, cost, method, saliencies)

    replaced, changes, table = {}, {}, []
    for name, kept in select(groups, goal, outside(cost, group_costs(groups)), method.objective).items():
        layer = network.get_submodule(name)
        before, shape = weights_of(layer), layer_shape(layer, cost, name)
        ranks = tuple(int(rank) for rank in cheapest_ranks(shape, *(len(side) for side in kept)))
        if ranks != shape.ranks:
            sides = zip(kept, ranks, shape.ranks, strict=True)
            reduced = truncated(before.core, bases[name], *(side if r < whole else None for side, r, whole in sides))
            replaced[name] = merged(before, reduced)
            changes[name] = composed(reduced) - before.core.double()
        flops, parameters = zip(shape.cost(*shape.ranks), shape.cost(*ranks), strict=True)
        table.append(LayerChange(name, shape.ranks, ranks, *parameters, *flops, 0.0))
    predicted = predicted_rise(network, layers, changes, passes)
    table = [replace(change, predicted_rise=predicted.layers.get(change.name, 0.0)) for change in table]
    others = dict.fromkeys((name for name in found.names if name not in layers), "pointwise or depthwise")
    alone = {**found.left_alone, **others}
    return Pruned(rebuild(network, replaced), bases, table, predicted.together, left_alone=alone)


def measured(
    network: nn.Module, layers: Mapping[str, nn.Conv2d], passes: Passes, method: Method
) -> tuple[dict[str, Eigenbasis], dict[str, Tensor]]:
    """The eigenbasis of every layer, and the curvature of every entry of its rotated weight [out, in, kh, kw]."""
    if not layers:
        return {}, {}
    factors = collect_factors(network, layers, passes)
    bases = {name: eigenbasis(factors[name]) for name in layers}
    if method.correct_eigenvalues:
        return bases, gradient_squares(network, layers, bases, passes)
    return bases, {name: curvature(bases[name], layer.weight) for name, layer in layers.items()}


def direction_groups(
    network: nn.Module, found: Survey, cost: NetworkCost, method: Method, saliencies: Mapping[str, Tensor] | None
) -> dict[str, Group]:
    """The input and output directions of every layer.

    Args:
        saliencies: of the pairs of directions [in, out], by layer; None counts them all as zero.
    """
    groups = {}
    for name in prunable_layers(network, found):
        shape = layer_shape(network.get_submodule(name), cost, name)
        counts = tuple(
            counts_kept(rank, channels, method.prune_ratio_limit, method.round_to)
            for rank, channels in zip(shape.ranks, shape.channels, strict=True)
        )
        pairs = torch.zeros(shape.ranks) if saliencies is None else saliencies[name]
        groups[name] = Group(pairs, counts, partial(cheapest_cost, shape))
    return groups
