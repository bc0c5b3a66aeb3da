"""Saliencies in the eigenbasis: the predicted rise of the loss when a part of a rotated layer is removed."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Saliency:
    """Predicted rise of the loss, in nats, when entries or whole directions of one rotated layer are zeroed."""

    entries: Tensor  # [out, in, kh, kw]

    @property
    def pairs(self) -> Tensor:
        """[in, out]: of each pair of an input and an output direction."""
        return self.entries.sum(dim=(2, 3)).t()

    @property
    def rows(self) -> Tensor:
        """[out]: of removing each output direction."""
        return self.entries.sum(dim=(1, 2, 3))

    @property
    def columns(self) -> Tensor:
        """[in]: of removing each input direction."""
        return self.entries.sum(dim=(0, 2, 3))


def eigendamage(rotated: Tensor, curvature: Tensor, regularization: float) -> Saliency:
    """1/2 (s_ijt + regularization) W'_ijt^2 for every entry of the rotated weight.

    Given the part of a weight that surgery takes away instead of the weight, the sum of the entries is the predicted
    rise of the loss.  Source: EigenDamage (arXiv:1905.05934), section 4; with s from the eigenvalue correction,
    EK-FAC.

    Args:
        rotated: W' [out, in, kh, kw].
        curvature: s, the same shape.
        regularization: curvature that is added to every direction.
    """
    return Saliency(0.5 * (curvature + regularization) * rotated.square())


def share(values: Tensor) -> Tensor:
    """Saliencies as shares of their sum; zeros stay as they are."""
    total = values.sum()
    return values if total == 0 else values / total
