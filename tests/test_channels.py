"""Channel criteria: closed forms, the dense optimum of the quadratic model, and blocks rebuilt narrower."""

import pytest
import torch
from pruning_case import quadratic_rise, switched_network

from models import all_on
from pruning import channels
from pruning.surgery import rebuild_channels

IN, OUT = 5, 4
CRITERIA = (channels.c_obs, channels.removed_in_turn, channels.kron_obd)


@pytest.fixture
def example():
    a, g = torch.randn(30, IN, dtype=torch.float64), torch.randn(30, OUT, dtype=torch.float64)
    weight = torch.randn(OUT, IN, 3, 3, dtype=torch.float64)
    return weight, a.t() @ a / 30, g.t() @ g / 30


def dense(weight, A, G):
    """vec(W) and its dense Fisher A (x) G (x) I, in the order in, out, tap; A is damped as the code does."""
    fisher = torch.kron(torch.kron(channels.damped(A), G.contiguous()), torch.eye(9, dtype=torch.float64))
    return weight.flatten(2).transpose(0, 1).flatten(), fisher


def dense_optimum(weight, A, G, removed):
    """Rise and change [out, in, kh, kw] that minimise 1/2 d^T F d under d = -w on the removed columns: KKT, solved."""
    w, fisher = dense(weight, A, G)
    gone = torch.zeros(IN, OUT, 9, dtype=torch.bool)
    gone[removed] = True
    constraint = torch.eye(len(w), dtype=torch.float64)[gone.flatten()]
    rows = len(constraint)
    lower = torch.cat([constraint, torch.zeros(rows, rows).double()], 1)
    system = torch.cat([torch.cat([fisher, constraint.t()], 1), lower])
    right = torch.cat([torch.zeros(len(w)).double(), -w[gone.flatten()]])
    change = torch.linalg.solve(system, right)[: len(w)]
    rise = (0.5 * change @ fisher @ change).item()
    return rise, change.unflatten(0, (IN, OUT, 9)).transpose(0, 1).unflatten(2, (3, 3))


@pytest.mark.parametrize("removed", [[0], [2], [1, 3], [0, 2, 4], [0, 1, 2, 3]])
def test_compensation_is_the_dense_optimum_of_the_quadratic_model(example, removed):
    weight, A, G = example
    rise, change = dense_optimum(weight, A, G, removed)
    kept = torch.tensor([j for j in range(IN) if j not in removed])
    updated = channels.compensated(weight, A, kept)
    torch.testing.assert_close(updated, (weight + change)[:, kept], rtol=1e-8, atol=1e-8)
    mine = -weight.clone()
    mine[:, kept] += updated
    assert quadratic_rise(mine, channels.damped(A), G).item() == pytest.approx(rise, rel=1e-8)
    zeroed = -weight.clone()
    zeroed[:, kept] = 0
    assert rise < quadratic_rise(zeroed, A, G).item()


def in_turn(price) -> list[float]:
    """The cost of every channel when the cheapest goes first, given what a set of channels costs together."""
    gone, costs, last = [], [0.0] * IN, 0.0
    while len(gone) < IN:
        together = {j: price([*gone, j]) - price(gone) for j in range(IN) if j not in gone}
        j = min(together, key=together.get)
        last = costs[j] = max(last, together[j])
        gone.append(j)
    return costs


def test_kron_obs_is_what_each_channel_adds_to_the_rise_at_the_dense_optimum(example):
    weight, A, G = example
    expected = in_turn(lambda gone: dense_optimum(weight, A, G, gone)[0] if gone else 0.0)
    found = channels.removed_in_turn(weight, A, G)
    assert found.tolist() == pytest.approx(expected, rel=1e-8)
    assert len(set(found.tolist())) == IN, "sorting keeps the order"


def test_c_obs_prices_single_weights_with_those_of_the_channels_left(example):
    """The first channel by the dense inverse; all of them as the dense optimum under C-OBS's diagonal prices."""
    weight, A, G = example
    w, _ = dense(weight, A, G)
    fisher = torch.kron(torch.kron(channels.damped(A), channels.damped(G)), torch.eye(9, dtype=torch.float64))
    inverse = torch.linalg.inv(fisher)
    alone = (0.5 * w.square() / inverse.diagonal()).unflatten(0, (IN, OUT * 9)).sum(1)
    found = channels.c_obs(weight, A, G)
    assert found.argmin() == alone.argmin()
    torch.testing.assert_close(found.min(), alone.min(), rtol=1e-8, atol=0)
    prices = torch.diag(1 / torch.linalg.inv(channels.damped(G)).diagonal())
    expected = in_turn(lambda gone: dense_optimum(weight, A, prices, gone)[0] if gone else 0.0)
    assert found.tolist() == pytest.approx(expected, rel=1e-8)


def test_kron_obd_is_the_rise_of_zeroing_a_channel(example):
    weight, A, G = example
    for j, value in enumerate(channels.kron_obd(weight, A, G).tolist()):
        change = torch.zeros_like(weight)
        change[:, j] = -weight[:, j]
        assert value == pytest.approx(quadratic_rise(change, A, G).item(), rel=1e-12)


def test_c_obd_is_the_diagonal_quadratic_form(example):
    weight = example[0]
    diagonal = torch.rand_like(weight)
    expected = [0.5 * (diagonal[:, j] * weight[:, j] ** 2).sum().item() for j in range(IN)]
    assert channels.c_obd(weight, diagonal).tolist() == pytest.approx(expected, rel=1e-12)


def test_a_channel_that_never_fires_costs_nothing_to_remove(example):
    weight, A, G = example
    A = A.clone()
    A[2], A[:, 2] = 0, 0
    for saliency in (criterion(weight, A, G) for criterion in CRITERIA):
        assert saliency.isfinite().all() and saliency[2] < 1e-4 * saliency[[0, 1, 3, 4]].min()


@pytest.mark.parametrize("dead", ["A", "G", "both"])
def test_a_dead_block_is_the_least_salient(example, dead):
    weight, A, G = example
    factors = {"A": A, "G": G}
    for name in factors if dead == "both" else dead:
        factors[name] = torch.zeros_like(factors[name])
    for saliency in (criterion(weight, *factors.values()) for criterion in CRITERIA):
        assert saliency.isfinite().all() and saliency.max() < 1e-20


def test_damping_does_not_depend_on_the_scale_of_the_factor(example):
    _, A, _ = example
    torch.testing.assert_close(channels.damped(1e-12 * A), 1e-12 * channels.damped(A), rtol=1e-12, atol=0)


def test_removing_a_channel_is_zeroing_its_column_of_the_second_convolution():
    network = switched_network(14, 4).double()
    kept = {"blocks.0": torch.tensor([0, 3]), "blocks.2": torch.tensor([1, 2, 4, 5, 7])}
    weights = {name: network.get_submodule(f"{name}.conv2").weight.detach()[:, index] for name, index in kept.items()}
    smaller = rebuild_channels(network, kept, weights)
    assert smaller.architecture["inner"] == {"blocks.0": 2, "blocks.2": 5}
    with torch.no_grad():
        for name, index in kept.items():
            weight = network.get_submodule(f"{name}.conv2").weight
            gone = [j for j in range(weight.shape[1]) if j not in index.tolist()]
            weight[:, gone] = 0
        x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
        expected, found = (net(x, decide=all_on).logits for net in (network, smaller))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
