"""The networks that the inference benchmark compares."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from deploy.int8 import CALIBRATION_IMAGES
from models import ResNet, build_network
from utils.data.augment import Normalisation
from utils.data.folder import load_data
from utils.data.images import Images
from utils.errors import UserError
from utils.runs.checkpoint import check_data, load_checkpoint

SPREAD = 8.0  # of the logits of random switches


@dataclass(frozen=True)
class Subject:
    """Networks of one architecture as the stages leave them, and images to run them on."""

    dense: ResNet
    static: ResNet
    dynamic: ResNet | None  # None where stage 3 has not been run
    normalisation: Normalisation
    pixels: Tensor  # uint8 [N, 3, H, W]
    calibration: Tensor  # the same, training images that int8 is calibrated on
    test: Images | None = None  # images that accuracy is measured on, None for random weights

    @property
    def image_size(self) -> int:
        return self.pixels.shape[-1]


def from_checkpoints(dense: Path, static: Path, dynamic: Path | None, data_dir: str, image_type: str) -> Subject:
    """The networks of two or three checkpoints and the test images of their data set.

    Raises:
        UserError: if a file cannot be read, the data is not what they were trained on, or nothing can be skipped.
    """
    checkpoints = [load_checkpoint(path) for path in (dense, static, dynamic) if path is not None]
    data = load_data(data_dir, image_type, checkpoints[0].data["image_size"], workers=4)
    for checkpoint in checkpoints:
        check_data(checkpoint, data, checkpoints[0].data["image_size"])
    networks = [checkpoint.network() for checkpoint in checkpoints]
    if dynamic is not None and networks[2].switches == 0:
        raise UserError(f"checkpoint {dynamic} has no switches: give one of stage 3 as --dynamic")
    chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:CALIBRATION_IMAGES]
    calibration = data.train[chosen].pixels
    switched = None if dynamic is None else networks[2]
    normalisation = checkpoints[0].normaliser()
    return Subject(*networks[:2], switched, normalisation, data.test.pixels, calibration, data.test)


def with_random_weights(
    depth: int, width: int, image_size: int, kept: float, skipped: float, num_classes: int = 100
) -> Subject:
    """Networks of the given size with random weights: the speed depends on their shapes and on what is skipped.

    Args:
        kept: rank of every side of every 3x3 convolution in the blocks, as a share of its channels; ranks are rounded
            to multiples of 16, the blocks that runtimes compute channels in, where there are that many.
        skipped: share of the switches that the dynamic network closes, over the images.
    """
    torch.manual_seed(0)
    dense = build_network("resnet", depth=depth, num_classes=num_classes, width=width).eval()
    ranks = {
        f"blocks.{i}.{name}": tuple(_rank(c, kept) for c in (conv.in_channels, conv.out_channels))
        for i, block in enumerate(dense.blocks)
        for name, conv in (("conv1", block.conv1), ("conv2", block.conv2))
    }
    static = build_network("resnet", depth=depth, num_classes=num_classes, width=width, ranks=ranks).eval()
    normalisation = Normalisation((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    pixels = torch.randint(0, 256, (256, 3, image_size, image_size), dtype=torch.uint8)
    dynamic = _closing(static, normalisation.apply(pixels[:64]), skipped)
    return Subject(dense, static, dynamic, normalisation, pixels, pixels)


def _rank(channels: int, kept: float) -> int:
    step = 16 if channels * kept >= 16 else 1
    return max(step, round(channels * kept / step) * step)


@torch.no_grad()
def _closing(network: ResNet, images: Tensor, skipped: float) -> ResNet:
    """A copy whose switches close in about ``skipped`` of all decisions, each for some images only.

    With random weights the features of all images are nearly the same: the gate's batch norms are set to the statistics
    that they see and its logits are spread, so that images take different paths as in a trained network.
    """
    changed = copy.deepcopy(network)
    norms = [m for m in changed.gate.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    changed(images, decide=torch.ones_like)
    changed.eval()
    layers = changed.gate.last_layers
    for layer in layers:
        layer.weight *= SPREAD
    low, high = -10.0 * SPREAD, 10.0 * SPREAD
    for _ in range(16):
        for layer in layers:
            nn.init.constant_(layer.bias, (low + high) / 2)
        closed = 1 - changed(images).decisions.mean().item()
        low, high = ((low + high) / 2, high) if closed > skipped else (low, (low + high) / 2)
    return changed
