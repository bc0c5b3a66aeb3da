"""Accuracy, loss and executed FLOPs of a network on a set of images."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from models import ResNet, thresholded
from models.decisions import DecisionRule
from utils.augment import Normalisation
from utils.data import ImageSet, plain_batches
from utils.flops import network_cost
from utils.modes import mode_kept


@dataclass(frozen=True)
class Evaluation:
    """A network's figures over N images."""

    loss: float  # mean cross-entropy
    accuracy: float  # 0 to 1
    flops_all: float  # of one image with every block run
    executed: Tensor  # [N] in float64 on the CPU, FLOPs spent on each image
    decisions: Tensor  # [N, K] on the CPU

    @property
    def flops_executed(self) -> float:
        """Mean over the images."""
        return self.executed.mean().item()

    @property
    def computation(self) -> float:
        """Executed FLOPs over the FLOPs with every block run."""
        return self.flops_executed / self.flops_all

    @property
    def passing(self) -> list[float]:
        """Share of the images that each switch lets pass."""
        return self.decisions.mean(dim=0).tolist()


@torch.no_grad()
def evaluate(
    network: ResNet,
    images: ImageSet,
    normalisation: Normalisation,
    decide: DecisionRule = thresholded,
    batch_size: int = 256,
) -> Evaluation:
    """Run ``network`` in evaluation mode, skipped blocks not computed; its mode is restored afterwards."""
    loss = correct = torch.zeros((), device=images.labels.device, dtype=torch.float64)
    decisions = []
    with mode_kept(network, training=False):
        for x, y in plain_batches(images, batch_size, normalisation):
            output = network(x, decide=decide)
            loss = loss + F.cross_entropy(output.logits.float(), y, reduction="sum")
            correct = correct + (output.logits.argmax(dim=1) == y).sum()
            decisions.append(output.decisions.cpu())
    cost = network_cost(network, images.pixels.shape[-1])
    taken = torch.cat(decisions)
    return Evaluation(
        loss=loss.item() / len(images),
        accuracy=correct.item() / len(images),
        flops_all=float(cost.flops),
        executed=cost.executed(taken) if network.switches else torch.full((len(images),), float(cost.flops)).double(),
        decisions=taken,
    )
