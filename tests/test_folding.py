"""Folded networks compute what the original computes: 1e-5 in float32, 1e-10 in float64."""

import pytest
import torch
from networks import NORMALISATION, STAGES, lively_network, varied_images
from torch import nn

from deploy.folding import folded, without_switches
from models import GATES, all_on


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_folded_network_gives_the_same_answers(stage, gate, dtype, tolerance):
    network = lively_network(stage, gate).to(dtype)
    images = NORMALISATION.apply(varied_images(64)).to(dtype)
    with torch.no_grad():
        before, after = network(images), folded(network)(images)
    torch.testing.assert_close(after.probabilities, before.probabilities, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(after.decisions, before.decisions, rtol=0, atol=0)
    torch.testing.assert_close(after.logits, before.logits, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gate", GATES)
def test_nothing_of_the_original_changes_and_no_batch_norm_stays(gate):
    network = lively_network("pruned", gate)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    smaller = folded(network)
    without_switches(network)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d) for m in smaller.modules())


def test_without_switches_is_the_network_with_every_block_on():
    network = lively_network("rl_pruned", "rnn")
    images = torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(without_switches(network)(images).logits, network(images, decide=all_on).logits)
