"""Supervised training of network and switches together: cross-entropy through straight-through decisions."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from tqdm import tqdm

from models import ResNet, held_open, sampled_straight_through
from utils.device import mixed_precision
from utils.errors import UserError
from utils.schedule import set_learning_rate

# Half of the images of a batch pass with every switch held open, so that the whole network, which static pruning works
# on, is trained whatever the switches do.  On the other half decisions are drawn, not thresholded: switches that only
# ever let pass leave a network that has never done without a block, and reinforcement then finds skipping hopeless.
OPEN_SHARE = 0.5
CHECK_EVERY = 50  # steps between looks at the loss, each of which makes a GPU wait


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of images, logits in float32 and labels: a scalar, the mean


@dataclass(frozen=True)
class EpochFigures:
    """Means over the images of one epoch of training."""

    loss: float
    accuracy: float


def supervised_epoch(
    network: ResNet,
    batches: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    optimiser: Optimizer,
    learning_rate: Callable[[float], float],
    draws: torch.Generator,
    title: str,
    loss_of: Loss | None = None,
) -> EpochFigures:
    """Train for one epoch.

    Args:
        batches: normalised images [B, 3, H, W] and labels [B] on the network's device.
        steps: number of batches.
        learning_rate: rate as a function of the share of this epoch that is done.
        draws: generator, on the network's device, of decisions and of the images whose switches are held open.
        title: what the progress bar says.
        loss_of: what is minimised and reported; the cross-entropy by default.

    Raises:
        UserError: if the loss stops being finite.
    """
    network.train()
    device = next(network.parameters()).device
    loss_sum = correct = torch.zeros((), device=device)
    seen = 0
    for step, (x, y) in enumerate(tqdm(batches, title, steps, leave=False, disable=None)):
        set_learning_rate(optimiser, learning_rate(step / steps))
        held = torch.rand(len(y), generator=draws, device=device) < OPEN_SHARE
        with mixed_precision(device):
            output = network(x, decide=held_open(held, sampled_straight_through(draws)))
        logits = output.logits.float()
        loss = F.cross_entropy(logits, y) if loss_of is None else loss_of(x, logits, y)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        loss_sum = loss_sum + loss.detach() * len(y)
        correct = correct + (output.logits.detach().argmax(dim=1) == y).sum()
        seen += len(y)
        if (step % CHECK_EVERY == 0 or step == steps - 1) and not torch.isfinite(loss_sum):
            raise UserError(f"the loss is not finite ({title}): lower the learning rate; what was saved before is kept")
    return EpochFigures(loss_sum.item() / seen, correct.item() / seen)
