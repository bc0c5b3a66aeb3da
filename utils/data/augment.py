"""Random crops and flips on whole batches of uint8 images, and normalisation."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

PADDING = 4


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of each colour channel, for pixels scaled to [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def apply(self, pixels: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> float32 [N, 3, H, W] of mean 0 and standard deviation 1 over the training images."""
        return self.on(pixels.device)(pixels)

    def on(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """``apply`` for many batches on one device, with its tensors moved there once."""
        mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return lambda pixels: (pixels / 255 - mean) / std


def colour_histogram(pixels: Tensor) -> Tensor:
    """How often each channel has each of the 256 values, int64 [3, 256], of uint8 images [N, 3, H, W]."""
    return torch.stack([torch.bincount(pixels[:, c].reshape(-1).int(), minlength=256) for c in range(3)])


def normalisation_of(histogram: Tensor) -> Normalisation:
    """Mean and standard deviation of the images that were counted (``colour_histogram``), exact over all pixels."""
    histogram = histogram.double()
    levels = torch.arange(256, device=histogram.device, dtype=torch.float64) / 255
    total = histogram.sum(dim=1)
    mean = histogram @ levels / total
    variance = histogram @ levels.square() / total - mean.square()
    # A constant channel becomes zero, instead of a division by zero.
    std = torch.where(variance > 1e-12, variance.clamp(min=0).sqrt(), torch.ones_like(variance))
    return Normalisation(tuple(mean.tolist()), tuple(std.tolist()))


def draw_crops(images: int, generator: torch.Generator, flip: bool) -> Tensor:
    """For each image top and left offset of its crop, 0 to 8, and whether it is mirrored, int64 [N, 3] on the CPU.

    Args:
        generator: CPU generator.
        flip: whether mirroring, with probability 1/2, leaves the class of an image as it is.
    """
    offsets = torch.randint(0, 2 * PADDING + 1, (2, images), generator=generator)
    mirrored = torch.rand(images, generator=generator) < 0.5 if flip else torch.zeros(images)
    return torch.stack([*offsets, mirrored.long()], dim=1)


def crop_and_flip(pixels: Tensor, top: Tensor, left: Tensor, mirrored: Tensor) -> Tensor:
    """Pad each image [3, H, W] by 4 black pixels, crop it at (top, left) and mirror the marked ones.

    Args:
        pixels: uint8 [N, 3, H, W].
        top, left: int64 [N] in 0..8.
        mirrored: boolean [N].
    """
    height, width = pixels.shape[2:]
    windows = F.pad(pixels, (PADDING,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # a view, [N, 3, 9, 9, H, W]
    cropped = windows[torch.arange(len(pixels), device=pixels.device), :, top, left]
    return torch.where(mirrored[:, None, None, None], cropped.flip(3), cropped)
