"""Muon against singular value decompositions in float64."""

import pytest
import torch
from torch import nn

from models import build_network
from training.muon import TURN, Muon, filter_group, orthogonal
from training.optimisers import muon


@pytest.mark.parametrize("shape", [(3, 5, 20), (2, 20, 5), (2, 8, 8)])
def test_singular_vectors_stay_and_singular_values_become_about_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(matrices, full_matrices=False)
    found = U.transpose(1, 2) @ orthogonal(matrices) @ Vh.transpose(1, 2)
    values = found.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(found, torch.diag_embed(values), rtol=0, atol=1e-12)
    large = 0.05 * S.norm(dim=1, keepdim=True) < S
    assert large.double().mean() > 0.8
    assert values[large].min() > 0.6 and values[large].max() < 1.3


def test_two_steps_of_filters_and_of_everything_else():
    """Filters: Nesterov's direction, orthogonal, from filters of norm out^1/2; everything else as in SGD."""
    generator = torch.Generator().manual_seed(0)
    kernel, bias = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((4, 2, 3, 3), (4,)))
    filters, other, plain = nn.Parameter(kernel.clone()), nn.Parameter(bias.clone()), nn.Parameter(bias.clone())
    optimiser = Muon([filter_group([filters]), {"params": [other]}], 0.1, 0.9, weight_decay=0.01, nesterov=True)
    reference = torch.optim.SGD([plain], 0.1, 0.9, weight_decay=0.01, nesterov=True)
    momentum = torch.zeros_like(kernel)
    for _ in range(2):
        gradient, slope = torch.randn_like(kernel), torch.randn_like(bias)
        filters.grad, other.grad, plain.grad = gradient.clone(), slope.clone(), slope.clone()
        optimiser.step()
        reference.step()
        momentum = 0.9 * momentum + gradient
        direction = orthogonal((gradient + 0.9 * momentum).view(1, 4, -1)).view_as(kernel)
        kernel = kernel * 2 / kernel.norm() - 0.1 * TURN * direction
        torch.testing.assert_close(filters.detach(), kernel, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(other, plain, rtol=0, atol=0)


def test_of_a_network_all_filters_but_the_gates_take_orthogonal_steps_and_the_state_can_be_resumed():
    network = build_network("resnet", depth=8, num_classes=3, width=4, gate="ff1")
    optimiser = muon(network, 0.1, 0.9, 5e-4)
    turned = {id(p) for group in optimiser.param_groups if "turn" in group for p in group["params"]}
    gates = {id(p) for p in network.gate.parameters()}
    wanted = {id(p) for p in network.parameters() if p.dim() == 4} - gates
    assert turned == wanted
    assert {id(p) for group in optimiser.param_groups for p in group["params"]} == {id(p) for p in network.parameters()}
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    optimiser.step()
    other = muon(network, 0.1, 0.9, 5e-4)
    other.load_state_dict(optimiser.state_dict())
    for p in network.parameters():
        assert torch.equal(other.state[p]["momentum_buffer"], optimiser.state[p]["momentum_buffer"])
