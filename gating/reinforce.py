"""Hybrid reinforcement: the switches learn to skip by REINFORCE while the network keeps learning by cross-entropy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from tqdm import tqdm

from gating.objectives import entropy, policy_loss, returns, skip_rewards
from gating.steering import FixedAlpha, SteeredAlpha
from models import ResNet, RoutedOutput, sampled, thresholded
from training.forward import Forward, RuleMaker, training_forward
from training.means import Means
from training.norms import freeze_batch_norms
from training.optimisers import set_learning_rate
from training.supervised import CHECK_EVERY, EpochMeans, LossFn, Supervision, as_used, supervised_epoch
from utils import parallel
from utils.data.batches import TrainingBatches
from utils.device import fixed_shapes
from utils.modes import evaluation_mode


@dataclass(frozen=True)
class ReinforceMeans(EpochMeans):
    """Means over the images of one epoch; all but the first two over those whose decisions were drawn."""

    total_return: float  # of the first switch: skip rewards less cross-entropy
    return_deviation: float  # its standard deviation over the images
    advantage_deviation: float  # the same of the return minus the baseline
    entropy: float  # of one decision, in nats
    executed: float  # share of the skippable FLOPs that ran
    alpha: float  # mean over the steps


@dataclass(frozen=True, kw_only=True)
class Reinforcement:
    """What stage 3 trains and how: loss = supervised + rl_weight * policy loss.

    ``gating.objectives`` has the terms.  The supervised loss is the mean cross-entropy unless ``loss_fn`` is given;
    returns are made of the cross-entropy in any case.
    """

    network: ResNet
    optimisers: Sequence[Optimizer]  # of the network and of its gates, or one of both
    shares: Tensor  # [K], each block's share of the skippable FLOPs, on the network's device
    draws: torch.Generator  # of the decisions, on the network's device
    gamma: float = 1.0
    rl_weight: float = 0.1
    # As in SkipNet: all images of a batch draw, not every other one, and there is no baseline.
    published: bool = False
    frozen_norms: bool = True  # they use running statistics; else they follow the drawn paths
    loss_fn: LossFn | None = None
    forward: Forward | None = None  # from ``training.forward.training_forward``; plain by default

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def run(self, x: Tensor, rule: RuleMaker, drawn: Tensor) -> RoutedOutput:
        """One forward pass.

        Drawn decisions carry no gradient, so a CPU really skips blocks in training.  A GPU would wait for each gather,
        and batch norms that follow the decisions see all images, as published.
        """
        forward = self.forward or training_forward(self.network)
        frozen = self.frozen_norms or not self.network.training
        return forward(x, rule, drawn, self.device.type == "cpu" and frozen)


class Sample(NamedTuple):
    """One pass over this process's part of a batch: N images, n of which explored, K switches."""

    logits: Tensor  # [N, classes]
    cross_entropy: Tensor  # [N]
    probabilities: Tensor  # [N, K]
    decisions: Tensor  # [n, K], drawn
    returns: Tensor  # [n, K], what they have earned


@fixed_shapes()
def reinforce_epoch(
    setup: Reinforcement,
    batches: TrainingBatches,
    learning_rates: Sequence[Callable[[float], float]],
    alpha: FixedAlpha | SteeredAlpha,
    title: str,
) -> ReinforceMeans:
    """Train for one epoch.

    On every other image of a batch the decisions are drawn from the switches, and the switches learn from what these
    images earn.  The others use thresholded decisions, as at inference: with drawn decisions alone the network lost
    accuracy that only a vanishing learning rate restored.

    Args:
        batches: on the network's device.
        learning_rates: of the optimisers, as functions of the share of this epoch that is done.
        alpha: the reward for skipping every block, in nats, which may change from step to step.
        title: what the progress bar says.

    Raises:
        UserError: if the loss stops being finite.
    """
    network, shares, steps = setup.network, setup.shares, len(batches)
    parallel.broadcast_weights(network)
    network.train()
    if setup.frozen_norms:
        freeze_batch_norms(network)
    every, explored = Means(), Means()
    for step, (x, labels) in enumerate(tqdm(batches, title, steps, leave=False, disable=parallel.hide_progress_bar())):
        for optimiser, rate in zip(setup.optimisers, learning_rates, strict=True):
            set_learning_rate(optimiser, rate(step / steps))
            optimiser.zero_grad(set_to_none=True)
        images, y, reward = len(labels), parallel.local_part(labels), alpha.value()
        explorers, others = exploring_parts(images, setup.published)
        exploring = images if setup.published else (images + 1) // 2  # of the whole batch

        sample = draw_sample(setup, x, labels, reward)
        advantages = sample.returns
        if not setup.published:
            advantages = advantages - thresholded_returns(setup, x[explorers], y[explorers], reward)
        p = sample.probabilities[explorers]
        policy = policy_loss(p, sample.decisions, advantages, exploring)
        supervised = sample.cross_entropy.mean() if setup.loss_fn is None else setup.loss_fn(x, sample.logits, y)
        (len(y) / images * supervised + setup.rl_weight * policy).backward()
        parallel.all_reduce_gradients(network.parameters())
        for optimiser in setup.optimisers:
            optimiser.step()

        executed = (thresholded(sample.probabilities[others]) @ shares).sum()
        alpha.observe(parallel.all_reduced(executed) / max(1, images if setup.published else images - exploring))
        every.add(images, loss=sample.cross_entropy, accuracy=sample.logits.argmax(dim=1) == y)
        first, left = sample.returns[:, 0], advantages[:, 0]
        explored.add(
            exploring, total_return=first, squared_return=first.square(), advantage=left,
            squared_advantage=left.square(), executed=sample.decisions @ shares,
            entropy=(entropy(p) / shares.count_nonzero()).expand_as(left), alpha=reward * torch.ones_like(left),
        )  # fmt: skip
        if step % CHECK_EVERY == 0 or step == steps - 1:
            every.check(title)
            explored.check(title)
    means = explored.over_all()
    return ReinforceMeans(
        **every.over_all(),
        **{name: means[name] for name in ("total_return", "entropy", "executed", "alpha")},
        return_deviation=deviation(means["total_return"], means["squared_return"]),
        advantage_deviation=deviation(means["advantage"], means["squared_advantage"]),
    )


def draw_sample(setup: Reinforcement, x: Tensor, labels: Tensor, reward: float | Tensor) -> Sample:
    """Run this process's part of a batch: exploring images draw their decisions, the others threshold them.

    Args:
        x: of this process.
        labels: of the whole batch.
        reward: for skipping every block.
    """
    explorers, others = exploring_parts(len(labels), setup.published)
    numbers = torch.rand(len(labels), len(setup.shares), generator=setup.draws, device=setup.device)
    numbers = parallel.local_part(numbers)
    if not setup.published:
        numbers[others] = 0.5  # a block runs where its probability is above one half
    logits, probabilities, decisions = setup.run(x, sampled, numbers)
    cross_entropy = F.cross_entropy(logits, parallel.local_part(labels), reduction="none")
    rewards = skip_rewards(decisions[explorers], setup.shares, reward)
    gained = returns(rewards, cross_entropy[explorers].detach(), setup.gamma)
    return Sample(logits, cross_entropy, probabilities, decisions[explorers], gained)


@torch.no_grad()
def thresholded_returns(setup: Reinforcement, x: Tensor, y: Tensor, reward: float | Tensor) -> Tensor:
    """Baselines [N, K]: the returns that thresholded decisions earn on the same images, in evaluation.

    A baseline that does not depend on the decision it judges leaves the expected policy gradient as it is and lowers
    its variance (Williams 1992, "Simple statistical gradient-following algorithms", section 4).  This one is that of
    self-critical training (arXiv:1612.00563, section 3.2), at the price of one more forward pass.
    """
    with evaluation_mode(setup.network):
        output = setup.run(x, as_used, torch.empty(0))
    cross_entropy = F.cross_entropy(output.logits, y, reduction="none")
    return returns(skip_rewards(output.decisions, setup.shares, reward), cross_entropy, setup.gamma)


def exploring_parts(images: int, all_explore: bool) -> tuple[slice, slice]:
    """Which images of this process's part of a batch draw their decisions; the others steer alpha.

    Every other image of the whole batch explores.  Slices, since a GPU would wait for masks.
    """
    if all_explore:
        return slice(None), slice(None)
    first = parallel.local_slice(images).start % 2
    return slice(first, None, 2), slice(1 - first, None, 2)


def deviation(mean: float, mean_square: float) -> float:
    return max(mean_square - mean**2, 0) ** 0.5


def closing_epoch(
    setup: Reinforcement, batches: TrainingBatches, learning_rate: Callable[[float], float], title: str
) -> EpochMeans:
    """Train the network alone for one epoch with thresholded decisions, as at inference; the gates are frozen.

    Drawn decisions are noise to the network.  Once the policy has learned, they are no longer needed, and the network
    adapts to the thresholded decisions on all images.

    Args:
        learning_rate: of the network.
    """
    training = Supervision(
        network=setup.network, optimiser=setup.optimisers[0], draws=setup.draws, loss_fn=setup.loss_fn,
        forward=setup.forward, rule=as_used, frozen_norms=setup.frozen_norms,
    )  # fmt: skip
    return supervised_epoch(training, batches, learning_rate, title)
