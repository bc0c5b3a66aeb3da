"""Accuracy, loss and executed FLOPs of a network on a set of images."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from models import ResNet, thresholded
from models.decisions import DecisionRule
from utils import parallel
from utils.augment import Normalisation
from utils.data import plain_batches
from utils.flops import network_cost
from utils.images import Images
from utils.modes import mode_kept


@dataclass(frozen=True)
class Evaluation:
    """A network's figures over N images."""

    loss: float  # mean cross-entropy
    accuracy: float  # 0 to 1
    flops_all: float  # of one image with every block run
    executed: Tensor  # [N] in float64 on the CPU, FLOPs spent on each image
    decisions: Tensor  # [N, K] on the CPU
    probabilities: Tensor  # [N, K] on the CPU, that each switch lets pass, after what the switches before it decided

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
    images: Images,
    normalisation: Normalisation,
    decide: DecisionRule = thresholded,
    batch_size: int = 256,
) -> Evaluation:
    """Run ``network`` in evaluation mode, skipped blocks not computed; its mode is restored afterwards.

    Each of several processes runs it on its part of the images, and all get the figures of all images.
    """
    loss = correct = torch.zeros((), device=images.device, dtype=torch.float64)
    own = parallel.own_slice(len(images))
    switches = torch.zeros(2, len(images), network.switches)  # decisions and probabilities
    seen = [switches.new_empty(2, 0, network.switches, device=images.device)]
    with mode_kept(network, training=False):
        for x, y in plain_batches(images[own], batch_size, normalisation):
            output = network(x, decide=decide)
            loss = loss + F.cross_entropy(output.logits.float(), y, reduction="sum")
            correct = correct + (output.logits.argmax(dim=1) == y).sum()
            seen.append(torch.stack([output.decisions, output.probabilities]).float())
    loss, correct = parallel.summed(torch.stack([loss, correct])).tolist()
    switches[:, own] = torch.cat(seen, dim=1).cpu()
    decisions, probabilities = parallel.summed(switches)
    cost = network_cost(network, images.image_size)
    return Evaluation(
        loss=loss / len(images),
        accuracy=correct / len(images),
        flops_all=float(cost.flops),
        executed=cost.executed(decisions)
        if network.switches
        else torch.full((len(images),), float(cost.flops)).double(),
        decisions=decisions,
        probabilities=probabilities,
    )
