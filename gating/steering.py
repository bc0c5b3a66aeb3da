"""Steering stage 3 to its budget: how much computation an epoch aims at, the alpha that leads there, the best epoch."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SMOOTHING = 0.9  # of the batches' computation, which a controller sees
PROPORTIONAL = 5.0  # change of log alpha for the whole computation too much
INTEGRAL = 0.1  # the same, added up step by step
LARGEST_ERROR = 0.1  # that adds up, so that alpha does not run away while switches have yet to answer


@dataclass(frozen=True)
class Budget:
    """What stage 3 is asked for: accuracy above a floor, or computation below a target.

    With a ``target_computation`` (executed FLOPs over all FLOPs) the accuracy is what is maximised; without one the
    executed FLOPs are minimised while the accuracy stays at ``floor`` or above.

    ``noise`` is the standard error of an accuracy.  Steering allows for it, or chance alone would hold it back where
    there are few validation images; what is chosen in the end is held to the floor itself.
    """

    floor: float
    noise: float = 0.0
    target_computation: float | None = None

    def keeps(self, accuracy: float) -> bool:
        """Whether the accuracy leaves room for more skipping."""
        return accuracy >= self.floor - self.noise - 1e-9

    def overshot(self, accuracy: float, drop: float) -> bool:
        """Whether the accuracy has fallen by more than another ``drop`` below the floor: time to go back."""
        return self.target_computation is None and accuracy < self.floor - self.noise - drop - 1e-9

    def score(self, accuracy: float, computation: float) -> tuple[bool, float, float]:
        """Larger is better: first being within the budget, then what is optimised under it, then the other.

        A target is met where it is exceeded by no more than half a percent of the FLOPs, and computations that round to
        the same percent count as equal.
        """
        percent = -round(100 * computation)
        if self.target_computation is None:
            within = accuracy >= self.floor - 1e-9
        else:
            within = computation <= self.target_computation + 0.005
        # What is asked for comes first where it can be had, the constraint where it is not met yet.
        fewest_first = within == (self.target_computation is None)
        return (within, percent, accuracy) if fewest_first else (within, accuracy, percent)


class Aim(NamedTuple):
    """The computation that an epoch is to end with, a share of all FLOPs, and how far the next one may go on."""

    computation: float
    stride: float


def first_aim(budget: Budget, computation: float, epochs: int) -> Aim:
    """The aim of the first epoch of so many, starting from a network of this computation."""
    stride = min(0.1, max(0.01, 1.2 / epochs))
    if budget.target_computation is not None:
        return Aim(_on_the_line(computation, budget.target_computation, 1, epochs), stride)
    return Aim(computation - stride, stride)


def next_aim(
    aim: Aim, budget: Budget, accuracy: float, computation: float, start: float, epoch: int, epochs: int
) -> Aim:
    """The aim of the next epoch, after one that came out with this accuracy and computation.

    A target is approached in a straight line from ``start`` and reached when half of the epochs are done.  Towards an
    accuracy's floor the aim goes on in strides, goes back by one where the floor is broken, and takes shorter ones from
    there: it closes in on the least computation that the accuracy bears.  It never runs ahead of switches that have not
    answered yet.

    Args:
        accuracy, computation: on the images that choose.
        start: computation that stage 3 started from.
        epoch: the one whose aim is asked for, counted from 1.
    """
    if budget.target_computation is not None:
        return Aim(_on_the_line(start, budget.target_computation, epoch, epochs), aim.stride)
    if budget.keeps(accuracy):
        return Aim(max(aim.computation - aim.stride, computation - 2 * aim.stride, 0.0), aim.stride)
    return Aim(min(max(aim.computation, computation) + aim.stride, 1.0), 0.7 * aim.stride)


def _on_the_line(start: float, target: float, epoch: int, epochs: int) -> float:
    return target + (start - target) * max(0.0, 1 - 2 * epoch / epochs)


class FixedAlpha:
    """The published behaviour: one alpha for all of training."""

    def __init__(self, alpha: float):
        self.alpha = alpha

    def value(self) -> float:
        return self.alpha

    def observe(self, executed: Tensor) -> None:
        pass

    def state(self) -> dict[str, float]:
        return {"alpha": self.alpha}


class SteeredAlpha:
    """Alpha that leads the thresholded decisions' computation along a straight line, from step to step.

    Proportional-integral control of the dual variable of the constraint (arXiv:2007.03964, section 4: the proportional
    term damps the oscillation of plain dual ascent).  All of it stays on the device: nothing makes a GPU wait.

    Args:
        alpha: where the integral starts.
        now: computation of the network as it is.  All computations here are shares of the skippable FLOPs.
        start, end: computation to lead through at the first and the last step.
        steps: batches that lead from one to the other; ``end`` holds after them.
    """

    def __init__(self, alpha: float, now: float, start: float, end: float, steps: int, device: torch.device):
        self.log_alpha = torch.tensor(alpha, dtype=torch.float64, device=device).log()
        self.smooth = torch.tensor(now, dtype=torch.float64, device=device)
        self.start, self.end, self.steps, self.step = start, end, steps, 0

    def value(self) -> Tensor:
        return (self.log_alpha + PROPORTIONAL * self._error()).exp().float()

    def observe(self, executed: Tensor) -> None:
        """Take note of the share of the skippable FLOPs that a batch's thresholded decisions execute, a scalar."""
        self.step += 1
        self.smooth = SMOOTHING * self.smooth + (1 - SMOOTHING) * executed.double()
        bounded = self._error().clamp(-LARGEST_ERROR, LARGEST_ERROR)
        self.log_alpha = (self.log_alpha + INTEGRAL * bounded).clamp(-10, 10)

    def state(self) -> dict[str, float]:
        """Where the next epoch's steering goes on."""
        return {"alpha": self.log_alpha.exp().item()}

    def _error(self) -> Tensor:
        way = min(1.0, self.step / max(1, self.steps))
        return self.smooth - (self.start + (self.end - self.start) * way)
