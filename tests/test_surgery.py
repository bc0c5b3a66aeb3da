"""Rebuilt layers and networks: what they compute, and what they cost by independent counters."""

import pytest
import torch
from pruning_case import switched_network

from models import all_on
from pruning.eigenbasis import eigenbasis, rotate
from pruning.factors import Factors
from pruning.layers import composed, prunable_layers, read_weights
from pruning.surgery import merged, rebuild, truncated


def random_basis(inputs: int, outputs: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    a, g = (torch.randn(2 * n, n, dtype=torch.float64, generator=generator) for n in (inputs, outputs))
    return eigenbasis(Factors(a.t() @ a, g.t() @ g))


def rotated_whole(network, seed: int):
    """Every layer rotated on both sides, nothing dropped."""
    replaced = {}
    for name in prunable_layers(network):
        weights = read_weights(network, name)
        outputs, inputs = weights.core.shape[:2]
        basis = random_basis(inputs, outputs, seed)
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
    basis = random_basis(inputs, outputs, 0)
    keep_in, keep_out = torch.tensor([0, 2, 3, 7]), torch.tensor([1, 4, 5])
    reduced = merged(weights, truncated(weights.core, basis, keep_in, keep_out))
    expected = torch.zeros_like(weights.core)
    expected[keep_out[:, None], keep_in] = rotate(weights.core, basis)[keep_out[:, None], keep_in]
    torch.testing.assert_close(rotate(composed(reduced), basis), expected, rtol=1e-10, atol=1e-12)
