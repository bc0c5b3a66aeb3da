"""Crops, flips and normalisation against torchvision and NumPy."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import functional as reference

from utils.data.augment import PADDING, Normalisation, colour_histogram, crop_and_flip, draw_crops, normalisation_of


def measure_normalisation(pixels: Tensor) -> Normalisation:
    return normalisation_of(colour_histogram(pixels))


def random_pixels(n: int, height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, height, width), generator=torch.manual_seed(0), dtype=torch.uint8)


def test_crop_and_flip_is_torchvisions_pad_crop_and_hflip():
    """Every one of the 81 offsets, on images that are not square, half of them mirrored."""
    height, width = 6, 9
    top, left = (grid.flatten() for grid in torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij"))
    mirrored = torch.rand(81, generator=torch.manual_seed(1)) < 0.5
    pixels = random_pixels(81, height, width)
    result = crop_and_flip(pixels, top, left, mirrored)
    for i in range(81):
        expected = reference.pad(pixels[i], [PADDING] * 4, fill=0)
        expected = reference.crop(expected, top[i].item(), left[i].item(), height, width)
        if mirrored[i]:
            expected = reference.hflip(expected)
        assert torch.equal(result[i], expected), (i, top[i], left[i])


@pytest.mark.parametrize("flip", [True, False])
def test_offsets_are_uniform_and_half_of_the_images_are_mirrored(flip: bool):
    """Two marked pixels side by side tell how each image was cropped and whether it was mirrored."""
    n = 9000
    pixels = torch.zeros(n, 3, 16, 16, dtype=torch.uint8)
    pixels[:, :, 8, 8], pixels[:, :, 8, 9] = 200, 100
    top, left, mirrored = draw_crops(n, torch.Generator().manual_seed(0), flip).unbind(1)
    result = crop_and_flip(pixels, top, left, mirrored == 1)[:, 0]
    bright, dim = ((result == value).flatten(1).int().argmax(dim=1) for value in (200, 100))
    row, column = bright // 16, bright % 16
    mirrored = dim < bright
    top = 8 + PADDING - row
    left = torch.where(mirrored, column - (15 - 8 - PADDING), 8 + PADDING - column)
    # Five standard deviations of a binomial count; the generator is seeded.
    for offset in (top, left):
        counts = torch.bincount(offset, minlength=9)
        assert len(counts) == 9 and (counts - n / 9).abs().max() < 5 * (n / 9 * 8 / 9) ** 0.5
    assert abs(np.corrcoef(top.numpy(), left.numpy())[0, 1]) < 5 / n**0.5
    if flip:
        assert abs(mirrored.sum().item() - n / 2) < 5 * (n / 4) ** 0.5
    else:
        assert not mirrored.any()


def test_normalisation_is_numpys_mean_and_standard_deviation():
    pixels = random_pixels(37, 8, 11)
    pixels[:, 1] //= 3
    pixels[:, 2] = 200 + pixels[:, 2] // 64
    measured = measure_normalisation(pixels)
    scaled = pixels.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(measured.mean, scaled.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(measured.std, scaled.std(axis=(0, 2, 3)), rtol=1e-9)
    normalised = measured.apply(pixels)
    assert normalised.dtype == torch.float32
    expected = (scaled - scaled.mean(axis=(0, 2, 3), keepdims=True)) / scaled.std(axis=(0, 2, 3), keepdims=True)
    np.testing.assert_allclose(normalised.numpy(), expected, atol=2e-5)


def test_a_channel_that_never_changes_becomes_zero():
    pixels = random_pixels(5, 8, 8)
    pixels[:, 2] = 130
    measured = measure_normalisation(pixels)
    assert measured.std[2] == 1.0
    assert measured.apply(pixels)[:, 2].abs().max() < 1e-6
