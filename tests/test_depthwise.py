"""The depthwise separable form: its terms against gradient descent, and whole iterations towards it."""

from dataclasses import replace

import pytest
import torch
from pruning_case import (
    METHOD,
    SIZE,
    check_limits,
    counted,
    labelled_images,
    pruned_by,
    quadratic_rise,
    switched_network,
)

from deploy.folding import folded
from models import all_on, build_network
from pruning import depthwise
from pruning.depthwise import separable
from pruning.eigenbasis import eigenbasis, rotate
from pruning.factors import Factors
from pruning.goals import Goal
from pruning.layers import composed, read_weights
from pruning.tucker import root

TO_DEPTHWISE = replace(METHOD, decomposition="depthwise", objective="flops")


@pytest.fixture(scope="module")
def network():
    return switched_network()


@pytest.fixture(scope="module")
def images():
    return labelled_images()


def random_factors(inputs: int, outputs: int) -> Factors:
    a, g = (torch.randn(50, n, dtype=torch.float64) ** 3 for n in (inputs, outputs))
    return Factors(a.t() @ a / 50, g.t() @ g / 50)


@pytest.mark.parametrize(("penalty", "tolerance"), [(0.0, 1e-6), (1e-2, 0.02)])
def test_a_sum_of_separable_terms_along_eigendirections_is_found(penalty, tolerance, monkeypatch):
    """To rounding, but for what the penalty costs."""
    monkeypatch.setattr(depthwise, "PENALTY", penalty)
    torch.manual_seed(0)
    basis = eigenbasis(random_factors(6, 5))
    U, D = torch.randn(5, 3, dtype=torch.float64), torch.randn(3, 3, 3, dtype=torch.float64)
    core = torch.einsum("ok,khw,ik->oihw", U, D, basis.Q_a[:, [1, 3, 4]])
    assert (composed(separable(core, basis, 3)) - core).norm() < tolerance * core.norm()


@pytest.mark.parametrize("terms", [4, 9])
def test_terms_lose_what_the_singular_values_say_and_least_squares_lose_no_more(terms):
    """At the start they are the largest rank-one parts along eigendirections; nine are more than six inputs."""
    factors = random_factors(6, 5)
    basis, core = eigenbasis(factors), torch.randn(5, 6, 3, 3, dtype=torch.float64)
    rises = {}
    for sweeps in (0, 1, 20):
        left = core - composed(separable(core, basis, terms, sweeps))
        rises[sweeps] = quadratic_rise(left, factors.A, factors.G).item()
    scaled = rotate(core, basis) * (basis.d_g[:, None] * basis.d_a)[:, :, None, None].sqrt()
    squares = torch.linalg.svdvals(scaled.transpose(0, 1).flatten(2)).square().flatten()
    expected = 0.5 * (squares.sum() - squares.sort(descending=True).values[:terms].sum())
    assert rises[0] == pytest.approx(expected.item(), rel=1e-4)  # but for the damping of the factors
    assert rises[20] < rises[1] < rises[0]


def test_terms_are_at_a_minimum_of_the_penalised_quadratic_model():
    """A descent by its gradient, from the terms that were found, gains next to nothing."""
    factors = random_factors(12, 10)
    basis, core = eigenbasis(factors), torch.randn(10, 12, 3, 3, dtype=torch.float64)
    root_in, root_out = root(basis.Q_a, basis.d_a), root(basis.Q_g, basis.d_g)
    found = separable(core, basis, 8)
    terms = [root_out @ found.rotate_out, root_in @ found.rotate_in.t(), found.core[:, 0].flatten(1).t()]
    scaled = torch.einsum("op,pihw,ij->ojhw", root_out, core, root_in).flatten(2)
    terms = [term.contiguous().requires_grad_() for term in terms]
    optimiser = torch.optim.LBFGS(terms, max_iter=500, history_size=50, line_search_fn="strong_wolfe")

    def penalised():
        optimiser.zero_grad()
        U, V, D = terms
        sizes = U.square().sum(0) * V.square().sum(0) * D.square().sum(0)
        value = (scaled - torch.einsum("ok,ik,tk->oit", U, V, D)).square().sum() + depthwise.PENALTY * sizes.sum()
        value.backward()
        return value

    before = penalised().item()
    optimiser.step(penalised)
    assert 0.98 * before < penalised().item() <= before


def test_terms_do_not_grow_to_cancel_each_other():
    """A kernel without a best sum of two terms: without a penalty their size grows without bound."""
    identity = eigenbasis(Factors(torch.eye(2).double(), torch.eye(2).double()))
    core = torch.zeros(2, 2, 3, 3, dtype=torch.float64)
    core[0, 0, 0, 1] = core[0, 1, 0, 0] = core[1, 0, 0, 0] = 1  # x x y + x y x + y x x, of border rank 2
    found = separable(core, identity, 2)
    assert found.core.flatten(1).norm(dim=1).max() < 5 * core.norm()


@pytest.fixture(scope="module")
def separated(network, images):
    return pruned_by(network, images, Goal(flops=0.4 * counted(network)[0]), TO_DEPTHWISE)


@torch.no_grad()
def test_the_rebuilt_network_equals_one_with_the_composed_kernels(network, separated):
    plain = build_network(**network.architecture).eval()
    weights = network.state_dict()
    for name in separated.network.architecture["depthwise"]:
        weights[f"{name}.weight"] = composed(read_weights(separated.network, name)).float()
    plain.load_state_dict(weights)
    x = torch.randn(4, 3, SIZE, SIZE)
    expected = plain(x, decide=all_on).logits
    for other in (separated.network, folded(separated.network)):
        torch.testing.assert_close(other(x, decide=all_on).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_second_iteration_takes_terms_from_separable_layers(network, images, separated):
    second = pruned_by(separated.network, images, Goal(flops=0.2 * counted(network)[0]), TO_DEPTHWISE).network
    assert 0.98 * 0.2 * counted(network)[0] <= counted(second)[0] <= 0.2 * counted(network)[0]
    ranks, before = second.architecture["ranks"], separated.network.architecture["ranks"]
    assert any(name in before and ranks[name][0] < before[name][0] for name in second.architecture["depthwise"])
    check_limits(network, second, 0.95)


def test_truncation_leaves_separable_layers_alone(images, separated):
    other = pruned_by(separated.network, images, Goal(prune_ratio=0.3), METHOD).network
    assert other.architecture["depthwise"] == separated.network.architecture["depthwise"]
    assert len(other.architecture["ranks"]) > len(separated.network.architecture["ranks"])
