"""The forms of a layer: what each costs by independent counters, which are worth having, and how they are built."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models import LowRankConv2d
from pruning.channels import quadratic_rise
from pruning.costs import LayerShape
from pruning.eigenbasis import eigenbasis
from pruning.factors import Factors
from pruning.forms import DEPTHWISE, KINDS, TUCKER, UNCHANGED, Form, build, levels, possible_forms, worthwhile
from pruning.surgery import composed

SIZE, INPUTS, OUTPUTS = 6, 16, 24


def shape() -> LayerShape:
    return LayerShape((INPUTS, OUTPUTS), (INPUTS, OUTPUTS), (False, False), 9, (SIZE**2, SIZE**2))


def present() -> Form:
    return Form(UNCHANGED, (INPUTS, OUTPUTS), *shape().cost(INPUTS, OUTPUTS))


def forms(round_to=1, least=(2, 3), kinds=KINDS["best"]) -> list[Form]:
    return possible_forms(present(), shape(), least, kinds, round_to)


def layer_of(form: Form) -> nn.Module:
    if form.kind == UNCHANGED:
        return nn.Conv2d(INPUTS, OUTPUTS, 3, padding=1, bias=False)
    sides = zip(form.ranks, (INPUTS, OUTPUTS), strict=True)
    ranks = form.ranks if form.kind == DEPTHWISE else [None if rank == whole else rank for rank, whole in sides]
    return LowRankConv2d(INPUTS, OUTPUTS, 3, 1, 1, *ranks, depthwise=form.kind == DEPTHWISE)


@torch.no_grad()
def counted(layer: nn.Module) -> tuple[int, int]:
    with FlopCounterMode(display=False) as counter:
        layer(torch.zeros(1, INPUTS, SIZE, SIZE))
    return counter.get_total_flops(), sum(p.numel() for p in layer.parameters())


def factors(seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    a, g = (torch.randn(60, n, generator=generator, dtype=torch.float64) ** 3 for n in (INPUTS, OUTPUTS))
    return Factors(a.t() @ a / 60, g.t() @ g / 60)


def test_costs_equal_those_of_the_layers_that_are_built():
    found = forms()
    assert {form.kind for form in found} == {UNCHANGED, TUCKER, DEPTHWISE} and len(found) > 30
    for form in found:
        assert counted(layer_of(form)) == (form.flops, form.parameters), form


def test_every_form_saves_flops_and_keeps_to_the_limits():
    found = forms(round_to=4)
    assert found[0] == present()
    for form in found[1:]:
        assert form.flops < found[0].flops and form.parameters <= found[0].parameters
        assert form.ranks[0] >= 2 and (form.kind == DEPTHWISE or form.ranks[1] >= 3)
        for rank, whole in zip(form.ranks, (INPUTS, OUTPUTS), strict=True):
            assert rank % 4 == 0 or rank == whole
    assert {form.kind for form in forms(kinds=KINDS["tucker"])} == {UNCHANGED, TUCKER}


@pytest.mark.parametrize(
    ("most", "least", "step", "expected"),
    [
        (8, 3, 1, [3, 4, 5, 6, 7]),
        (64, 7, 16, [16, 32, 48]),
        (4, 4, 1, []),
        (257, 1, 1, [1, 2, 5, 11, 24, 53, 116, 256]),
    ],
)
def test_levels(most, least, step, expected):
    assert levels(most, least, step) == expected


def test_only_forms_that_another_one_beats_in_every_respect_are_left_out():
    """Their saliencies by brute force: what the leading directions of both sides leave of the rotated kernel."""
    own = factors(0)
    basis, kernel = eigenbasis(own), torch.randn(OUTPUTS, INPUTS, 3, 3, dtype=torch.float64)
    every = forms()
    kept = worthwhile(every, kernel, basis)
    rotated = torch.einsum("op,oihw,ij->pjhw", basis.Q_g, kernel, basis.Q_a)
    squares = torch.einsum("oihw,o,i->oi", rotated**2, basis.d_g, basis.d_a)
    inputs, outputs = squares.sum(0).argsort(descending=True), squares.sum(1).argsort(descending=True)

    def lost(form: Form) -> float:
        inside = squares[outputs[: form.ranks[1]]][:, inputs[: form.ranks[0]]].sum()
        return (squares.sum() - inside).item()

    pairs = [form for form in every if form.kind == TUCKER]
    assert [form for form in every if form.kind != TUCKER] == [form for form in kept if form.kind != TUCKER]
    assert 0 < len(kept) < len(every)
    for form in pairs:
        worse = [
            other
            for other in pairs
            if other.flops <= form.flops
            and other.parameters <= form.parameters
            and lost(other) <= lost(form) * (1 + 1e-12)
            and (other.flops, other.parameters) != (form.flops, form.parameters)
        ]
        assert (form not in kept) == bool(worse), form


@pytest.mark.parametrize("kind", [TUCKER, DEPTHWISE])
def test_what_is_built_has_the_form_and_a_quick_one_loses_little_more(kind):
    own = factors(1)
    basis, kernel = eigenbasis(own), torch.randn(OUTPUTS, INPUTS, 3, 3, dtype=torch.float64)
    everything = quadratic_rise(kernel, own.A, own.G).item()
    for form in [form for form in forms(round_to=4) if form.kind == kind]:
        rises = []
        for quickly in (False, True):
            weights = build(form, kernel, basis, quickly=quickly)
            whole = weights.core.shape[0], weights.core.shape[0 if kind == DEPTHWISE else 1]
            assert (whole[1], whole[0]) == form.ranks and weights.depthwise == (kind == DEPTHWISE)
            rises.append(quadratic_rise(kernel - composed(weights), own.A, own.G).item())
        assert -0.001 * everything <= rises[1] - rises[0] <= 0.02 * everything
