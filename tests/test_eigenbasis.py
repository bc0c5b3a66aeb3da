"""Rotation into the eigenbasis, the rise of the loss that it predicts, and layers that are rebuilt there."""

import itertools

import numpy as np
import pytest
import torch
from pruning_case import switched_network
from torch.nn import functional as F

from models import all_on, build_network
from pruning.capture import Passes, visit_gradients
from pruning.eigenbasis import curvature, eigenbasis, eigendamage, rotate, share
from pruning.factors import Factors, input_factor, output_factor, rotated_gradient_squares
from pruning.layers import composed, prunable_layers, read_weights
from pruning.surgery import merged, rebuild, truncated
from utils.flops import every_block


def random_factors(inputs: int, outputs: int, seed: int = 0) -> Factors:
    torch.manual_seed(seed)
    a, g = torch.randn(20, inputs, dtype=torch.float64), torch.randn(20, outputs, dtype=torch.float64)
    return Factors(a.t() @ a / 20, g.t() @ g / 20)


def test_the_basis_diagonalises_both_factors_and_rotation_is_undone_by_its_transpose():
    factors, weight = random_factors(5, 4), torch.randn(4, 5, 3, 3, dtype=torch.float64)
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
    factors, weight = random_factors(5, 4), torch.randn(4, 5, 3, 3, dtype=torch.float64)
    basis = eigenbasis(factors)
    saliency = eigendamage(rotate(weight, basis), curvature(basis, weight), 0.0)
    vectors = weight.flatten(2).permute(2, 1, 0).flatten(1)  # one vec(W) a tap
    expected = 0.5 * torch.einsum("tp,pq,tq->", vectors, torch.kron(factors.A, factors.G), vectors)
    torch.testing.assert_close(saliency.sum(), expected, rtol=1e-12, atol=0)


def test_shares_sum_to_one_and_zeros_stay_zeros():
    assert share(torch.tensor([1.0, 3.0])).tolist() == [0.25, 0.75]
    assert share(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


def test_zeroing_one_rotated_entry_changes_the_loss_as_predicted_to_second_order():
    """Where the labels are the network's own prediction it stands at a minimum, and the Fisher is the Hessian.

    The entry is shrunk by a share e: the rise must be e^2 times the saliency, with an error that falls as e.
    """
    network = build_network("resnet", depth=8, num_classes=3, width=2, gate="none").double().eval()
    x, layer = torch.randn(6, 3, 6, 6, dtype=torch.float64), network.blocks[2].conv2
    with torch.no_grad():
        target = network(x).logits.softmax(1)
    A = G = 0
    pairs = []
    for n, c in itertools.product(range(6), range(3)):

        def visit(_, layer, a, g, p=target[n, c]):
            pairs.append((a, g * p.sqrt()))

        passes = Passes(lambda n=n, c=c: [(x[n : n + 1], torch.tensor([c]))], None, "empirical", forward=every_block)
        visit_gradients(network, {"x": layer}, passes, visit)
    for a, g in pairs:
        A, G = A + input_factor(layer, a) / 18, G + output_factor(g) / 6
    basis = eigenbasis(Factors(A, G))
    s = sum(rotated_gradient_squares(layer, a, g, basis.Q_a, basis.Q_g) for a, g in pairs) / 6
    weight = layer.weight.detach().clone()
    rotated = rotate(weight, basis)
    saliency = eigendamage(rotated, s, 0.0)

    @torch.no_grad()
    def rise(entry: tuple[int, ...], share: float) -> float:
        moved = rotated.clone()
        moved[entry] *= 1 - share
        layer.weight.copy_(torch.einsum("pjhw,op,ij->oihw", moved, basis.Q_g, basis.Q_a))
        log = network(x, decide=all_on).logits.log_softmax(1)
        layer.weight.copy_(weight)
        return F.kl_div(log, target, reduction="batchmean").item()

    for flat in saliency.flatten().argsort(descending=True)[:5].tolist():
        entry = tuple(map(int, np.unravel_index(flat, tuple(saliency.shape))))
        predicted = saliency[entry].item()
        errors = [abs(rise(entry, e) / e**2 / predicted - 1) for e in (0.1, 0.01, 0.001)]
        assert errors[1] < 0.05 and errors[2] < 0.005, (entry, errors)


def rotated_whole(network, seed: int):
    """Every layer rotated on both sides, nothing dropped."""
    replaced = {}
    for name in prunable_layers(network):
        weights = read_weights(network, name)
        outputs, inputs = weights.core.shape[:2]
        basis = eigenbasis(random_factors(inputs, outputs, seed))
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
    weights = read_weights(network, "blocks.1.conv2")
    outputs, inputs = weights.core.shape[:2]
    basis = eigenbasis(random_factors(inputs, outputs))
    keep_in, keep_out = torch.tensor([0, 2, 3, 7]), torch.tensor([1, 4, 5])
    reduced = merged(weights, truncated(weights.core, basis, keep_in, keep_out))
    expected = torch.zeros_like(weights.core)
    expected[keep_out[:, None], keep_in] = rotate(weights.core, basis)[keep_out[:, None], keep_in]
    torch.testing.assert_close(rotate(composed(reduced), basis), expected, rtol=1e-10, atol=1e-12)
