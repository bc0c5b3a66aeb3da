"""Hybrid reinforcement: the switches learn to skip by REINFORCE while the network keeps learning by cross-entropy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from tqdm import tqdm

from gating.baselines import baseline, thresholded_returns
from gating.objectives import entropy, policy_loss, returns, skip_rewards
from gating.steering import FixedAlpha, SteeredAlpha
from models import ResNet, sampled, thresholded
from training.forward import Forward, training_forward
from training.norms import freeze_batch_norms
from training.optimisers import set_learning_rate
from training.supervised import CHECK_EVERY, EpochMeans, LossFn, as_used, check_sums, supervised_epoch
from utils import parallel
from utils.data.batches import TrainingBatches
from utils.device import fixed_shapes


@dataclass(frozen=True)
class ReinforceMeans(EpochMeans):
    """Means over the images of one epoch; all but the first two over those whose decisions were drawn."""

    total_return: float  # of the first switch: skip rewards less cross-entropy
    return_deviation: float  # its standard deviation over the images
    advantage_deviation: float  # the same of what the baseline leaves of it
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
    shares: Tensor  # [K], each block's share of the skippable FLOPs
    draws: torch.Generator  # of the decisions, on the network's device
    all_explore: bool = False  # every image of a batch draws its decisions, as published, not every other one
    gamma: float = 1.0
    rl_weight: float = 0.1
    baseline: str = "greedy"  # one of ``gating.baselines.BASELINES``
    batch_norm: str = "frozen"  # "frozen" uses running statistics; in other modes they follow the drawn paths
    loss_fn: LossFn | None = None
    forward: Forward | None = None  # from ``training.forward.training_forward``; plain by default


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
    images earn.  The others pass as they will pass when the network is used: the network learns the paths that count
    without the noise of drawn ones, which alone cost accuracy that only a vanishing learning rate brings back.

    Args:
        batches: on the network's device.
        learning_rates: of the optimisers, as functions of the share of this epoch that is done.
        alpha: the reward of skipping everything, in nats, which may be steered from step to step.
        title: what the progress bar says.

    Raises:
        UserError: if the loss stops being finite.
    """
    network, loss_fn, steps = setup.network, setup.loss_fn, len(batches)
    parallel.broadcast_weights(network)
    network.train()
    if setup.batch_norm == "frozen":
        freeze_batch_norms(network)
    device = next(network.parameters()).device
    shares = setup.shares.to(device)
    # Drawn decisions carry no gradient, so blocks may really be skipped in training.  A GPU would wait for each gather;
    # norms that follow the paths see all images, as published.
    skip = device.type == "cpu" and setup.batch_norm == "frozen"
    forward = training_forward(network) if setup.forward is None else setup.forward
    every, explored = (torch.zeros(n, device=device, dtype=torch.float64) for n in (2, 7))
    seen = explored_images = 0
    for step, (x, labels) in enumerate(tqdm(batches, title, steps, leave=False, disable=parallel.hide_progress_bar())):
        images, y = len(labels), parallel.local_part(labels)
        weight = len(y) / images  # of this process's means in those of the batch
        explorers, watched = exploring_parts(images, setup.all_explore)
        drawing = len(range(images)[:: 1 if setup.all_explore else 2])  # of the whole batch
        for optimiser, rate in zip(setup.optimisers, learning_rates, strict=True):
            set_learning_rate(optimiser, rate(step / steps))
            optimiser.zero_grad(set_to_none=True)
        drawn = parallel.local_part(torch.rand(images, len(shares), generator=setup.draws, device=device))
        if not setup.all_explore:
            drawn[watched] = 0.5  # a block runs where its probability is above one half
        logits, probabilities, decisions = forward(x, sampled, drawn, skip)
        cross_entropy = F.cross_entropy(logits, y, reduction="none")
        reward = alpha.value()
        p, z = probabilities[explorers], decisions[explorers]
        gained = returns(skip_rewards(z, shares, reward), cross_entropy[explorers].detach(), setup.gamma)

        def greedy_returns(
            x: Tensor = x[explorers], y: Tensor = y[explorers], reward: float | Tensor = reward
        ) -> Tensor:
            skip = device.type == "cpu"
            return thresholded_returns(network, x, y, shares, reward, setup.gamma, skip=skip, forward=forward)

        advantages = gained - baseline(setup.baseline, gained, greedy_returns, drawing)
        policy = policy_loss(p, z, advantages, drawing)
        supervised = cross_entropy.mean() if loss_fn is None else loss_fn(x, logits, y)
        (weight * supervised + setup.rl_weight * policy).backward()
        parallel.all_reduce_gradients(network.parameters())
        for optimiser in setup.optimisers:
            optimiser.step()
        with torch.no_grad():
            executed = (thresholded(probabilities[watched]) @ shares).sum()
            alpha.observe(parallel.all_reduced(executed) / max(1, images if setup.all_explore else images - drawing))
            returned, left = gained[:, 0], advantages[:, 0]
            correct = (logits.argmax(dim=1) == y).float()
            measured = [returned, returned.square(), left, left.square(), z @ shares]
            measured += [(entropy(p) / len(shares)).expand_as(left), reward * torch.ones_like(left)]
            every += torch.stack([cross_entropy, correct]).double().sum(dim=1)
            explored += torch.stack(measured).double().sum(dim=1)
        explored_images += drawing
        seen += images
        if step % CHECK_EVERY == 0 or step == steps - 1:
            check_sums(torch.cat([every, explored]), title)
    loss, accuracy = (parallel.all_reduced(every) / seen).tolist()
    mean, square, left, left_square, executed, uncertain, mean_alpha = (
        parallel.all_reduced(explored) / explored_images
    ).tolist()
    deviation, remaining = (max(s - m**2, 0) ** 0.5 for s, m in ((square, mean), (left_square, left)))
    return ReinforceMeans(loss, accuracy, mean, deviation, remaining, uncertain, executed, mean_alpha)


def closing_epoch(
    setup: Reinforcement, batches: TrainingBatches, learning_rate: Callable[[float], float], title: str
) -> EpochMeans:
    """Train the network alone for one epoch, every image passing as when it is used; the switches stay as they are.

    Drawn paths are noise to the network.  Once the policy has learned it needs them no more, and the network learns the
    paths that count on all images.

    Args:
        learning_rate: of the network.
    """
    return supervised_epoch(
        setup.network, batches, setup.optimisers[0], learning_rate=learning_rate, draws=setup.draws, title=title,
        loss_fn=setup.loss_fn, forward=setup.forward, rule=as_used, frozen_norms=setup.batch_norm == "frozen",
    )  # fmt: skip


def exploring_parts(images: int, all_explore: bool) -> tuple[slice, slice]:
    """Which images of this process's part of a batch draw their decisions, and which alpha is steered by: the others.

    Every other image of the whole batch explores.  Slices, since a GPU would wait for masks.
    """
    if all_explore:
        return slice(None), slice(None)
    first = parallel.local_slice(images).start % 2
    return slice(first, None, 2), slice(1 - first, None, 2)
