"""Means over the images of an epoch of training, by name."""

import torch
from torch import Tensor

from utils import parallel
from utils.errors import UserError


def diverged(title: str) -> UserError:
    """The error that ends training with a loss or weights that are not finite."""
    return UserError(f"the loss is not finite ({title}): lower the learning rates; what was saved before is kept")


class Means:
    """Sums of measurements over images, added up on their device, so that a GPU is waited for only at the end."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.images = 0

    def add(self, images: int, **values: Tensor) -> None:
        """Count more images.

        Args:
            images: their number over all processes.
            values: by name, of each of this process's images, or their sum.
        """
        self.images += images
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().double().sum()

    def check(self, title: str) -> None:
        """End training that has diverged.

        Raises:
            UserError: if a sum is not finite.
        """
        if not torch.stack(list(self.sums.values())).isfinite().all():
            raise diverged(title)

    def over_all(self) -> dict[str, float]:
        """The means over the images of all processes."""
        total = parallel.all_reduced(torch.stack(list(self.sums.values())))
        return dict(zip(self.sums, (total / self.images).tolist(), strict=True))
