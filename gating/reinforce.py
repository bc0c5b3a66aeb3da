"""Hybrid reinforcement: the switches learn to skip by REINFORCE while the network keeps learning by cross-entropy."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from tqdm import tqdm

from gating.baselines import Baseline, thresholded_returns
from gating.batch_norms import freeze_batch_norms
from gating.forward import Forward, training_forward
from gating.objectives import entropy, policy_loss, returns, skip_rewards
from gating.steering import FixedAlpha, SteeredAlpha
from gating.supervised import CHECK_EVERY, EpochFigures, Loss
from models import ResNet, by_image, sampled, thresholded
from models.decisions import DecisionRule
from utils import parallel
from utils.device import mixed_precision
from utils.errors import UserError
from utils.schedule import set_learning_rate


@dataclass(frozen=True)
class Objective:
    """loss = supervised + rl_weight * (policy loss - entropy_weight * entropy), see ``gating.objectives``.

    The supervised loss is the mean cross-entropy unless another one is given.
    """

    gamma: float
    rl_weight: float
    entropy_weight: float


@dataclass(frozen=True)
class ReinforceFigures(EpochFigures):
    """Means over the images of one epoch; all but the first two over those whose decisions were drawn."""

    total_return: float  # of the first switch: skip rewards less cross-entropy
    return_deviation: float  # its standard deviation over the images
    advantage_deviation: float  # the same of what the baseline leaves of it
    entropy: float  # of one decision, in nats
    executed: float  # share of the skippable FLOPs that ran
    alpha: float  # mean over the steps


def reinforce_epoch(
    network: ResNet,
    batches: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    optimisers: Sequence[Optimizer],
    learning_rates: Callable[[float], tuple[float, float]],
    objective: Objective,
    alpha: FixedAlpha | SteeredAlpha,
    shares: Tensor,
    baseline: Baseline,
    batch_norm: str,
    draws: torch.Generator,
    title: str,
    loss_of: Loss | None = None,
    forward: Forward | None = None,
) -> ReinforceFigures:
    """Train for one epoch.

    On every other image of a batch the decisions are drawn from the switches, and the switches learn from what these
    images earn.  The others pass as they will pass when the network is used: the network learns the paths that count
    without the noise of drawn ones, which on their own cost accuracy that only a vanishing learning rate brings back.

    Args:
        batches: normalised images [B, 3, H, W] and labels [B] on the network's device; where several processes share
            the batches, the images of this process's part and the labels of the whole (``utils.parallel``).
        steps: number of batches.
        optimisers: of the network and of its gates.
        learning_rates: of these two, as a function of the share of this epoch that is done.
        alpha: the reward of skipping everything, in nats, which may be steered from step to step.
        shares: [K], each block's share of the skippable FLOPs.
        batch_norm: "frozen" uses running statistics; in other modes they follow the drawn paths.
        draws: generator of the decisions, on the network's device.
        loss_of: the supervised loss; the cross-entropy by default.  Returns are made of the cross-entropy in any case.
        forward: the network's forward pass, from ``gating.forward.training_forward``; not compiled by default.

    Raises:
        UserError: if the loss stops being finite.
    """
    parallel.same_everywhere(network)
    network.train()
    if batch_norm == "frozen":
        freeze_batch_norms(network)
    device = next(network.parameters()).device
    shares = shares.to(device)
    # Drawn decisions carry no gradient, so blocks may really be skipped in training.  A GPU would wait for each gather;
    # norms that follow the paths see all images, as published.
    skip = device.type == "cpu" and batch_norm == "frozen"
    # How many images a block sees differs from batch to batch where blocks are skipped: no compiled code keeps up.
    forward = training_forward(network) if forward is None or device.type == "cpu" else forward
    every, explored = (torch.zeros(n, device=device, dtype=torch.float64) for n in (2, 7))
    seen = explorers = 0
    for step, (x, labels) in enumerate(tqdm(batches, title, steps, leave=False, disable=parallel.no_bar())):
        images, y = len(labels), parallel.part(labels)
        weight = len(y) / images  # of this process's means in those of the batch
        start, drawing = parallel.own_slice(images).start, (images + 1) // 2  # of the whole batch
        exploring = torch.arange(start, start + len(y), device=device) % 2 == 0
        own, others = slice(start % 2, None, 2), slice(1 - start % 2, None, 2)  # a GPU would wait for masks
        for optimiser, rate in zip(optimisers, learning_rates(step / steps), strict=True):
            set_learning_rate(optimiser, rate)
            optimiser.zero_grad(set_to_none=True)
        drawn = torch.rand(images, len(shares), generator=draws, device=device)
        with mixed_precision(device):
            logits, probabilities, decisions = forward(x, partly_sampled, (exploring, parallel.part(drawn)), skip)
        cross_entropy = F.cross_entropy(logits.float(), y, reduction="none")
        reward = alpha.value()
        p, z = probabilities[own], decisions[own]
        gained = returns(skip_rewards(z, shares, reward), cross_entropy[own].detach(), objective.gamma)

        def greedy_returns(x: Tensor = x[own], y: Tensor = y[own], reward: float | Tensor = reward) -> Tensor:
            with mixed_precision(device):
                return thresholded_returns(
                    network, x, y, shares, reward, objective.gamma, skip=device.type == "cpu", forward=forward
                )

        advantages = gained - baseline(gained, p, greedy_returns, drawing)
        uncertainty = entropy(p)
        policy = policy_loss(p, z, advantages) - objective.entropy_weight * uncertainty
        supervised = cross_entropy.mean() if loss_of is None else loss_of(x, logits.float(), y)
        # One of several processes may have a single image, which does not explore: a mean over none.  Its gates still
        # have to go backward with those of the others, whose shared norms wait for them.
        reinforced = len(p) / drawing * policy if len(p) else 0 * probabilities.sum()
        (weight * supervised + objective.rl_weight * reinforced).backward()
        parallel.sum_gradients(network.parameters())
        for optimiser in optimisers:
            optimiser.step()
        with torch.no_grad():
            alpha.observe(parallel.summed((decisions[others] @ shares).sum()) / max(1, images // 2))
            returned, left = gained[:, 0], advantages[:, 0]
            correct = (logits.argmax(dim=1) == y).float()
            figures = [returned, returned.square(), left, left.square(), z @ shares]
            figures += [(uncertainty / len(shares)).expand_as(left), reward * torch.ones_like(left)]
            every += torch.stack([cross_entropy, correct]).double().sum(dim=1)
            explored += torch.stack(figures).double().sum(dim=1)
        explorers += drawing
        seen += images
        if (step % CHECK_EVERY == 0 or step == steps - 1) and not torch.isfinite(every.sum() + explored.sum()):
            raise UserError(f"the loss is not finite ({title}): lower the learning rate; what was saved before is kept")
    loss, accuracy = (parallel.summed(every) / seen).tolist()
    mean, square, left, left_square, executed, uncertain, mean_alpha = (parallel.summed(explored) / explorers).tolist()
    deviation, remaining = (max(s - m**2, 0) ** 0.5 for s, m in ((square, mean), (left_square, left)))
    return ReinforceFigures(loss, accuracy, mean, deviation, remaining, uncertain, executed, mean_alpha)


def partly_sampled(exploring: Tensor, drawn: Tensor) -> DecisionRule:
    """Rule that draws the decisions of the exploring images and thresholds those of the others.

    Args:
        exploring: boolean [N].
        drawn: [N, K], uniform in [0, 1).
    """
    return by_image(exploring, sampled(drawn), thresholded)
