"""Supervised training of network and switches together: cross-entropy through straight-through decisions."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from tqdm import tqdm

from models import ResNet, sampled, straight_through, thresholded
from models.decisions import DecisionRule
from training.forward import Forward, RuleMaker, training_forward
from training.means import Means
from training.norms import freeze_batch_norms
from training.optimisers import set_learning_rate
from utils import parallel
from utils.data.batches import TrainingBatches
from utils.device import fixed_shapes

# Half of the images of a batch run every block, so that the whole network, which static pruning works on, is trained
# whatever the switches do.  On the other half decisions are drawn, not thresholded: if every block always ran, the
# network would never learn to do without one, and reinforcement would find that every skip costs too much.
OPEN_SHARE = 0.5
# All switches become sure that their blocks should run.  So this share of the blocks that would run is skipped at
# random: the network learns to do without any one of them (compare stochastic depth, arXiv:1603.09382), and skipping
# costs little accuracy later.
EXPLORATION = 0.15
CHECK_EVERY = 50  # steps between checks of the loss, each of which makes a GPU wait

LossFn = Callable[[Tensor, Tensor, Tensor], Tensor]  # of images, logits in float32 and labels: a scalar, the mean


@dataclass(frozen=True)
class EpochMeans:
    """Means over the images of one epoch of training."""

    loss: float  # cross-entropy, also where another loss is minimised
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """The objects and options of supervised training."""

    network: ResNet
    optimiser: Optimizer
    draws: torch.Generator  # on the network's device, of decisions and of the images whose switches are held open
    loss_fn: LossFn | None = None  # minimised; the cross-entropy by default
    forward: Forward | None = None  # from ``training.forward.training_forward``; plain by default
    # Makes a decision rule from numbers [N, 1 + K], uniform in [0, 1).  By default switches learn (``half_held_open``);
    # other rules carry no gradient through decisions, and the gates are not trained.
    rule: RuleMaker | None = None
    frozen_norms: bool = False  # batch norms use their running statistics and leave them as they are


@fixed_shapes()
def supervised_epoch(
    training: Supervision, batches: TrainingBatches, learning_rate: Callable[[float], float], title: str
) -> EpochMeans:
    """Train for one epoch.

    Args:
        batches: on the network's device.
        learning_rate: rate as a function of the share of this epoch that is done.
        title: what the progress bar says.

    Raises:
        UserError: if the loss stops being finite.
    """
    network, optimiser, loss_fn = training.network, training.optimiser, training.loss_fn
    parallel.broadcast_weights(network)
    network.train()
    if training.frozen_norms:
        freeze_batch_norms(network)
    elif training.rule is not None and network.gate is not None:
        freeze_batch_norms(network.gate)
    forward = training.forward or training_forward(network)
    device = next(network.parameters()).device
    # As in reinforcement, where it is explained.
    skip = training.rule is not None and training.frozen_norms and device.type == "cpu"
    steps, means = len(batches), Means()
    for step, (x, labels) in enumerate(tqdm(batches, title, steps, leave=False, disable=parallel.hide_progress_bar())):
        set_learning_rate(optimiser, learning_rate(step / steps))
        optimiser.zero_grad(set_to_none=True)
        images, y = len(labels), parallel.local_part(labels)
        drawn = torch.rand(images, 1 + network.switches, generator=training.draws, device=device)
        output = forward(x, training.rule or half_held_open, parallel.local_part(drawn), skip)
        cross_entropy = F.cross_entropy(output.logits, y)
        loss = cross_entropy if loss_fn is None else loss_fn(x, output.logits, y)
        (len(y) / images * loss).backward()
        parallel.all_reduce_gradients(network.parameters())
        optimiser.step()
        means.add(images, loss=len(y) * cross_entropy, accuracy=output.logits.argmax(dim=1) == y)
        if step % CHECK_EVERY == 0 or step == steps - 1:
            means.check(title)
    return EpochMeans(**means.over_all())


def as_used(drawn: Tensor) -> DecisionRule:
    """The rule of evaluation, for training: the drawn numbers are ignored."""
    return thresholded


def half_held_open(drawn: Tensor) -> DecisionRule:
    """Stage 1's rule: on some images every block runs, on the others decisions are drawn.

    Args:
        drawn: [N, 1 + K], uniform in [0, 1): which images run every block, and the decisions of K switches.
    """
    held = drawn[:, :1] < OPEN_SHARE
    # A block runs where its number is below its probability.
    numbers = torch.where(held, -1.0, drawn[:, 1:] / (1 - EXPLORATION))
    return straight_through(sampled(numbers), torch.where(held[:, 0], 0.0, 1.0))
