"""Strided 1x1 convolutions trained without oneDNN's own form of them."""

import pytest
import torch
from torch import nn

from models.convolution import BLOCK, SafeConv2d


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "size", "groups"),
    [(4, 1, 2, 8, 1), (3, 1, 2, 7, 1), (5, 1, (2, 3), 9, 1), (4, 1, 2, 8, 4), (BLOCK, 1, 2, 8, 1), (4, 3, 2, 8, 1)],
)
def test_outputs_and_gradients_are_those_of_the_plain_convolution(channels, kernel, stride, size, groups):
    """In float64 and the default layout, which oneDNN's form does not take."""
    torch.manual_seed(0)
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


def test_few_channels_train_in_channels_last():
    """Float32 in the layout of training against float64: the gradients that oneDNN's fault would spoil."""
    torch.manual_seed(0)
    conv = SafeConv2d(4, 8, 1, 2, bias=False)
    exact = SafeConv2d(4, 8, 1, 2, bias=False).double()
    exact.load_state_dict(conv.state_dict())
    conv = conv.to(memory_format=torch.channels_last)
    x = torch.randn(16, 4, 32, 32)
    conv(x.contiguous(memory_format=torch.channels_last)).square().sum().backward()
    exact(x.double()).square().sum().backward()
    torch.testing.assert_close(conv.weight.grad.double(), exact.weight.grad, rtol=1e-4, atol=1e-2)
