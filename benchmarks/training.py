"""How fast is training?  Images per second of the three stages against a plain loop (``benchmarks.plain_loop``).

The plain loop trains the same network with the same decisions.  Stages 2 and 3 train a network of half the ranks, and
so does the plain loop that they stand against; distillation, which adds the forward pass of another network, is left
out.  A round is one epoch over ``--images`` images.  The plain loop decodes them in every round, as a
``DataLoader`` does; the stages have decoded theirs before.  All take turns in one process after a round that
is not counted.  Rates are medians over the rounds, with quartiles.

    python -m benchmarks.training --data_dir FOLDER --img_type jpg
    python -m benchmarks.training --depth 14 --width 16 --images 256 --seconds 0 --num_workers 2
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from benchmarks.plain_loop import plain_loader, plain_run
from deploy.timing import Timing, alternated
from gating.reinforce import Reinforcement, reinforce_epoch
from gating.steering import FixedAlpha
from models import ResNet, build_network
from models.edits import TUCKER
from training.forward import training_forward
from training.norms import placed
from training.optimisers import reinforcement_optimisers, sgd
from training.supervised import Supervision, supervised_epoch
from utils.data.batches import TrainingBatches, training_normalisation
from utils.data.folder import load_data
from utils.data.listing import IMAGE_TYPES
from utils.device import PRECISIONS, pick_device, pick_precision
from utils.errors import UserError, run_command
from utils.flops import network_cost
from utils.settings import image_type, number

CLASSES = 10  # of made images
PLAIN, PLAIN_HALF = "plain loop", "plain loop, half ranks"
AGAINST = {"stage 1": PLAIN, "stage 2, fine-tuning": PLAIN_HALF, "stage 3": PLAIN_HALF}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure training.", allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data_dir", help="folder with train/ and test/; without it, random images are generated")
    add("--img_type", type=image_type, default="png", help="image files to read")
    add("--images", type=number(int, 2), default=20000, help="training images of a round (all, if there are fewer)")
    add("--depth", type=number(int, 8), default=32, help="depth of the network, 6n+2")
    add("--width", type=number(int, 1), default=64, help="channels of the first group")
    add("--resize", type=number(int, 8), default=32, help="height and width of the images")
    add("--bs", type=number(int, 2), default=128, help="images in a batch")
    add("--num_workers", type=number(int, 0), default=16, help="workers of the plain loop, and threads that decode")
    add("--precision", choices=PRECISIONS, default="auto", help="precision of the stages' steps")
    add("--compile", action="store_true", help="compile the three stages' steps")
    add("--threads", type=number(int, 1), default=torch.get_num_threads(), help="CPU threads of PyTorch")
    add("--seconds", type=number(float, 0), default=120.0, help="time for all rounds; at least 5 rounds")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    device = pick_device()
    with TemporaryDirectory() as scratch:
        folder = given(args) if args.data_dir else made(args, Path(scratch))
        data = load_data(str(folder), args.img_type, args.resize, args.num_workers)
        count = min(args.images, len(data.train))
        count -= count % args.bs if count > args.bs else 0  # whole batches
        chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:count]
        normalisation = training_normalisation(data.train)
        images = data.train[chosen].to(device)

        def batches() -> TrainingBatches:
            return TrainingBatches(images, args.bs, torch.Generator().manual_seed(0), normalisation, flip=True)

        loader = plain_loader(folder, args, normalisation, chosen)
        stages = Stages(args, len(data.classes), device, batches)
        timings = alternated(
            {
                PLAIN: plain_run(stages.network(), loader, device),
                "stage 1": stages.supervised(stages.network()),
                "stage 1 without gates": stages.supervised(stages.network("none")),
                PLAIN_HALF: plain_run(stages.network(small=True), loader, device),
                "stage 2, fine-tuning": stages.supervised(stages.network(small=True)),
                "stage 3": stages.reinforced(stages.network(small=True)),
            },
            1,
            args.seconds,
        )
    print(table(timings, count))


def given(args: argparse.Namespace) -> Path:
    """The data folder that the command names."""
    root = Path(args.data_dir).expanduser().resolve()
    if not (root / "train").is_dir():
        raise UserError(f"data folder {root} has no train/: the plain loop reads image files, one folder per class")
    return root


def made(args: argparse.Namespace, scratch: Path) -> Path:
    """A data folder of noise."""
    generator = np.random.default_rng(0)
    for part, count in (("train", args.images), ("test", CLASSES)):
        for i in range(max(count, CLASSES)):
            path = scratch / part / str(i % CLASSES) / f"{i:06d}{IMAGE_TYPES[args.img_type][0]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (args.resize, args.resize, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    return scratch


class Stages:
    """Epochs of the stages, each with a network of its own."""

    def __init__(
        self, args: argparse.Namespace, classes: int, device: torch.device, batches: Callable[[], TrainingBatches]
    ):
        self.args, self.classes, self.device, self.batches = args, classes, device, batches
        self.precision = pick_precision(args.precision, device)

    def network(self, gate: str = "rnn", small: bool = False) -> ResNet:
        """The network, or with ``small`` with half of the directions of every 3x3 convolution in its blocks."""
        torch.manual_seed(0)
        shape = {"depth": self.args.depth, "num_classes": self.classes, "width": self.args.width, "gate": gate}
        network = build_network("resnet", **shape)
        if not small:
            return network
        halved = {
            f"blocks.{i}.{name}": [max(1, conv.in_channels // 2), max(1, conv.out_channels // 2)]
            for i, block in enumerate(network.blocks)
            for name, conv in (("conv1", block.conv1), ("conv2", block.conv2))
        }
        edits = [{"name": name, "form": TUCKER, "ranks": ranks, "bias": False} for name, ranks in halved.items()]
        return build_network("resnet", **shape, edits=edits)

    def supervised(self, network: ResNet) -> Callable[[int], object]:
        """An epoch of stage 1, or of fine-tuning."""
        network = placed(network, self.device)
        training = Supervision(
            network=network,
            optimiser=sgd(network, 0.01, 0.9, 5e-4),
            draws=self._draws(),
            forward=self._forward(network),
        )
        batches = self.batches()
        return lambda _: supervised_epoch(training, batches, lambda _: 0.01, "")

    def reinforced(self, network: ResNet) -> Callable[[int], object]:
        """An epoch of stage 3."""
        network = placed(network, self.device)
        setup = Reinforcement(
            network=network, optimisers=reinforcement_optimisers(network, 0.9, 5e-4), draws=self._draws(),
            shares=network_cost(network, self.args.resize).shares.to(self.device), forward=self._forward(network),
        )  # fmt: skip
        batches = self.batches()
        return lambda _: reinforce_epoch(setup, batches, (lambda _: 0.001, lambda _: 0.01), FixedAlpha(0.1), "")

    def _draws(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(0)

    def _forward(self, network: ResNet):
        return training_forward(network, self.precision, self.args.compile)


def table(timings: dict[str, Timing], images: int) -> str:
    """Markdown: images per second, and the ratio to what a stage is compared with."""
    lines = ["| training | images per second (quartiles) | against | ratio |", "|---|---|---|---|"]
    for name, timing in timings.items():
        rate, low, high = (images / t for t in (timing.median, timing.upper_quartile, timing.lower_quartile))
        other = AGAINST.get(name)
        ratio = f"{timings[other].median / timing.median:.2f}x" if other else "-"
        lines.append(f"| {name} | {rate:,.0f} ({low:,.0f} to {high:,.0f}) | {other or '-'} | {ratio} |")
    share = 1 - timings["stage 1 without gates"].median / timings["stage 1"].median
    return "\n".join([*lines, "", f"The gates take {share:.1%} of stage 1's step."])


if __name__ == "__main__":
    run_command(main, goes_on=None)
