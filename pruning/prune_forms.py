"""An iteration in which forms compete: every layer may become a cheaper form of itself with its inputs and outputs.

Source of the forms: EigenDamage (arXiv:1905.05934), section 4 and appendix.  There directions are dropped one by one by
saliencies that add up; here the rise of the loss is predicted for whole forms of a layer, without a diagonal or a
Kronecker approximation, and decides among them.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from models.convolution import is_pointwise
from models.edits import DEPTHWISE, TUCKER, TWO_FACTORS
from pruning.capture import Passes
from pruning.changes import LayerChange, Pruned
from pruning.choice import choose
from pruning.costs import LayerShape, layer_shape
from pruning.eigenbasis import eigenbasis
from pruning.factors import Factors, collect_factors
from pruning.forms import KINDS, UNCHANGED, Form, Kernel, build, form_costs, possible_forms, trials
from pruning.goals import Goal, outside
from pruning.layers import ConvWeights, composed, weights_of
from pruning.prediction import predicted_rise, try_forms
from pruning.selection import least_kept
from pruning.settings import Method
from pruning.surgery import rebuild
from pruning.survey import Survey
from pruning.two_factors import Pointwise, pointwise
from utils import parallel
from utils.flops import NetworkCost

IMAGES = 1000  # that the rise of the loss is predicted on
ENTRIES = 2**24  # of kernels and their changes that may be held in memory for prediction, for any network


def prune_to_forms(
    network: nn.Module, found: Survey, passes: Passes, cost: NetworkCost, goal: Goal, method: Method
) -> Pruned:
    """Measure, choose and rebuild, see ``pruning.compress.prune_once``.

    A layer that was rebuilt before counts as the plain layer that it multiplies out to, and its new form is made from
    that.
    """
    forms = layer_forms(network, found, cost, method)
    able = {name: own for name, own in forms.items() if len(own) > 1}
    layers = {name: network.get_submodule(name) for name in able}
    with passes.phase("factors"):
        factors = collect_factors(network, layers, passes) if layers else {}
    importances = {name: own.importance for name, own in factors.items()}
    with passes.phase("forms"):  # each layer's factors go as soon as its eigenbasis is there
        kernels = {name: _kernel(layers[name], factors.pop(name)) for name in list(factors)}
    few, rises = passes.some(IMAGES), {}
    # The first process decides for all, whose parts of a batch may differ by one image.
    entries = parallel.broadcast_object(_entries(layers, cost, passes.on(network)))
    for group in _groups(able, kernels, entries):
        with passes.phase(f"forms of {len(group)} layers"):
            made = trials(kernels, group)
        with passes.phase("prediction"):
            rises |= try_forms(network, layers, made, few)
        del made  # before the next group's are made
    rises = [np.array([0.0, *rises[name].tolist()] if name in able else [0.0]) for name in forms]
    costs = [form_costs(own) for own in forms.values()]
    with passes.phase("choice"):
        chosen = dict(zip(forms, choose(costs, rises, goal, outside(cost, costs), method.objective), strict=True))

    taken = {name: forms[name][i] for name, i in chosen.items() if i > 0}
    with passes.phase(f"decomposition of {len(taken)} layers"):
        replaced = build(taken, kernels)
    with passes.phase("prediction of all together"):  # of what was built, which is better than the trials
        changes = {name: _change(layers[name], replaced[name]) for name in taken}
        predicted = predicted_rise(network, layers, changes, few)
    table = []
    for name, i in chosen.items():
        before, after = forms[name][0], forms[name][i]
        parameters, flops = (before.parameters, after.parameters), (before.flops, after.flops)
        rise = predicted.layers.get(name, 0.0)
        table.append(LayerChange(name, before.ranks, after.ranks, *parameters, *flops, rise, after.kind))
    smaller = rebuild(network, replaced, [name for name in taken if found.norms[name] is None])
    alone = {**found.left_alone, **{name: "nothing to save" for name in forms if name not in able}}
    bases = {name: kernel.basis for name, kernel in kernels.items() if isinstance(kernel, Kernel)}
    return Pruned(smaller, bases, table, predicted.together, importances, alone)


def layer_forms(network: nn.Module, found: Survey, cost: NetworkCost, method: Method) -> dict[str, list[Form]]:
    """The forms that every layer can take, the present one first."""
    forms = {}
    for name, norm in found.norms.items():
        layer = network.get_submodule(name)
        present = layer_shape(layer, cost, name)
        channels = present.channels
        plain = LayerShape(channels, channels, (False, False), present.taps, present.positions)
        now = Form(UNCHANGED, present.ranks, *present.cost(*present.ranks))
        least = tuple(least_kept(side, method.prune_ratio_limit) for side in channels)
        kinds = KINDS[method.decomposition]
        if is_pointwise(layer):
            kinds = (TWO_FACTORS,) if TUCKER in kinds else ()
        bias = channels[1] if norm is None and layer.bias is None else 0
        forms[name] = possible_forms(now, plain, least, kinds, method.round_to, bias)
    return forms


def _kernel(layer: nn.Module, factors: Factors) -> Kernel | Pointwise:
    weight = composed(weights_of(layer))
    if is_pointwise(layer):
        return pointwise(weight[:, :, 0, 0].to(next(layer.parameters()).dtype), factors)
    return Kernel(weight, eigenbasis(factors))


def _change(layer: nn.Module, replaced: ConvWeights) -> Tensor:
    """The change of a layer's kernel, in the layer's own type."""
    return (composed(replaced) - composed(weights_of(layer))).to(next(layer.parameters()).dtype)


def _entries(layers: Mapping[str, nn.Module], cost: NetworkCost, batches: Iterator[tuple[Tensor, Any]]) -> int:
    """As many entries as the inputs and outputs of these layers have for a batch, which a training step holds, too."""
    features = 0
    for name, layer in layers.items():
        shape = layer_shape(layer, cost, name)
        features += int(np.dot(shape.channels, shape.positions))
    return max(ENTRIES, features * len(next(batches)[0]))


def _groups(
    forms: Mapping[str, list[Form]], kernels: Mapping[str, Kernel | Pointwise], entries: int
) -> Iterator[dict[str, list[Form]]]:
    """The layers in groups whose trials fit into memory together: each group is one more pass over the images."""
    group, taken = {}, 0
    for name, own in forms.items():
        kernel = kernels[name]
        entries_of = kernel.P if isinstance(kernel, Pointwise) else kernel.weight
        size = entries_of.numel() * (3 + sum(form.kind == DEPTHWISE for form in own))
        if group and taken + size > entries:
            yield group
            group, taken = {}, 0
        group[name], taken = own, taken + size
    if group:
        yield group
