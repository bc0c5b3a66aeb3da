"""An iteration in which forms compete: every 3x3 convolution may become a Tucker or a depthwise separable one.

Source of the forms: EigenDamage (arXiv:1905.05934), section 4 and appendix.  There directions are dropped one by one by
saliencies that add up; here the rise of the loss is predicted for whole forms of a layer, without a diagonal or a
Kronecker approximation, and decides among them.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from models import ResNet
from pruning.capture import first_images
from pruning.changes import LayerChange, Pruned
from pruning.choice import choose_forms
from pruning.costs import LayerShape
from pruning.eigenbasis import eigenbasis
from pruning.factors import collect_factors
from pruning.forms import KINDS, UNCHANGED, Form, build, possible_forms, worthwhile
from pruning.goals import Goal
from pruning.layers import competing_layers, read_weights, unpruned_channels
from pruning.prediction import predicted_rise, predicted_rises
from pruning.selection import least_kept
from pruning.settings import Batches, Method
from pruning.surgery import composed, rebuild
from utils.flops import NetworkCost

IMAGES = 2000  # that the rise of the loss is predicted on


def prune_to_forms(
    network: ResNet, batches: Batches, draws: torch.Generator, cost: NetworkCost, goal: Goal, method: Method
) -> Pruned:
    """Measure, choose and rebuild, see ``pruning.iteration.prune_once``.

    A layer that was rebuilt before counts as the plain convolution that it multiplies out to, and its new form is made
    from that.
    """
    forms, fixed = layer_forms(network, cost, method)
    layers = {name: network.get_submodule(name) for name in forms}
    kernels = {name: composed(read_weights(network, name)) for name in forms}
    factors = collect_factors(network, layers, batches(), **method.fisher(draws))
    bases = {name: eigenbasis(own) for name, own in factors.items()}
    forms = {name: worthwhile(own, kernels[name], bases[name]) for name, own in forms.items()}

    def some_images() -> Iterator[tuple[Tensor, Tensor]]:
        return first_images(batches(), IMAGES)

    tried = {}
    for name, own in forms.items():
        changes = [composed(build(form, kernels[name], bases[name], quickly=True)) for form in own[1:]]
        tried[name] = torch.stack([kernels[name], *changes]).sub(kernels[name]).float()
    rises = predicted_rises(network, layers, tried, some_images(), **method.fisher(draws))
    for name, changes in tried.items():
        rises[name] += 0.5 * method.regularization * changes.flatten(1).square().sum(dim=1)
    rises = {name: own.tolist() for name, own in rises.items()}
    chosen = choose_forms(forms, rises, goal, fixed, method.objective)

    replaced, changes = {}, {}
    for name, i in chosen.items():
        if i > 0:
            dtype = next(layers[name].parameters()).dtype
            replaced[name] = build(forms[name][i], kernels[name], bases[name]).to(dtype)
            changes[name] = composed(replaced[name]) - kernels[name]
    predicted = predicted_rise(network, layers, changes, some_images(), **method.fisher(draws))
    table = []
    for name, i in chosen.items():
        before, after = forms[name][0], forms[name][i]
        parameters, flops = ((before.parameters, after.parameters), (before.flops, after.flops))
        rise = predicted.layers.get(name, 0.0)
        table.append(LayerChange(name, before.ranks, after.ranks, *parameters, *flops, rise, after.kind))
    return Pruned(rebuild(network, replaced), bases, table, predicted.together)


def layer_forms(network: ResNet, cost: NetworkCost, method: Method) -> tuple[dict[str, list[Form]], tuple[int, int]]:
    """What every layer can become, the present form first, and the FLOPs and parameters of everything else."""
    forms, flops, parameters = {}, cost.flops, cost.parameters
    for name in competing_layers(network):
        weights = read_weights(network, name)
        counted = cost.layers.get(name) or cost.layers[f"{name}.core"]
        channels, positions = (weights.in_channels, weights.out_channels), (counted.positions_in, counted.positions_out)
        taps, core = weights.core[0, 0].numel(), weights.core.shape[0]
        plain = LayerShape(channels, channels, (False, False), taps, positions)
        ranks = (core if weights.depthwise else weights.core.shape[1], core)
        rotated = (weights.rotate_in is not None, weights.rotate_out is not None)
        present = LayerShape(channels, ranks, rotated, taps, positions, weights.depthwise)
        now = Form(UNCHANGED, ranks, *present.cost(*ranks))
        sides = zip(unpruned_channels(network, name), channels, strict=True)
        least = tuple(min(least_kept(unpruned, method.prune_ratio_limit), own) for unpruned, own in sides)
        forms[name] = possible_forms(now, plain, least, KINDS[method.decomposition], method.round_to)
        flops, parameters = flops - now.flops, parameters - now.parameters
    return forms, (flops, parameters)
