"""Baselines: what a return is compared with, so that a decision is judged by what it changes.

A baseline that does not depend on the decision it judges leaves the expected policy gradient as it is and lowers its
variance (Williams 1992, "Simple statistical gradient-following algorithms", section 4).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam

from gating.forward import Forward, training_forward
from gating.objectives import batch_baseline, returns, skip_rewards
from models import ResNet, thresholded
from models.decisions import DecisionRule
from utils import parallel
from utils.modes import mode_kept

BASELINES = ("greedy", "batch", "learned", "none")


class LearnedBaseline(nn.Module):
    """A linear prediction of each return from the probabilities up to its switch, fitted while the switches learn.

    Only probabilities that are known before the decision enter: b_i = w_i0 + sum over j <= i of w_ij p_j.
    """

    def __init__(self, switches: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(switches, switches))
        self.bias = nn.Parameter(torch.zeros(switches))
        self.register_buffer("known", torch.ones(switches, switches).tril(), persistent=False)

    def forward(self, probabilities: Tensor) -> Tensor:
        """[N, K] -> [N, K]."""
        return F.linear(probabilities.detach(), self.weight * self.known, self.bias)


class Baseline:
    """A baseline by name.

    ``none`` zero; ``batch`` the mean return of the other images at the same switch; ``learned`` a linear fit, see
    ``LearnedBaseline``; ``greedy`` the return that the same image earns under thresholded decisions (self-critical
    training, arXiv:1612.00563, section 3.2), at the price of one more forward pass.
    """

    def __init__(self, kind: str, switches: int, device: torch.device):
        self.kind = kind
        self.learned = LearnedBaseline(switches).to(device) if kind == "learned" else None
        self.optimiser = Adam(self.learned.parameters(), 0.01) if self.learned is not None else None

    def state(self) -> dict:
        """What a resumed run needs, empty for a baseline that learns nothing."""
        if self.learned is None:
            return {}
        return {"weights": self.learned.state_dict(), "optimiser": self.optimiser.state_dict()}

    def restore(self, state: dict) -> None:
        if self.learned is not None:
            self.learned.load_state_dict(state["weights"])
            self.optimiser.load_state_dict(state["optimiser"])

    def __call__(
        self, gained: Tensor, probabilities: Tensor, greedy_returns: Callable[[], Tensor], images: int | None = None
    ) -> Tensor:
        """Baselines [N, K] for the returns ``gained`` [N, K]; ``greedy_returns`` is called only where needed.

        Args:
            images: of the whole batch, where several processes share it.
        """
        images = len(gained) if images is None else images
        if self.kind == "none":
            return torch.zeros_like(gained)
        if self.kind == "batch":
            return batch_baseline(gained, parallel.summed(gained.sum(dim=0)), images)
        if self.kind == "greedy":
            return greedy_returns()
        predicted = self.learned(probabilities)
        self.optimiser.zero_grad()
        (F.mse_loss(predicted, gained) * (len(gained) / images)).backward()
        parallel.sum_gradients(self.learned.parameters())
        self.optimiser.step()
        return predicted.detach()


@torch.no_grad()
def thresholded_returns(
    network: ResNet,
    x: Tensor,
    y: Tensor,
    shares: Tensor,
    alpha: float | Tensor,
    gamma: float,
    skip: bool,
    forward: Forward | None = None,
) -> Tensor:
    """Returns [N, K] that thresholded decisions earn on normalised images ``x`` with labels ``y``, in evaluation.

    Args:
        skip: as in the network's forward pass.
        forward: that forward pass, from ``gating.forward.training_forward``; not compiled by default.
    """
    forward = training_forward(network) if forward is None else forward
    with mode_kept(network, training=False):
        output = forward(x, _thresholded, (), skip)
    cross_entropy = F.cross_entropy(output.logits.float(), y, reduction="none")
    return returns(skip_rewards(output.decisions, shares, alpha), cross_entropy, gamma)


def _thresholded() -> DecisionRule:
    return thresholded
