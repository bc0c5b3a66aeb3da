"""The loop that our training is measured against: what a tutorial would write.

torchvision's ImageFolder, RandomCrop, RandomHorizontalFlip and Normalize in a DataLoader with workers, float32, one
``loss.backward()`` after the other.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.data import DataLoader, Subset
from torchvision import transforms

from models import ResNet
from training.supervised import half_held_open
from utils.data.augment import PADDING, Normalisation
from utils.data.listing import IMAGE_TYPES


def plain_loader(
    folder: Path, args: argparse.Namespace, normalisation: Normalisation, chosen: torch.Tensor
) -> DataLoader:
    """The ``chosen`` training images below ``folder``, shuffled and augmented."""
    transform = transforms.Compose(
        [
            transforms.Resize((args.resize, args.resize)),
            transforms.RandomCrop(args.resize, padding=PADDING),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(normalisation.mean, normalisation.std),
        ]
    )
    suffixes = IMAGE_TYPES[args.img_type]
    data = torchvision.datasets.ImageFolder(
        str(folder / "train"), transform, is_valid_file=lambda path: path.lower().endswith(suffixes)
    )
    return DataLoader(
        Subset(data, chosen.tolist()),
        args.bs,
        shuffle=True,
        num_workers=args.num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=args.num_workers > 0,
    )


def plain_run(network: ResNet, loader: DataLoader, device: torch.device) -> Callable[[int], None]:
    """An epoch of plain training."""
    network = network.to(device).train()
    optimiser = SGD(network.parameters(), 0.01, 0.9, weight_decay=5e-4, nesterov=True)

    def epoch(_: int) -> None:
        for x, y in loader:
            if len(y) == 1:  # the gates' batch norms cannot work on one image
                continue
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            drawn = torch.rand(len(y), 1 + network.switches, device=device)
            loss = F.cross_entropy(network(x, decide=half_held_open(drawn)).logits, y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return epoch
