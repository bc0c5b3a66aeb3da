"""The network: published counts, routing, decision rules; strided 1x1 convolutions without oneDNN's form of them."""

import pytest
import torch
from networks import edits_to
from torch import nn

from models import GATES, all_on, build_network, sampled, straight_through, thresholded
from models.convolution import BLOCK, SafeConv2d
from utils.flops import network_cost

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))
SWITCHED = [kind for kind in GATES if kind != "none"]


RANKS = {"blocks.2.conv1": [5, None], "blocks.4.conv2": [6, 7]}


def routed_network(gate: str = "rnn", dtype: torch.dtype = torch.float32, ranks: dict | None = None):
    """A small network in evaluation mode whose batch norms are not the identity and whose switches disagree."""
    torch.manual_seed(0)
    network = build_network("resnet", depth=14, num_classes=5, width=8, gate=gate, edits=edits_to(ranks or {})).to(
        dtype
    )
    network.train()
    for _ in range(3):
        network(torch.randn(16, 3, 16, 16, dtype=dtype), decide=all_on)
    return network.eval()


def test_published_counts():
    network = build_network("resnet", depth=32, num_classes=100, width=64, gate="none")
    assert sum(p.numel() for p in network.parameters()) == 7_451_044
    assert network_cost(network, 32).parameters == 7_451_044
    assert network_cost(network, 32).flops == 2_201_405_440
    assert build_network("resnet", depth=32, num_classes=100).switches == 14


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("gate", SWITCHED)
@torch.no_grad()
def test_skipping_equals_masking(gate, layout, dtype, tolerance, device):
    """In bf16, under autocast, a few of its steps near 1 may lie between kernels for different batch sizes."""
    network = routed_network(gate).to(device).to(memory_format=layout)
    images = torch.randn(32, 3, 16, 16).to(device).to(memory_format=layout)
    torch.manual_seed(1)
    decisions = (torch.rand(32, network.switches) < 0.5).float().to(device)
    decisions[:, 1], decisions[:, 2] = 0, 1  # a block that no image takes, and one that all take
    outputs = []
    for skip in (False, True):
        columns = iter(decisions.unbind(1))
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            outputs.append(network(images, decide=lambda p, columns=columns: next(columns), skip=skip))
    masked, skipping = outputs
    torch.testing.assert_close(skipping.logits.float(), masked.logits.float(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(skipping.probabilities, masked.probabilities, rtol=tolerance, atol=tolerance)
    assert torch.equal(skipping.decisions, decisions)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("gate", SWITCHED)
def test_skipped_training_has_the_gradients_of_masked_training(gate, layout):
    network = routed_network(gate, torch.float64, RANKS).to(memory_format=layout)
    images = torch.randn(12, 3, 16, 16, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    gradients, draws = [], torch.rand(12, network.switches)
    for skip in (False, True):
        network.zero_grad()
        images.grad = None
        output = network(images, decide=sampled(draws), skip=skip)
        output.logits.square().sum().backward()
        gradients.append([None if p.grad is None else p.grad.clone() for p in (images, *network.parameters())])
    for masked, skipped in zip(*gradients, strict=True):
        if masked is not None and masked.abs().max() > 0:
            torch.testing.assert_close(skipped, masked, rtol=1e-9, atol=1e-9)


def test_straight_through_is_hard_forward_and_soft_backward():
    p = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    z = straight_through(thresholded, torch.ones(3))(p)
    assert z.tolist() == [0.0, 0.0, 1.0]
    (z * weights).sum().backward()
    assert p.grad.tolist() == [1.0, 2.0, 3.0]  # as if z were p


def test_sampled_rules_follow_the_probability():
    p = torch.full((100_000,), 0.3, requires_grad=True)
    draws = torch.rand(100_000, 1)
    for rule in (sampled(draws), straight_through(sampled(draws), torch.ones(1))):
        z = rule(p)
        assert set(z.detach().unique().tolist()) == {0.0, 1.0}
        assert z.mean().item() == pytest.approx(0.3, abs=4 * (0.21 / 100_000) ** 0.5)  # four standard errors
    z.sum().backward()
    assert torch.equal(p.grad, torch.ones_like(p))


def test_images_that_do_not_learn_have_no_gradient():
    p = torch.tensor([0.2, 0.7, 0.9], requires_grad=True)
    straight_through(thresholded, torch.tensor([1.0, 0.0, 1.0]))(p).sum().backward()
    assert p.grad.tolist() == [1, 0, 1]


def test_what_the_gates_cost():
    plain = network_cost(build_network("resnet", depth=32, num_classes=100, gate="none"), 32).flops

    def gates(kind):
        cost = network_cost(build_network("resnet", depth=32, num_classes=100, gate=kind), 32)
        return cost.flops - plain, sum(cost.blocks)

    channels = [64] * 5 + [128] * 5 + [256] * 4  # inputs of the 14 switched blocks
    projections, lstm, decisions = 2 * 10 * sum(channels), 14 * 2 * 40 * (10 + 10), 14 * 2 * 10
    assert gates("rnn")[0] == projections + lstm + decisions
    # A block of two 3x3 convolutions on C channels and P pixels takes 36 C^2 P FLOPs; the gates work at P/4 and P/16.
    sizes = [32 * 32] * 5 + [16 * 16] * 5 + [8 * 8] * 4
    pixels = [(c, p) for c, p in zip(channels, sizes, strict=True)]
    assert gates("ff2")[0] == sum(18 * c * c * p // 4 + 2 * c for c, p in pixels)
    assert gates("ff1")[0] == sum(18 * c * c * (p // 4 + p // 16) + 2 * c for c, p in pixels)


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "size", "groups"),
    [(4, 1, 2, 8, 1), (3, 1, 2, 7, 1), (5, 1, (2, 3), 9, 1), (4, 1, 2, 8, 4), (BLOCK, 1, 2, 8, 1), (4, 3, 2, 8, 1)],
)
def test_outputs_and_gradients_are_those_of_the_plain_convolution(channels, kernel, stride, size, groups):
    """In float64 and the default layout, which oneDNN's form does not take."""
    ours = SafeConv2d(channels, 8, kernel, stride, kernel // 2, groups=groups).double()
    plain = nn.Conv2d(channels, 8, kernel, stride, kernel // 2, groups=groups).double()
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(5, channels, size, size, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [conv(i) for conv, i in zip((ours, plain), inputs, strict=True)]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weights).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.bias.grad, plain.bias.grad, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding", [0, "valid"])
def test_a_fault_that_depends_on_the_processor_is_avoided_on_all(padding, monkeypatch):
    monkeypatch.setattr(nn.Conv2d, "forward", None)
    assert SafeConv2d(4, 8, 1, 2, padding)(torch.zeros(2, 4, 8, 8)).shape == (2, 8, 4, 4)


def test_few_channels_train_in_channels_last():
    """Float32 in the layout of training against float64: the gradients that oneDNN's fault would spoil."""
    conv = SafeConv2d(4, 8, 1, 2, bias=False)
    exact = SafeConv2d(4, 8, 1, 2, bias=False).double()
    exact.load_state_dict(conv.state_dict())
    conv = conv.to(memory_format=torch.channels_last)
    x = torch.randn(16, 4, 32, 32)
    conv(x.contiguous(memory_format=torch.channels_last)).square().sum().backward()
    exact(x.double()).square().sum().backward()
    torch.testing.assert_close(conv.weight.grad.double(), exact.weight.grad, rtol=1e-4, atol=1e-2)
