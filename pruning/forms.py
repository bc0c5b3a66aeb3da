"""The forms that competing layers can take: what each costs, and the convolutions that it is made of."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pruning.costs import LayerShape
from pruning.depthwise import separable
from pruning.eigenbasis import Eigenbasis, rotate
from pruning.layers import ConvWeights
from pruning.selection import step_of
from pruning.tucker import tucker

UNCHANGED, TUCKER, DEPTHWISE = "unchanged", "tucker", "depthwise"
KINDS = {"best": (TUCKER, DEPTHWISE), "tucker": (TUCKER,), "depthwise": (DEPTHWISE,)}  # by decomposition
LEVELS = 8  # numbers of directions that a side may keep: this many, spread evenly by ratio


@dataclass(frozen=True)
class Form:
    """What a layer may become."""

    kind: str
    ranks: tuple[int, int]  # channels that enter and leave the core
    flops: int  # for one image
    parameters: int


def possible_forms(
    now: Form, shape: LayerShape, least: tuple[int, int], kinds: Sequence[str], round_to: int
) -> list[Form]:
    """The layer as it is, and every form that saves FLOPs and does not cost parameters.

    Args:
        now: the layer as it is.
        shape: of the plain convolution that it stands for.
        least: input and output directions that are kept in any case.
        kinds: which forms there are.
        round_to: kept directions are multiples of this, of less on small sides.
    """
    (inputs, outputs), found = shape.channels, [now]
    if TUCKER in kinds:
        sides = zip(shape.channels, least, strict=True)
        kept_in, kept_out = (levels(size, few, step_of(size, round_to)) for size, few in sides)
        for c in (*kept_in, inputs):
            for r in (*kept_out, outputs):
                found.append(Form(TUCKER, (c, r), *(int(value) for value in shape.cost(c, r))))
    if DEPTHWISE in kinds:
        # More terms than inputs or outputs are worth having: they cost a ninth of what a plain kernel's would.
        most = inputs * outputs * shape.taps // (inputs + outputs + shape.taps)
        for k in levels(most, least[0], step_of(most, round_to)):
            found.append(Form(DEPTHWISE, (k, k), *_separable_cost(shape, k)))
    return [now, *(form for form in found[1:] if form.flops < now.flops and form.parameters <= now.parameters)]


def _separable_cost(shape: LayerShape, terms: int) -> tuple[int, int]:
    before, behind = shape.channels[0] * terms, shape.channels[1] * terms
    core = terms * shape.taps
    return 2 * (before * shape.positions[0] + (core + behind) * shape.positions[1]), before + core + behind


def levels(most: int, least: int, step: int) -> list[int]:
    """Multiples of ``step`` from ``least`` on and below ``most``: all, or ``LEVELS`` of them in a geometric row."""
    first, last = -(-least // step), (most - 1) // step
    if last < first:
        return []
    row = np.geomspace(first, last, LEVELS) if last - first >= LEVELS else np.arange(first, last + 1)
    return [int(multiple) * step for multiple in np.unique(np.round(row))]


def worthwhile(forms: Sequence[Form], kernel: Tensor, basis: Eigenbasis) -> list[Form]:
    """The forms without the Tucker ones that another one beats in every respect, by K-FAC's saliency.

    A pair of ranks is judged by its leading directions, before any decomposition.
    """
    squares = rotate(kernel, basis).square().sum(dim=(2, 3)) * torch.outer(basis.d_g, basis.d_a)
    kept = _leading_sums(squares.t())
    lost = kept[-1, -1] - kept
    rows = {form: np.array([lost[form.ranks], form.flops, form.parameters]) for form in forms if form.kind == TUCKER}

    def beaten(form: Form) -> bool:
        own = rows[form]
        return any((other <= own).all() and (other < own).any() for other in rows.values())

    return [form for form in forms if form not in rows or not beaten(form)]


def build(form: Form, kernel: Tensor, basis: Eigenbasis, *, quickly: bool = False) -> ConvWeights:
    """The convolutions of a form that is not the present one, for the kernel [out, in, kh, kw].

    Args:
        quickly: a few sweeps of least squares only, near enough for a choice among forms.
    """
    if form.kind == DEPTHWISE:
        return separable(kernel, basis, form.ranks[0], **({"sweeps": 30} if quickly else {}))
    squares = rotate(kernel, basis).square().sum(dim=(2, 3)) * torch.outer(basis.d_g, basis.d_a)
    sides = []
    for dim, rank in enumerate(form.ranks):
        values = squares.sum(dim=dim)
        sides.append(values.argsort(descending=True)[:rank] if rank < len(values) else None)
    return tucker(kernel, basis, *sides, **({"sweeps": 2} if quickly else {}))


def _leading_sums(pairs: Tensor) -> np.ndarray:
    """[c, r]: the sum over the c rows and r columns with the largest sums, [n + 1, m + 1]."""
    rows, columns = (pairs.sum(dim=dim).argsort(descending=True) for dim in (1, 0))
    ordered = pairs[rows][:, columns].cumsum(0).cumsum(1)
    return np.pad(ordered.cpu().numpy(), ((1, 0), (1, 0)))
