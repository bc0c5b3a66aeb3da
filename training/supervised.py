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
from training.forward import Forward, training_forward
from training.norms import batches_counted_at_once, freeze_batch_norms
from training.optimisers import set_learning_rate
from utils import parallel
from utils.data.batches import TrainingBatches
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
    rule: Callable[..., DecisionRule] | None = None,
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
        rule: makes a decision rule from numbers [N, 1 + K], uniform in [0, 1), and a dtype.  By default switches learn
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
    # Kept until the end of the epoch, since sums would be launches: 5 in a step.
    losses, predicted, expected = [], [], []
    seen = 0
    progress = tqdm(batches, title, steps, leave=False, disable=parallel.hide_progress_bar())
    with batches_counted_at_once(network, steps):
        for step, (x, labels) in enumerate(progress):
            set_learning_rate(optimiser, learning_rate(step / steps))
            optimiser.zero_grad(set_to_none=True)
            images, y = len(labels), parallel.local_part(labels)
            drawn = torch.rand(images, 1 + network.switches, generator=draws, device=device)
            output = forward(x, rule or half_held_open, (parallel.local_part(drawn),), skip)
            loss = F.cross_entropy(output.logits, y) if loss_fn is None else loss_fn(x, output.logits, y)
            loss.backward(torch.full_like(loss, len(y) / images))
            parallel.all_reduce_gradients(network.parameters())
            optimiser.step()
            losses.append(loss.detach())
            predicted.append(output.logits.argmax(dim=1))
            expected.append(y)
            seen += images
            look = step % CHECK_EVERY == 0 or step == steps - 1
            if look and not torch.stack(losses[-CHECK_EVERY:]).isfinite().all():
                raise UserError(
                    f"the loss is not finite ({title}): lower the learning rate; what was saved before is kept"
                )
    loss_sum = torch.stack(losses) @ torch.tensor([len(y) for y in expected], dtype=losses[0].dtype, device=device)
    correct = (torch.cat(predicted) == torch.cat(expected)).sum()
    loss, accuracy = (parallel.all_reduced(torch.stack([loss_sum, correct])) / seen).tolist()
    return EpochMeans(loss, accuracy)


def as_used(drawn: Tensor, dtype: torch.dtype) -> DecisionRule:
    """The rule of evaluation, for training: what was drawn does not count."""
    return thresholded


def half_held_open(drawn: Tensor, dtype: torch.dtype = torch.float32) -> DecisionRule:
    """Stage 1's rule: some images pass with every switch held open, on the others decisions are drawn.

    Args:
        drawn: [N, 1 + K], uniform in [0, 1): which images are held, and the decisions of K switches.
        dtype: of the decisions.
    """
    held = drawn[:, :1] < OPEN_SHARE
    # Of all switches at once, which is 26 launches fewer: a block runs where its number is below its probability.
    numbers = torch.where(held, -1.0, drawn[:, 1:] / (1 - EXPLORATION))
    return straight_through(sampled(numbers, dtype), torch.where(held[:, 0], 0.0, 1.0))
