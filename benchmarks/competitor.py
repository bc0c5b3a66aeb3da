"""Torch-Pruning's networks: whole channels, those of the residual stream with all layers that share them.

Source: DepGraph (arXiv:2301.12900), https://github.com/VainF/Torch-Pruning; importances of its groups: their norm
(section 3.3), first-order Taylor (Molchanov et al. 2019) and the diagonal Hessian (Optimal Brain Damage, LeCun 1989).
"""

import copy
from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import required
from deploy.folding import without_switches
from models import ResNet
from utils.flops import network_cost

torch_pruning = required("torch_pruning")
importance = torch_pruning.importance

IMPORTANCES = {
    "magnitude": lambda: importance.GroupMagnitudeImportance(p=2),
    "Taylor": importance.GroupTaylorImportance,
    "Hessian": importance.GroupHessianImportance,
    "random": importance.RandomImportance,
}
LARGEST_RATIO = 0.97  # of its channels that a layer may lose, as in the other variants
BISECTIONS = 12
HESSIAN_IMAGES = 256  # their gradients are computed one by one
OVER = 1.02  # channels go one by one: a network is taken up to this above the FLOPs asked for


def torch_pruned(
    network: ResNet, kind: str, flops: float, image_size: int, batches: Iterable[tuple[Tensor, Tensor]]
) -> ResNet:
    """A network without switches of about ``flops`` FLOPs, found by bisection over the share of channels that go.

    The channels of all layers compete.

    Args:
        kind: one of ``IMPORTANCES``.
        batches: normalised images and labels for the gradients that Taylor and Hessian need.
    """
    plain = without_switches(network).eval()
    gradients = _gradients(plain, kind, batches)
    low, high, tried = 0.0, LARGEST_RATIO, []
    for _ in range(BISECTIONS):
        ratio = (low + high) / 2
        pruned = _pruned(plain, kind, ratio, gradients, image_size)
        cost = network_cost(pruned, image_size).flops
        if cost <= OVER * flops:
            tried.append((abs(cost - flops), len(tried), pruned))
        low, high = (ratio, high) if cost > flops else (low, ratio)
    return min(tried)[2]


def _pruned(plain: ResNet, kind: str, ratio: float, gradients: list[Tensor] | None, image_size: int) -> ResNet:
    smaller = copy.deepcopy(plain)
    if gradients is not None:
        for parameter, gradient in zip(smaller.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
    pruner = torch_pruning.pruner.BasePruner(
        smaller,
        torch.zeros(1, 3, image_size, image_size, device=next(plain.parameters()).device),
        importance=IMPORTANCES[kind](),
        pruning_ratio=ratio,
        max_pruning_ratio=LARGEST_RATIO,
        global_pruning=True,
        ignored_layers=[smaller.classifier],
        forward_fn=lambda model, x: model(x).logits,
    )
    pruner.step()
    smaller.zero_grad(set_to_none=True)
    return smaller.eval()


def _gradients(plain: ResNet, kind: str, batches: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor] | None:
    """The gradients that the importance reads: means, or means of squared gradients of single images.

    The squares are averaged here: Torch-Pruning's own ``accumulate_grad`` keeps those of the last image only.
    """
    if kind in ("magnitude", "random"):
        return None
    parameters = list(plain.parameters())
    sums, images = [torch.zeros_like(p) for p in parameters], 0
    pairs = islice(((x, y) for xs, ys in batches for x, y in zip(xs, ys, strict=True)), HESSIAN_IMAGES)
    for x, y in batches if kind == "Taylor" else ((x[None], y[None]) for x, y in pairs):
        loss = F.cross_entropy(plain(x).logits, y, reduction="sum")
        for total, gradient in zip(sums, torch.autograd.grad(loss, parameters), strict=True):
            total += gradient if kind == "Taylor" else gradient.square()
        images += len(y)
    return [total / images for total in sums]
