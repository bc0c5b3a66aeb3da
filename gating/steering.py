"""Steering alpha towards a budget, and which epoch of stage 3 is the best under it."""

from dataclasses import dataclass


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

    def push(self, accuracy: float, computation: float) -> bool:
        """Whether skipping should be rewarded more from now on."""
        if self.target_computation is not None:
            return computation > self.target_computation
        return accuracy >= self.floor - self.noise - 1e-9

    def overshot(self, accuracy: float, drop: float) -> bool:
        """Whether the accuracy has fallen by more than another ``drop`` below the floor: time to go back."""
        return self.target_computation is None and accuracy < self.floor - self.noise - drop - 1e-9

    def score(self, accuracy: float, computation: float) -> tuple[bool, float]:
        """Larger is better: first being within the budget, then what is optimised under it.

        A target is met where it is exceeded by no more than half a percent of the FLOPs.
        """
        if self.target_computation is None:
            within = accuracy >= self.floor - 1e-9
            return within, -computation if within else accuracy
        within = computation <= self.target_computation + 0.005
        return within, accuracy if within else -computation


def steered_alpha(alpha: float, push: bool, epochs: int, retreats: int = 0) -> float:
    """Alpha for the next epoch: raised while there is room for more skipping, lowered twice as fast while there is not.

    A multiplicative form of dual ascent on the constraint.  A step is 1.3, in short runs up to 2, so that alpha can
    rise a thousandfold over ten epochs or more: the value it starts from need not be a good guess.  Every retreat from
    an overshoot makes the steps smaller.
    """
    step = min(max(1.3, 1000 ** (1 / epochs)), 2.0) ** (1 / (1 + retreats))
    return alpha * step if push else alpha / step**2
