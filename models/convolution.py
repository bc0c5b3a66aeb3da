"""Convolutions: one that avoids oneDNN's fault in the gradients of strided 1x1 kernels, and which are pointwise."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Channels that oneDNN takes at once, the largest such number of any CPU.
BLOCK = 16


class SafeConv2d(nn.Conv2d):
    """``nn.Conv2d`` that trains strided 1x1 kernels with few input channels on a CPU by leaving out positions first.

    oneDNN writes past a buffer when it computes the weights' gradient of such a convolution in channels-last layout on
    CPUs without AVX-512: heap corruption or wrong gradients (github.com/uxlfoundation/oneDNN/issues/6035).  The
    convolution with stride 1 of every stride-th position is the same function.
    """

    def forward(self, input: Tensor) -> Tensor:
        pointwise = self.kernel_size == (1, 1) and self.padding in ((0, 0), "valid") and self.stride != (1, 1)
        if pointwise and self.in_channels < BLOCK and input.device.type == "cpu" and torch.is_grad_enabled():
            down, right = self.stride
            return F.conv2d(input[:, :, ::down, ::right], self.weight, self.bias, groups=self.groups)
        return super().forward(input)


def is_pointwise(layer: nn.Module) -> bool:
    """Whether a layer mixes channels at each position alone: a linear layer or a 1x1 convolution without padding."""
    if not hasattr(layer, "kernel_size"):
        return True
    return tuple(layer.kernel_size) == (1, 1) and layer.padding in ((0, 0), "valid", "same")
