"""An iteration towards depthwise separable layers: every 3x3 convolution loses input directions and changes its form.

Source: EigenDamage (arXiv:1905.05934), the depthwise separable form of its appendix.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from models import ResNet
from pruning.capture import visit_gradients
from pruning.changes import LayerChange, Pruned
from pruning.costs import separable_cost
from pruning.depthwise import captured_shares, separable, without_channels
from pruning.eigenbasis import Eigenbasis, eigendamage, rotate, share
from pruning.factors import channel_effects
from pruning.layers import prunable_layers, read_weights, separable_layers, unpruned_channels
from pruning.prediction import predicted_rise
from pruning.prune_directions import layer_shape, measured
from pruning.selection import Goal, Group, least_kept, select
from pruning.settings import Batches, Method
from pruning.surgery import composed, merged, rebuild
from utils import parallel
from utils.flops import NetworkCost


def prune_to_depthwise(
    network: ResNet, batches: Batches, draws: torch.Generator, cost: NetworkCost, goal: Goal, method: Method
) -> Pruned:
    """Measure, choose and rebuild, see ``pruning.iteration.prune_once``.

    A layer changes its form with the first directions it loses.  What that costs beside them counts for these first
    ones, so a layer whose filters are far from separable stays as it is for longer.  Layers that are separable already
    lose channels of their core.
    """
    layers, separated = prunable_layers(network), separable_layers(network)
    bases, spectra = measured(network, layers, batches, draws, method)
    rises = _channel_rises(network, separated, batches, draws, method)
    saliencies = {name: share(values) if method.normalize else values for name, values in rises.items()}
    wholes = {}
    for name, layer in layers.items():
        core = layer.weight.detach()
        whole = eigendamage(rotate(core, bases[name]), spectra[name], method.regularization).columns
        wholes[name], saliencies[name] = whole.sum(), whole * captured_shares(core, bases[name])
    scales = _corrections(network, layers, bases, saliencies, wholes, batches, draws, method)
    entries = {}
    for name, scale in scales.items():
        saliencies[name] = saliencies[name] * scale
        entries[name] = (wholes[name] * scale - saliencies[name].sum()).item()
    groups, fixed = separable_groups(network, cost, method, saliencies, entries)
    kept = {name: side for name, (side,) in select(groups, goal, fixed, method.objective, method.round_to).items()}

    replaced, changes, ranks, costs = {}, {}, {}, {}
    for name, keep in kept.items():
        before = read_weights(network, name)
        shape = layer_shape(before, cost, name, method)
        ranks[name] = (shape.ranks, shape.ranks)
        # A form that saves nothing costs what the layer costs now.
        after = tuple(int(value) for value in separable_cost(shape, len(keep))[:2])
        costs[name] = zip(shape.cost(*shape.ranks), after, strict=True)
        if after[0] == shape.cost(*shape.ranks)[0]:
            continue
        ranks[name] = (shape.ranks, (len(keep), len(keep)))
        if name in separated:
            replaced[name] = without_channels(before, keep)
            changes[name] = before.core.double().neg()
            changes[name][keep.to(before.core.device)] = 0
        else:
            reduced = separable(before.core, bases[name], keep)
            replaced[name] = merged(before, reduced)
            changes[name] = composed(reduced) - before.core.double()
    predicted = predicted_rise(network, {**layers, **separated}, changes, batches(), **method.fisher(draws))
    table = []
    for name in kept:
        flops, parameters = costs[name]
        table.append(LayerChange(name, *ranks[name], *parameters, *flops, predicted.layers.get(name, 0.0)))
    return Pruned(rebuild(network, replaced), bases, table, predicted.together)


def separable_groups(
    network: ResNet,
    cost: NetworkCost,
    method: Method,
    saliencies: Mapping[str, Tensor] | None,
    entries: Mapping[str, float] | None = None,
) -> tuple[dict[str, Group], tuple[int, int]]:
    """The input directions, or channels of the core, of every layer, and the FLOPs and parameters of everything else.

    Args:
        saliencies: of each direction or channel, by layer; None counts them all as zero.
        entries: what changing the form costs besides, by layer; zero for those left out.
    """
    groups, flops, parameters = {}, cost.flops, cost.parameters
    for name in [*prunable_layers(network), *separable_layers(network)]:
        shape = layer_shape(read_weights(network, name), cost, name, method)
        unpruned, _ = unpruned_channels(network, name)
        groups[name] = Group(
            (torch.zeros(shape.ranks[0]) if saliencies is None else saliencies[name].cpu(),),
            (min(least_kept(unpruned, method.prune_ratio_limit), shape.ranks[0]),),
            partial(separable_cost, shape),
            entry=(entries or {}).get(name, 0.0),
            channels=(unpruned,),
        )
        now = shape.cost(*shape.ranks)
        flops, parameters = flops - now[0], parameters - now[1]
    return groups, (flops, parameters)


def _corrections(
    network: ResNet,
    layers: Mapping[str, nn.Conv2d],
    bases: Mapping[str, Eigenbasis],
    saliencies: Mapping[str, Tensor],
    wholes: Mapping[str, Tensor],
    batches: Batches,
    draws: torch.Generator,
    method: Method,
) -> dict[str, float]:
    """What each layer's saliencies are multiplied by: predicted over summed rise of one form, that of half the terms.

    Leaving the form changes every tap at once, for which the diagonal of EK-FAC can be too small by far: without this
    the stem, three input channels, looks cheap.
    """
    if method.normalize:
        tiny = torch.finfo(torch.float64).tiny
        return {name: 1 / whole.clamp(min=tiny).item() for name, whole in wholes.items()}
    changes, summed = {}, {}
    for name, layer in layers.items():
        keep = saliencies[name].argsort(descending=True)[: max(1, len(saliencies[name]) // 2)]
        core = layer.weight.detach().double()
        changes[name] = composed(separable(core, bases[name], keep, sweeps=0)) - core
        summed[name] = (wholes[name] - saliencies[name][keep].sum()).item()
    predicted = predicted_rise(network, layers, changes, batches(), **method.fisher(draws)).layers
    return {name: predicted[name] / summed[name] if summed[name] > 0 else 1.0 for name in layers}


def _channel_rises(
    network: ResNet, separated: Mapping[str, nn.Conv2d], batches: Batches, draws: torch.Generator, method: Method
) -> dict[str, Tensor]:
    """Predicted rise of the loss, in nats, when a channel of a depthwise core is removed, [c] for each layer."""
    if not separated:
        return {}
    sums = {name: core.weight.new_zeros(len(core.weight), dtype=torch.float64) for name, core in separated.items()}

    def add(name: str, core: nn.Conv2d, a: Tensor, g: Tensor) -> None:
        sums[name] += channel_effects(core, a, g).double()

    images = visit_gradients(
        network, separated, batches(), method.fisher_type, draws, add, fisher_draws=method.fisher_draws
    )
    rises = {}
    for name, core in separated.items():
        norms = core.weight.detach().double().square().sum(dim=(1, 2, 3))
        rises[name] = 0.5 * (parallel.all_reduced(sums[name]) / images + method.regularization * norms)
    return rises
