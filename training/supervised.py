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
from training.norms import freeze_batch_norms
from training.optimisers import set_learning_rate
from utils import parallel
from utils.data.batches import TrainingBatches
from utils.device import fixed_shapes
from utils.errors import UserError

# Half of the images of a batch pass with every switch held open, so that the whole network, which static pruning works
# on, is trained whatever the switches do.  On the other half decisions are drawn, not thresholded: switches that only
# ever let pass leave a network that has never done without a block, and reinforcement then finds skipping hopeless.
OPEN_SHARE = 0.5
# So that there is something to learn from where a switch is sure to let pass, which all of them become, some of the
# blocks that it would let pass are closed: the network learns to do without any one of them (compare stochastic depth,
# arXiv:1603.09382), and skipping costs it little accuracy later.
EXPLORATION = 0.15
CHECK_EVERY = 50  # steps between looks at the loss, each of which makes a GPU wait

LossFn = Callable[[Tensor, Tensor, Tensor], Tensor]  # of images, logits in float32 and labels: a scalar, the mean


@dataclass(frozen=True)
class EpochMeans:
    """Means over the images of one epoch of training."""

    loss: float
    accuracy: float


@fixed_shapes()
def supervised_epoch(
    network: ResNet,
    batches: TrainingBatches,
    optimiser: Optimizer,
    *,
    learning_rate: Callable[[float], float],
    draws: torch.Generator,
    title: str,
    loss_fn: LossFn | None = None,
    forward: Forward | None = None,
    rule: RuleMaker | None = None,
    frozen_norms: bool = False,
) -> EpochMeans:
    """Train for one epoch.

    Args:
        batches: on the network's device.
        learning_rate: rate as a function of the share of this epoch that is done.
        draws: generator, on the network's device, of decisions and of the images whose switches are held open.
        title: what the progress bar says.
        loss_fn: what is minimised and reported; the cross-entropy by default.
        forward: the network's forward pass, from ``training.forward.training_forward``; plain by default.
        rule: makes a decision rule from numbers [N, 1 + K], uniform in [0, 1).  By default switches learn
            (``half_held_open``); under a rule of one's own no gradient goes through a decision.
        frozen_norms: batch norms use their running statistics and leave them as they are.

    Raises:
        UserError: if the loss stops being finite.
    """
    parallel.broadcast_weights(network)
    network.train()
    if frozen_norms:
        freeze_batch_norms(network)
    forward = training_forward(network) if forward is None else forward
    device = next(network.parameters()).device
    # As in reinforcement, where it is explained.
    skip = rule is not None and frozen_norms and device.type == "cpu"
    steps = len(batches)
    sums = torch.zeros(2, device=device, dtype=torch.float64)  # of the loss and of right answers
    seen = 0
    progress = tqdm(batches, title, steps, leave=False, disable=parallel.hide_progress_bar())
    for step, (x, labels) in enumerate(progress):
        set_learning_rate(optimiser, learning_rate(step / steps))
        optimiser.zero_grad(set_to_none=True)
        images, y = len(labels), parallel.local_part(labels)
        drawn = torch.rand(images, 1 + network.switches, generator=draws, device=device)
        output = forward(x, rule or half_held_open, parallel.local_part(drawn), skip)
        loss = F.cross_entropy(output.logits, y) if loss_fn is None else loss_fn(x, output.logits, y)
        (len(y) / images * loss).backward()
        parallel.all_reduce_gradients(network.parameters())
        optimiser.step()
        sums += torch.stack([len(y) * loss.detach(), (output.logits.argmax(dim=1) == y).sum()])
        seen += images
        if step % CHECK_EVERY == 0 or step == steps - 1:
            check_sums(sums, title)
    loss, accuracy = (parallel.all_reduced(sums) / seen).tolist()
    return EpochMeans(loss, accuracy)


def check_sums(sums: Tensor, title: str) -> None:
    """End training that has diverged.

    Raises:
        UserError: if a sum over the epoch is not finite.
    """
    if not sums.isfinite().all():
        raise UserError(f"the loss is not finite ({title}): lower the learning rate; what was saved before is kept")


def as_used(drawn: Tensor) -> DecisionRule:
    """The rule of evaluation, for training: what was drawn does not count."""
    return thresholded


def half_held_open(drawn: Tensor) -> DecisionRule:
    """Stage 1's rule: some images pass with every switch held open, on the others decisions are drawn.

    Args:
        drawn: [N, 1 + K], uniform in [0, 1): which images are held, and the decisions of K switches.
    """
    held = drawn[:, :1] < OPEN_SHARE
    # A block runs where its number is below its probability.
    numbers = torch.where(held, -1.0, drawn[:, 1:] / (1 - EXPLORATION))
    return straight_through(sampled(numbers), torch.where(held[:, 0], 0.0, 1.0))
