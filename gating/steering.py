"""Steering stage 3 to its budget: the computation that an epoch aims at, the alpha for it, and the best network."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError
from utils.flops import NetworkCost

SMOOTHING = 0.9  # of the batches' computation that the controller sees
PROPORTIONAL = 5.0  # change of log alpha per unit of computation above the setpoint
INTEGRAL = 0.1  # the same, added up step by step
LARGEST_ERROR = 0.1  # of the integral, so that alpha does not run away before the switches react


@dataclass(frozen=True)
class Budget:
    """The budget of stage 3: accuracy above a floor, or computation below a target.

    With a ``target_computation`` (executed FLOPs over all FLOPs) the accuracy is what is maximised; without one the
    executed FLOPs are minimised while the accuracy stays at ``floor`` or above.
    """

    floor: float
    target_computation: float | None = None
    drop: float = 0.0  # accuracy that the floor lies below stage 1's

    def check(self, cost: NetworkCost) -> None:
        """Refuse a target below the computation with every switch closed.

        Raises:
            UserError: says what is left.
        """
        target = self.target_computation
        if target is not None and target < cost.least:
            raise UserError(
                f"--target_computation {target} is out of reach: with every switch off, {cost.least:.3f} of "
                f"the FLOPs are left; raise it"
            )

    def met(self, accuracy: float, computation: float) -> bool:
        """Whether the budget is met; a target may be exceeded by half a percent of the FLOPs."""
        if self.target_computation is None:
            return accuracy >= self.floor - 1e-9
        return computation <= self.target_computation + 0.005

    def lost(self, accuracy: float) -> bool:
        """Whether the accuracy has collapsed: below the floor by more than the drop and two percentage points."""
        return self.target_computation is None and accuracy < self.floor - max(self.drop, 0.02)

    def score(self, accuracy: float, computation: float) -> tuple[bool, float, float]:
        """Larger is better, in this order: within the budget, the optimised quantity, the other one.

        Computations that round to the same percent count as equal.
        """
        percent = -round(100 * computation)
        within = self.met(accuracy, computation)
        # Within the budget the objective comes first, outside of it the constraint.
        fewest_first = within == (self.target_computation is None)
        return (within, percent, accuracy) if fewest_first else (within, accuracy, percent)


def next_setpoint(budget: Budget, accuracy: float, computation: float, start: float, epoch: int, epochs: int) -> float:
    """The computation, a share of all FLOPs, that an epoch steers the policy to.

    A target is approached linearly from ``start`` and reached after half of the epochs.  Towards an accuracy floor the
    policy goes one stride further than the accuracy allows now, since the network learns to do without a block only
    if the policy skips it.

    Args:
        accuracy, computation: at the operating point after the epoch before, see ``gating.operating_point``.
        start: computation that stage 3 started from.
        epoch: the one whose setpoint is asked for, counted from 1.
    """
    if budget.target_computation is not None:
        target = budget.target_computation
        return target + (start - target) * max(0.0, 1 - 2 * epoch / epochs)
    if not budget.met(accuracy, computation):
        return 1.0
    return max(0.0, computation - min(0.1, max(0.02, 1.2 / epochs)))


class FixedAlpha:
    """One alpha for all of training, as published."""

    def __init__(self, alpha: float):
        self.alpha = alpha

    def value(self) -> float:
        return self.alpha

    def observe(self, executed: Tensor) -> None:
        pass

    @property
    def final(self) -> float:
        return self.alpha


class SteeredAlpha:
    """Alpha that steers the thresholded decisions' computation along a straight line, step by step.

    Proportional-integral control of the dual variable of the constraint (arXiv:2007.03964, section 4: the proportional
    term damps the oscillation of plain dual ascent).  All of it stays on the device: nothing makes a GPU wait.

    Args:
        alpha: where the integral starts.
        now: present computation, where the line starts.  All computations here are shares of the skippable FLOPs.
        end: the end of the line.
        steps: batches on the way; ``end`` holds after them.
    """

    def __init__(self, alpha: float, now: float, end: float, steps: int, device: torch.device):
        self.log_alpha = torch.tensor(alpha, dtype=torch.float64, device=device).log()
        self.smooth = torch.tensor(now, dtype=torch.float64, device=device)
        self.start, self.end, self.steps, self.step = now, end, steps, 0

    def value(self) -> Tensor:
        return (self.log_alpha + PROPORTIONAL * self._error()).exp().float()

    def observe(self, executed: Tensor) -> None:
        """Record the share of the skippable FLOPs that a batch's thresholded decisions execute, a scalar."""
        self.step += 1
        self.smooth = SMOOTHING * self.smooth + (1 - SMOOTHING) * executed.double()
        bounded = self._error().clamp(-LARGEST_ERROR, LARGEST_ERROR)
        self.log_alpha = (self.log_alpha + INTEGRAL * bounded).clamp(-10, 10)

    @property
    def final(self) -> float:
        """The alpha that the next epoch starts with."""
        return self.log_alpha.exp().item()

    def _error(self) -> Tensor:
        way = min(1.0, self.step / max(1, self.steps))
        return self.smooth - (self.start + (self.end - self.start) * way)


@dataclass
class SteeringPoint:
    """State of the steering between two epochs; computations are shares of all FLOPs."""

    alpha: float
    computation: float  # of the network at its threshold of one half


class Steering:
    """The alpha of every epoch, from the results of the epochs before.

    Args:
        alpha: where it starts.
        steps: batches of an epoch.
        fixed: keep alpha as it is.
    """

    def __init__(
        self, budget: Budget, cost: NetworkCost, *, alpha: float, epochs: int, steps: int, device: torch.device,
        fixed: bool,
    ):  # fmt: skip
        self.budget, self.cost, self.epochs, self.steps = budget, cost, epochs, steps
        self.device, self.fixed = device, fixed
        self.now = SteeringPoint(alpha, 1.0)
        self.best = self.now
        self.start = self.setpoint = 1.0

    def begin(self, accuracy: float, computation: float) -> None:
        """Record the network that stage 3 starts from, and plan the first epoch."""
        self.start = computation
        self.now = self.best = SteeringPoint(self.now.alpha, computation)
        self.plan(1, accuracy, computation)

    def plan(self, epoch: int, accuracy: float, computation: float) -> None:
        """Choose the setpoint of an epoch, counted from 1, by accuracy and computation at the operating point."""
        self.setpoint = next_setpoint(self.budget, accuracy, computation, self.start, epoch, self.epochs)

    def controller(self) -> FixedAlpha | SteeredAlpha:
        """The controller of alpha in the next epoch."""
        if self.fixed:
            return FixedAlpha(self.now.alpha)
        # From shares of all FLOPs to shares of those that can be skipped.
        shares = (self.now.computation, self.setpoint)
        now, end = (min(1.0, max(0.0, (share - self.cost.least) / self.cost.skippable)) for share in shares)
        return SteeredAlpha(self.now.alpha, now, end, self.steps, self.device)

    def observe(self, controller: FixedAlpha | SteeredAlpha, computation: float) -> None:
        """Record the result of an epoch: its alpha, and the computation at the threshold of one half."""
        self.now = SteeringPoint(controller.final, computation)

    def remember(self, computation: float) -> None:
        """Keep this state as that of the best network, which executes ``computation``."""
        self.best = SteeringPoint(self.now.alpha, computation)

    def go_back(self) -> None:
        """Continue from the best network."""
        self.now = self.best

    def state_dict(self) -> dict[str, Any]:
        return {"now": asdict(self.now), "best": asdict(self.best), "start": self.start, "setpoint": self.setpoint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.now, self.best = SteeringPoint(**state["now"]), SteeringPoint(**state["best"])
        self.start, self.setpoint = state["start"], state["setpoint"]
