"""Training that also follows the predictions of the network that it started from, or was before pruning."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models import LowRankConv2d, ResNet
from models.resnet import BasicBlock
from training.supervised import LossFn

# Softens both predictions so that small probabilities count; for small networks arXiv:1503.02531 found 2.5 to 4 to work
# best (section 3).
TEMPERATURE = 4.0


def distillation_loss(logits: Tensor, teacher: Tensor, labels: Tensor, weight: float) -> Tensor:
    """(1 - weight) * cross-entropy + weight * T^2 * KL(teacher || network) at temperature T, means over the images.

    Source: Hinton et al. (arXiv:1503.02531), section 2; T^2 keeps the gradients of both terms of one size.

    Args:
        logits, teacher: [N, classes] of the network and of the one it follows.
        weight: in [0, 1].
    """
    softened = F.kl_div(
        (logits / TEMPERATURE).log_softmax(dim=1),
        (teacher / TEMPERATURE).log_softmax(dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - weight) * F.cross_entropy(logits, labels) + weight * TEMPERATURE**2 * softened


def distillation_loss_fn(teacher: ResNet, weight: float, precision: torch.dtype = torch.float32) -> LossFn:
    """``distillation_loss`` as the epochs of training take it (``training.supervised``, ``gating.reinforce``).

    Args:
        teacher: every block of it runs, as in evaluation mode.
        weight: of the distillation in the loss.
        precision: of the teacher, from ``utils.device.pick_precision``.
    """
    bare = _bare(teacher).to(precision)

    def loss_fn(x: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            target = bare(x.to(precision)).logits
        return distillation_loss(logits, target.float(), labels, weight)

    return loss_fn


def _bare(network: ResNet) -> ResNet:
    """A copy without gates, its batch norms folded into the convolutions: 82 launches, of ResNet-32's 277 in bf16."""
    bare = copy.deepcopy(network).eval()
    bare.gate = None
    bare.stem = _folded(*bare.stem)
    for block in bare.blocks:
        if isinstance(block, BasicBlock):
            block.conv1, block.bn1 = _folded(block.conv1, block.bn1), nn.Identity()
            block.conv2, block.bn2 = _folded(block.conv2, block.bn2), nn.Identity()
        if block.shortcut is not None:
            block.shortcut = _folded(*block.shortcut)
    return bare


def _folded(layer: nn.Conv2d | LowRankConv2d, norm: nn.Module) -> nn.Module:
    if isinstance(layer, nn.Conv2d):
        return fuse_conv_bn_eval(layer, norm)
    last = "core" if layer.rotate_out is None else "rotate_out"
    setattr(layer, last, fuse_conv_bn_eval(getattr(layer, last), norm))
    return layer
