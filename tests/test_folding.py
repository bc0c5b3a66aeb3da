"""Folded and merged networks compute what the original computes: 1e-5 in float32, 1e-10 in float64."""

import pytest
import torch
from networks import NORMALISATION, STAGES, lively_network, varied_images
from torch import nn

from deploy.folding import cheapest_grouping, folded, multiplied_out, taking_pixels, without_switches
from models import GATES, all_on
from utils.flops import network_cost


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
    smaller = taking_pixels(folded(network), NORMALISATION)
    without_switches(network)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d) for m in smaller.modules())


def test_merging_saves_flops():
    network = lively_network("pruned", "none")
    assert network_cost(folded(network), 16).flops < network_cost(network, 16).flops


def test_folded_network_takes_pixels():
    network = lively_network("rl_pruned", "rnn").double()
    pixels = varied_images(32)
    with torch.no_grad():
        mean, std = (torch.tensor(own).double().view(1, 3, 1, 1) for own in (NORMALISATION.mean, NORMALISATION.std))
        expected = network((pixels.double() / 255 - mean) / std)
        output = taking_pixels(folded(network), NORMALISATION)(pixels)
    # The two round the mean of float32 differently: 1e-6 is float32's share, not the folding's.
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-6, atol=1e-6)


def test_without_switches_is_the_network_with_every_block_on():
    network = lively_network("rl_pruned", "rnn")
    images = torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(without_switches(network)(images).logits, network(images, decide=all_on).logits)


def conv(i: int, o: int, k: int = 1, stride: int = 1, bias: bool = False, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, stride, k // 2, bias=bias, groups=groups).double()


@pytest.mark.parametrize(
    "pair",
    [
        (conv(6, 3), conv(3, 5)),
        (conv(6, 3), conv(3, 5, 3)),
        (conv(6, 3), conv(3, 5, 3, 2, bias=True)),
        (conv(6, 3, 3, 2), conv(3, 5, bias=True)),
        (conv(6, 3, 3, 2, bias=True), conv(3, 5)),
        (conv(6, 3, stride=2, bias=True), conv(3, 5, stride=2, bias=True)),
    ],
)
def test_two_convolutions_multiplied_out(pair):
    x = torch.randn(2, 6, 9, 9, dtype=torch.float64)
    product = multiplied_out(*pair)
    torch.testing.assert_close(product(x), nn.Sequential(*pair)(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "pair",
    [
        (conv(6, 3, bias=True), conv(3, 5, 3)),  # the core pads with zeros, not with the bias
        (conv(6, 3, stride=2), conv(3, 5, 3)),
        (conv(6, 3, 3), conv(3, 5, 3)),
        (conv(6, 6), conv(6, 6, 3, groups=6)),
    ],
)
def test_what_cannot_be_multiplied_out_is_left_alone(pair):
    assert multiplied_out(*pair) is None


@pytest.mark.parametrize(
    ("chain", "layers"),
    [
        ([conv(16, 4), conv(4, 4, 3), conv(4, 16)], 3),  # a true bottleneck stays
        ([conv(4, 4), conv(4, 4, 3), conv(4, 4)], 1),
        ([conv(16, 4), conv(4, 6), conv(6, 16)], 2),  # the 1x1 core goes into a rotation
        ([conv(16, 4), conv(4, 4, stride=2), conv(4, 16)], 2),
        ([conv(16, 15), conv(15, 15, stride=2), conv(15, 16)], 1),
    ],
)
def test_cheapest_grouping_of_a_chain(chain, layers):
    x = torch.randn(2, chain[0].in_channels, 8, 8, dtype=torch.float64)
    grouped = cheapest_grouping(chain)
    assert len(grouped) == layers
    torch.testing.assert_close(nn.Sequential(*grouped)(x), nn.Sequential(*chain)(x), rtol=1e-12, atol=1e-12)
