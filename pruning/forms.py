"""The forms that competing layers can take: their costs, and their convolutions."""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from models.edits import DEPTHWISE, TUCKER, TWO_FACTORS
from pruning.costs import LayerShape
from pruning.depthwise import mixtures, separable_terms, sweeps_of
from pruning.eigenbasis import Eigenbasis, rotate
from pruning.layers import ConvWeights
from pruning.prediction import Trials
from pruning.selection import step_of
from pruning.tucker import coordinates, in_metric, tucker
from pruning.two_factors import Pointwise, two_factors

UNCHANGED = "unchanged"
# Forms of a layer above 1x1, by decomposition.  A pointwise layer has two factors where Tucker forms are allowed.
KINDS = {"best": (TUCKER, DEPTHWISE), "tucker": (TUCKER,), "depthwise": (DEPTHWISE,)}
MOST_TERMS = 512  # of a depthwise separable form, unless there are more channels: decomposing takes their cube
LEVELS = 8  # numbers of directions that a side may keep: this many, spread evenly by ratio


@dataclass(frozen=True)
class Form:
    """A form that a layer can take."""

    kind: str
    ranks: tuple[int, int]  # channels that enter and leave the core
    flops: int  # for one image
    parameters: int


def form_costs(forms: Sequence[Form]) -> np.ndarray:
    """FLOPs and parameters of each form, [n, 2]."""
    return np.array([(form.flops, form.parameters) for form in forms])


def possible_forms(
    now: Form, shape: LayerShape, least: tuple[int, int], kinds: Sequence[str], round_to: int, bias: int = 0
) -> list[Form]:
    """The layer as it is, and every form that saves FLOPs and does not cost parameters.

    Args:
        now: the layer as it is.
        shape: of the plain convolution that it stands for.
        least: minimum of input and output directions.
        kinds: which forms there are.
        round_to: kept directions are multiples of this, of less on small sides.
        bias: parameters of one that the layer gets if it changes.
    """
    (inputs, outputs), found = shape.channels, [now]
    kept_in, kept_out = (
        levels(size, few, step_of(size, round_to)) for size, few in zip(shape.channels, least, strict=True)
    )
    pairs = [(c, r) for c in (*kept_in, inputs) for r in (*kept_out, outputs)] if TUCKER in kinds else []
    if TWO_FACTORS in kinds:
        narrow = min(shape.channels)
        pairs = [(inputs, r) for r in levels(narrow, min(least), step_of(narrow, round_to))]
    for c, r in pairs:
        flops, parameters = (int(value) for value in shape.cost(c, r))
        found.append(Form(TUCKER if TUCKER in kinds else TWO_FACTORS, (c, r), flops, parameters + bias))
    if DEPTHWISE in kinds:
        # Terms can outnumber inputs and outputs: each costs a ninth of a plain kernel's direction.
        most = inputs * outputs * shape.taps // (inputs + outputs + shape.taps)
        most = min(most, max(MOST_TERMS, inputs, outputs))
        for k in levels(most, least[0], step_of(most, round_to)):
            flops, parameters = replace(shape, ranks=(k, k), rotated=(True, True), depthwise=True).cost(k, k)
            found.append(Form(DEPTHWISE, (k, k), flops, parameters + bias))
    return [now, *(form for form in found[1:] if form.flops < now.flops and form.parameters <= now.parameters)]


def levels(most: int, least: int, step: int) -> list[int]:
    """Multiples of ``step`` from ``least`` on and below ``most``: all, or ``LEVELS`` of them in geometric steps."""
    first, last = -(-least // step), (most - 1) // step
    if last < first:
        return []
    row = np.geomspace(first, last, LEVELS) if last - first >= LEVELS else np.arange(first, last + 1)
    return [int(multiple) * step for multiple in np.unique(np.round(row))]


@dataclass(frozen=True)
class Kernel:
    """The kernel of a layer above 1x1 and the metric of the Fisher."""

    weight: Tensor  # [out, in, kh, kw] in float64
    basis: Eigenbasis


def trials(kernels: Mapping[str, Kernel | Pointwise], forms: Mapping[str, Sequence[Form]]) -> dict[str, Trials]:
    """The argument of ``pruning.prediction.try_forms``, for all forms except the first, the present one."""
    depthwise = {
        (name, form.ranks[0]): kernels[name] for name, own in forms.items() for form in own if form.kind == DEPTHWISE
    }
    terms = _terms(depthwise, quickly=True)
    found = {}
    for name, own in forms.items():
        kernel, corners = kernels[name], [form.ranks for form in own[1:] if form.kind != DEPTHWISE]
        if isinstance(kernel, Pointwise):
            found[name] = Trials(kernel, corners)
            continue
        at, changes = coordinates(kernel.weight, kernel.basis), None
        counts = [form.ranks[0] for form in own if form.kind == DEPTHWISE]
        if counts:
            rotated = torch.stack([at.rotated(*terms[name, count]) for count in counts])
            changes = (rotated.unflatten(3, at.core.shape[2:]) - at.core).float()
        found[name] = Trials(at, corners, changes)
    return found


def _terms(kernels: Mapping[tuple[str, int], Kernel], quickly: bool) -> dict[tuple[str, int], tuple[Tensor, ...]]:
    """The terms of depthwise separable forms by (layer, number); equal shapes and numbers are solved together."""
    same: dict[Hashable, list[tuple[str, int]]] = defaultdict(list)
    for (name, count), kernel in kernels.items():
        same[kernel.weight.shape, count].append((name, count))
    found = {}
    for (shape, count), keys in same.items():
        sweeps = sweeps_of(shape, count, quickly)
        scaled = torch.stack([in_metric(kernels[key].weight, kernels[key].basis).flatten(2) for key in keys])
        factors = separable_terms(scaled, torch.stack([kernels[key].basis.Q_a for key in keys]), count, sweeps)
        found.update(zip(keys, zip(*factors, strict=True), strict=True))
    return found


def build(forms: Mapping[str, Form], kernels: Mapping[str, Kernel | Pointwise]) -> dict[str, ConvWeights]:
    """The convolutions of the forms that layers take, by layer; none of them is the present one."""
    depthwise = {(name, form.ranks[0]): kernels[name] for name, form in forms.items() if form.kind == DEPTHWISE}
    terms, found = _terms(depthwise, quickly=False), {}
    for name, form in forms.items():
        kernel = kernels[name]
        if form.kind == DEPTHWISE:
            window = kernel.weight.shape[2:]
            found[name] = mixtures(*terms[name, form.ranks[0]], kernel.basis, window)
        elif form.kind == TWO_FACTORS:
            found[name] = two_factors(kernel, form.ranks[1])
        else:
            found[name] = _tucker(kernel, form.ranks)
    return found


def _tucker(kernel: Kernel, ranks: tuple[int, int]) -> ConvWeights:
    basis = kernel.basis
    squares = rotate(kernel.weight, basis).square().sum(dim=(2, 3)) * torch.outer(basis.d_g, basis.d_a)
    sides = []
    for dim, rank in enumerate(ranks):
        values = squares.sum(dim=dim)
        sides.append(values.argsort(descending=True)[:rank] if rank < len(values) else None)
    return tucker(kernel.weight, basis, *sides)
