"""The forms of a layer: what each costs by independent counters, how they are built, and what they lose."""

import pytest
import torch
from pruning_case import corner, quadratic_rise, random_factors, switched_network
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models import LowRankConv2d, all_on
from pruning.costs import LayerShape
from pruning.eigenbasis import curvature, eigenbasis, eigendamage, rotate
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
)
from pruning.layers import composed, prunable_layers, weights_of
from pruning.surgery import merged, rebuild, truncated
from pruning.tucker import coordinates
from pruning.two_factors import pointwise, two_factors

SIZE, INPUTS, OUTPUTS = 6, 16, 24


def shape() -> LayerShape:
    return LayerShape((INPUTS, OUTPUTS), (INPUTS, OUTPUTS), (False, False), 9, (SIZE**2, SIZE**2))


def present() -> Form:
    return Form(UNCHANGED, (INPUTS, OUTPUTS), *shape().cost(INPUTS, OUTPUTS))


def forms(round_to=1, kinds=KINDS["best"]) -> list[Form]:
    return possible_forms(present(), shape(), (2, 3), kinds, round_to)


def layer_of(form: Form) -> nn.Module:
    if form.kind == UNCHANGED:
        return nn.Conv2d(INPUTS, OUTPUTS, 3, padding=1, bias=False)
    sides = zip(form.ranks, (INPUTS, OUTPUTS), strict=True)
    ranks = form.ranks if form.kind == DEPTHWISE else [None if rank == whole else rank for rank, whole in sides]
    return LowRankConv2d(nn.Conv2d(INPUTS, OUTPUTS, 3, 1, 1), ranks, form.kind == DEPTHWISE)


@torch.no_grad()
def counted(layer: nn.Module) -> tuple[int, int]:
    with FlopCounterMode(display=False) as counter:
        layer(torch.zeros(1, INPUTS, SIZE, SIZE))
    return counter.get_total_flops(), sum(p.numel() for p in layer.parameters())


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
    own = random_factors(INPUTS, OUTPUTS, 60, 3, seed=1)
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
        quick = kernel.weight - corner(at, *form.ranks) if kind == TUCKER else None
        if kind == DEPTHWISE:
            quick = torch.einsum("op,pjhw,ij->oihw", at.P, tried.changes[i].double(), at.Q)
        assert -0.001 * everything <= quadratic_rise(quick, own.A, own.G).item() - rise <= 0.03 * everything


def test_corners_are_nested_and_the_whole_core_is_the_kernel():
    own = random_factors(INPUTS, OUTPUTS, 60, 3, seed=2)
    weight = torch.randn(OUTPUTS, INPUTS, 3, 3, dtype=torch.float64)
    at = coordinates(weight, eigenbasis(own))
    torch.testing.assert_close(corner(at, INPUTS, OUTPUTS), weight, rtol=1e-9, atol=1e-9)
    rises = [quadratic_rise(weight - corner(at, c, OUTPUTS), own.A, own.G).item() for c in range(1, INPUTS + 1)]
    assert rises == sorted(rises, reverse=True)


@pytest.mark.parametrize(("inputs", "outputs"), [(9, 6), (6, 9)])
def test_two_factors_of_a_pointwise_layer_are_the_best_of_their_rank(inputs, outputs):
    """Eckart-Young in the metric of the whole layer, though only its narrower side is decomposed."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(outputs, inputs, dtype=torch.float64, generator=generator)
    a, g = (torch.randn(80, n, dtype=torch.float64, generator=generator) ** 3 for n in (inputs, outputs))
    A, G = a.t() @ a / 80, g.t() @ g / 80
    narrow = Factors(W @ A @ W.t(), G) if outputs <= inputs else Factors(A, W.t() @ G @ W)
    kernel = pointwise(W, narrow)
    torch.testing.assert_close(kernel.P @ kernel.core, torch.eye(len(kernel.P)).double(), rtol=0, atol=1e-8)
    roots = [torch.linalg.cholesky(F) for F in (A, G)]
    values = torch.linalg.svdvals(roots[1].t() @ W @ roots[0])
    for rank in (1, 3, 5):
        built = two_factors(kernel, rank)
        assert built.ranks == (None, rank)
        rise = quadratic_rise(composed(built) - W[:, :, None, None], A, G).item()
        assert rise == pytest.approx(0.5 * values[rank:].square().sum().item(), rel=1e-4)
        tried = trials({"x": kernel}, {"x": [present(), Form(TWO_FACTORS, (inputs, rank), 0, 0)]})["x"]
        assert tried.corners == [(inputs, rank)]


def test_the_basis_diagonalises_both_factors_and_rotation_is_undone_by_its_transpose():
    factors, weight = random_factors(5, 4, seed=0), torch.randn(4, 5, 3, 3, dtype=torch.float64)
    basis = eigenbasis(factors)
    torch.testing.assert_close(basis.Q_a @ torch.diag(basis.d_a) @ basis.Q_a.t(), factors.A, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(basis.Q_g @ torch.diag(basis.d_g) @ basis.Q_g.t(), factors.G, rtol=1e-12, atol=1e-12)
    back = torch.einsum("pjhw,op,ij->oihw", rotate(weight, basis), basis.Q_g, basis.Q_a)
    torch.testing.assert_close(back, weight, rtol=1e-12, atol=1e-12)


def test_a_singular_factor_has_no_negative_eigenvalue():
    a = torch.randn(2, 6)
    basis = eigenbasis(Factors(a.t() @ a, torch.zeros(3, 3)))
    assert basis.d_a.min() >= 0 and basis.d_g.min() >= 0


def test_kfac_saliency_is_the_quadratic_form_of_the_kronecker_product():
    factors, weight = random_factors(5, 4, seed=0), torch.randn(4, 5, 3, 3, dtype=torch.float64)
    basis = eigenbasis(factors)
    saliency = eigendamage(rotate(weight, basis), curvature(basis, weight))
    vectors = weight.flatten(2).permute(2, 1, 0).flatten(1)  # one vec(W) a tap
    expected = 0.5 * torch.einsum("tp,pq,tq->", vectors, torch.kron(factors.A, factors.G), vectors)
    torch.testing.assert_close(saliency.sum(), expected, rtol=1e-12, atol=0)


def rotated_whole(network, seed: int):
    """Every layer rotated on both sides, nothing dropped."""
    replaced = {}
    for name in prunable_layers(network):
        weights = weights_of(network.get_submodule(name))
        outputs, inputs = weights.core.shape[:2]
        basis = eigenbasis(random_factors(inputs, outputs, seed=seed))
        replaced[name] = merged(weights, truncated(weights.core, basis, torch.arange(inputs), torch.arange(outputs)))
    return rebuild(network, replaced)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_ten_iterations_without_dropping_still_equal_the_input_network(dtype, tolerance):
    network = switched_network(8, 6).to(dtype)
    turned = network
    for iteration in range(10):
        turned = rotated_whole(turned, iteration)
    x = torch.randn(4, 3, 8, 8, dtype=dtype)
    with torch.no_grad():
        before, after = (net(x, decide=all_on).logits for net in (network, turned))
    assert (before - after).norm() < tolerance * before.norm()
    convolutions = [m for m in turned.blocks.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 3 * 6 + 2  # six 3x3 layers, never more than three each, and two 1x1 shortcuts


def test_dropping_a_direction_zeroes_its_entries_in_the_rotated_weight():
    network = switched_network(8, 6).double()
    weights = weights_of(network.get_submodule("blocks.1.conv2"))
    outputs, inputs = weights.core.shape[:2]
    basis = eigenbasis(random_factors(inputs, outputs, seed=0))
    keep_in, keep_out = torch.tensor([0, 2, 3, 7]), torch.tensor([1, 4, 5])
    reduced = merged(weights, truncated(weights.core, basis, keep_in, keep_out))
    expected = torch.zeros_like(weights.core)
    expected[keep_out[:, None], keep_in] = rotate(weights.core, basis)[keep_out[:, None], keep_in]
    torch.testing.assert_close(rotate(composed(reduced), basis), expected, rtol=1e-10, atol=1e-12)
