"""The same function in fewer layers: batch norms folded into the convolution or linear layer before them."""

import copy
import itertools

import torch
from torch import nn

from models import ResNet


@torch.no_grad()
def folded(network: ResNet) -> ResNet:
    """A copy in evaluation mode without batch norms; products are taken in float64 and rounded once."""
    smaller = copy.deepcopy(network).eval().double()
    for parent in list(smaller.modules()):
        children = list(parent.named_children())
        for (_, layer), (name, norm) in itertools.pairwise(children):
            if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
                *_, last = (m for m in layer.modules() if isinstance(m, nn.Conv2d | nn.Linear))
                scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
                bias = -norm.running_mean if last.bias is None else last.bias - norm.running_mean
                last.weight = nn.Parameter(last.weight * scale.view(-1, *[1] * (last.weight.dim() - 1)))
                last.bias = nn.Parameter(bias * scale + norm.bias)
                setattr(parent, name, nn.Identity())
    return smaller.to(next(network.parameters()).dtype)


def without_switches(network: ResNet) -> ResNet:
    """The network that runs every block on every image, its gate left out."""
    plain = copy.deepcopy(network)
    plain.gate = None
    return plain
