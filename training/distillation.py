"""Distillation from the network that training started from, or from the network before pruning."""

import torch
from torch import Tensor
from torch.nn import functional as F

from models import ResNet
from training.supervised import LossFn
from utils.device import mixed_precision

# Softens both predictions so that small probabilities count; for small networks arXiv:1503.02531 found 2.5 to 4 to work
# best (section 3).
TEMPERATURE = 4.0


def distillation_loss(logits: Tensor, teacher: Tensor, labels: Tensor, weight: float) -> Tensor:
    """(1 - weight) * cross-entropy + weight * T^2 * KL(teacher || network) at temperature T, means over the images.

    Source: Hinton et al. (arXiv:1503.02531), section 2; T^2 keeps the gradients of both terms at the same size.

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
        teacher: from now on it is in evaluation mode and has no gate: every block runs.
        weight: of the distillation in the loss.
        precision: of the teacher's convolutions and matrix products, from ``utils.device.pick_precision``.
    """
    teacher.eval()
    teacher.gate = None

    def loss_fn(x: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad(), mixed_precision(x.device, precision):
            target = teacher(x).logits
        return distillation_loss(logits, target.float(), labels, weight)

    return loss_fn
