"""The forms of a layer: what each costs by independent counters, which are worth having, and how they are built."""

import pytest
import torch
from pruning_case import quadratic_rise
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models import LowRankConv2d
from pruning.costs import LayerShape
from pruning.eigenbasis import eigenbasis
from pruning.factors import Factors
from pruning.forms import (
    DEPTHWISE,
    KINDS,
    TUCKER,
    TWO_FACTORS,
    UNCHANGED,
    Form,
    Kernel,
    build,
    levels,
    possible_forms,
    trials,
    two_factors,
)
from pruning.layers import composed
from pruning.tucker import coordinates

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


@pytest.mark.parametrize("kind", [TUCKER, DEPTHWISE])
def test_what_is_built_has_the_form_and_a_trial_loses_little_more(kind):
    own = factors(1)
    kernel = Kernel(torch.randn(OUTPUTS, INPUTS, 3, 3, dtype=torch.float64), eigenbasis(own))
    everything = quadratic_rise(kernel.weight, own.A, own.G).item()
    found = [form for form in forms(round_to=4) if form.kind == kind]
    tried = trials({"x": kernel}, {"x": [present(), *found]})["x"]
    for i, form in enumerate(found):
        weights = build({"x": form}, {"x": kernel})["x"]
        whole = weights.core.shape[0], weights.core.shape[0 if kind == DEPTHWISE else 1]
        assert (whole[1], whole[0]) == form.ranks and weights.depthwise == (kind == DEPTHWISE)
        rise = quadratic_rise(kernel.weight - composed(weights), own.A, own.G).item()
        at = tried.coordinates
        quick = kernel.weight - at.corner(*form.ranks) if kind == TUCKER else None
        if kind == DEPTHWISE:
            quick = torch.einsum("op,pjhw,ij->oihw", at.P, tried.changes[i].double(), at.Q)
        assert -0.001 * everything <= quadratic_rise(quick, own.A, own.G).item() - rise <= 0.03 * everything


def test_corners_are_nested_and_the_whole_core_is_the_kernel():
    own, weight = factors(2), torch.randn(OUTPUTS, INPUTS, 3, 3, dtype=torch.float64)
    at = coordinates(weight, eigenbasis(own))
    torch.testing.assert_close(at.corner(INPUTS, OUTPUTS), weight, rtol=1e-9, atol=1e-9)
    rises = [quadratic_rise(weight - at.corner(c, OUTPUTS), own.A, own.G).item() for c in range(1, INPUTS + 1)]
    assert rises == sorted(rises, reverse=True)


@pytest.mark.parametrize(("inputs", "outputs"), [(9, 6), (6, 9)])
def test_two_factors_of_a_pointwise_layer_are_the_best_of_their_rank(inputs, outputs):
    """Eckart-Young in the metric of the whole layer, though only its narrower side is decomposed."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(outputs, inputs, dtype=torch.float64, generator=generator)
    a, g = (torch.randn(80, n, dtype=torch.float64, generator=generator) ** 3 for n in (inputs, outputs))
    A, G = a.t() @ a / 80, g.t() @ g / 80
    narrow = Factors(W @ A @ W.t(), G) if outputs <= inputs else Factors(A, W.t() @ G @ W)
    m = min(inputs, outputs)
    kernel = Kernel(torch.eye(m, dtype=torch.float64)[:, :, None, None], eigenbasis(narrow), W)
    roots = [torch.linalg.cholesky(F) for F in (A, G)]
    values = torch.linalg.svdvals(roots[1].t() @ W @ roots[0])
    for rank in (1, 3, 5):
        built = two_factors(kernel, rank)
        assert built.ranks == (None, rank)
        rise = quadratic_rise(composed(built) - W[:, :, None, None], A, G).item()
        assert rise == pytest.approx(0.5 * values[rank:].square().sum().item(), rel=1e-4)
        tried = trials({"x": kernel}, {"x": [present(), Form(TWO_FACTORS, (inputs, rank), 0, 0)]})["x"]
        assert tried.corners == [(m, rank)]
