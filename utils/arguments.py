"""Command-line flags that the training stages share, and the types that check them."""

import argparse
import math
from collections.abc import Callable

from models import NETWORKS
from utils.data import IMAGE_TYPES
from utils.schedule import SCHEDULES

# What may change between the start of a run and its resumption without changing its outcome but for rounding.
NOT_COMPARED = ("resume", "download", "num_workers", "data_dir", "result_dir", "compile")


def number(kind: type, low: float | None = None, high: float | None = None, below: float | None = None) -> Callable:
    """An argparse type: an int or float within [low, high], or strictly below ``below``."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__}") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not finite")
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            raise argparse.ArgumentTypeError(f"{text} is not within {low} to {'any' if high is None else high}")
        if below is not None and not value < below:
            raise argparse.ArgumentTypeError(f"{text} is not below {below}")
        return value

    return parse


def image_type(text: str) -> str:
    """An argparse type: an image type in lower case."""
    if text.lower() not in IMAGE_TYPES:
        raise argparse.ArgumentTypeError(f"{text!r} is unknown: use one of {', '.join(IMAGE_TYPES)}")
    return text.lower()


def training_parser(description: str, epochs: int, lr: float, batch_size: int) -> argparse.ArgumentParser:
    """Parser with the flags that stages 1 and 3 share; the defaults that differ are given."""
    parser = argparse.ArgumentParser(
        description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--network", choices=NETWORKS, default="resnet", help="kind of network")
    add("--depth", type=number(int, 8), default=32, help="depth of the network, 6n+2")
    add("--epochs", type=number(int, 1), default=epochs, help="passes over the training images")
    add("--lr", type=number(float, 0), default=lr, help="learning rate at the start")
    add("--schedule", choices=SCHEDULES, default="cosine", help="cosine to 0, or x0.1 at 50%% and 75%% of the epochs")
    add("--bs", type=number(int, 2), default=batch_size, help="images in a batch")
    add("--num_workers", type=number(int, 0), default=16, help="threads that decode images")
    add("--momentum", type=number(float, 0, below=1), default=0.9, help="momentum of SGD, Nesterov's form")
    add("--weight_decay", type=number(float, 0), default=0.0005, help="L2 penalty on every weight but the gates'")
    add("--img_type", type=image_type, default="png", help="image files to read: png, jpg, jpeg, bmp or webp")
    add("--resize", type=number(int, 8), default=32, help="height and width images are brought to")
    add("--data_dir", required=True, help="folder with train/ and test/, or with the CIFAR files of torchvision")
    add("--result_dir", default="results", help="folder that all stages write to")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="seed of weights, order, augmentation and decisions")
    add("--resume", action="store_true", help="continue the newest run of this stage")
    add("--download", action="store_true", help="fetch CIFAR-100 (CIFAR-10 by the folder's name) if missing")
    add("--compile", action="store_true", help="compile the training step, for long runs on a GPU")
    return parser
