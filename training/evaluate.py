"""Accuracy, loss and executed FLOPs of a network on a set of images."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from models import ResNet, all_on, thresholded
from models.decisions import DecisionRule
from training.means import diverged
from utils import parallel
from utils.data.augment import Normalisation
from utils.data.batches import plain_batches
from utils.data.images import Images
from utils.device import mixed_precision
from utils.flops import network_cost
from utils.modes import evaluation_mode
from utils.sizes import Size


@dataclass(frozen=True)
class Evaluation:
    """The measurements of a network on N images."""

    loss: float  # mean cross-entropy
    accuracy: float  # 0 to 1
    flops_all: float  # of one image with every block run
    executed: Tensor  # [N] in float64 on the CPU, FLOPs spent on each image
    decisions: Tensor  # [N, K] on the CPU
    logits: Tensor  # [N, classes] on the CPU
    probabilities: Tensor  # [N, K] on the CPU, that each switched block runs, given the decisions before it

    @property
    def flops_executed(self) -> float:
        """Mean over the images."""
        return self.executed.mean().item()

    @property
    def computation(self) -> float:
        """Executed FLOPs over the FLOPs with every block run."""
        return self.flops_executed / self.flops_all

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics that a checkpoint keeps."""
        return {"accuracy": self.accuracy, "computation": self.computation}

    @property
    def score(self) -> list[float]:
        """Larger is better: the accuracy and, of networks with the same one, as on few images, the loss."""
        return [self.accuracy, -self.loss]

    @property
    def run_shares(self) -> list[float]:
        """Share of the images for which each switched block runs."""
        return self.decisions.mean(dim=0).tolist()


@dataclass(frozen=True)
class Evaluator:
    """Measures networks on one set of images.  Each of several processes takes its part, and all get the results."""

    images: Images
    normalisation: Normalisation
    image_size: Size
    precision: torch.dtype = torch.float32  # of products, from ``utils.device.pick_precision``
    batch_size: int = 256

    @torch.no_grad()
    def __call__(self, network: ResNet, decide: DecisionRule = thresholded) -> Evaluation:
        """Run ``network`` in evaluation mode, skipped blocks not computed; its mode is restored afterwards."""
        images, cost = self.images, network_cost(network, self.image_size)
        loss = correct = torch.zeros((), device=images.device, dtype=torch.float64)
        local = parallel.local_slice(len(images))
        switches = torch.zeros(2, len(images), network.switches)  # decisions and probabilities
        seen, answers = [switches.new_empty(2, 0, network.switches, device=images.device)], []
        with evaluation_mode(network), mixed_precision(images.device, self.precision):
            for x, y in plain_batches(images[local], self.batch_size, self.normalisation):
                output = network(x, decide=decide)
                loss = loss + F.cross_entropy(output.logits, y, reduction="sum")
                correct = correct + (output.logits.argmax(dim=1) == y).sum()
                seen.append(torch.stack([output.decisions, output.probabilities]).float())
                answers.append(output.logits.float())
        loss, correct = parallel.all_reduced(torch.stack([loss, correct])).tolist()
        switches[:, local] = torch.cat(seen, dim=1).cpu()
        decisions, probabilities = parallel.all_reduced(switches)
        classes = parallel.broadcast_object(answers[0].shape[1] if answers else 0)  # the first process has images
        logits = torch.zeros(len(images), classes)
        if answers:
            logits[local] = torch.cat(answers).cpu()
        return Evaluation(
            loss=loss / len(images),
            accuracy=correct / len(images),
            flops_all=float(cost.flops),
            executed=cost.executed(decisions),
            decisions=decisions,
            logits=parallel.all_reduced(logits),
            probabilities=probabilities,
        )

    def both(self, network: ResNet) -> tuple[Evaluation, Evaluation]:
        """The network as its switches decide, and with every block run; the same where it has none."""
        decided = self(network)
        return decided, self(network, all_on) if network.switches else decided


def check_finite(network: ResNet, val: Evaluation, title: str) -> None:
    """Refuse to save a network that diverged in the last step of an epoch, after the last training loss.

    Raises:
        UserError: if its loss or one of its weights is not finite.
    """
    weights = torch.stack([torch.isfinite(tensor).all() for tensor in network.state_dict().values()]).all()
    if not math.isfinite(val.loss) or not weights:
        raise diverged(title)
