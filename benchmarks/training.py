"""How fast is training?  Images per second of the three stages against a plain loop, and the parts of a step.

The plain loop (``benchmarks.plain_loop``) trains the same network with the same decisions.  Stages 2 and 3 train a
network of half the ranks, and so does the plain loop that they stand against; distillation, which adds the forward pass
of another network, is left out.

A round is one epoch over ``--images`` images, loading included; all competitors run in turns in one process after a
round that is not counted.  Rates are medians over the rounds, with quartiles.  The gate's share of the step is one
less the time of the same stage without gates over the time with them.  On a GPU the share of its bf16 matrix rate is
that of a product of two 8192 x 8192 matrices, measured in turns with the rest; a training step counts three times the
FLOPs of its forward passes, stage 3 with one forward pass more for its baseline.

Times to the first batch begin with an empty process's data: listing, reading and splitting the folder.  The operating
system has the files in memory in all of them.

    python -m benchmarks.training --data_dir FOLDER --img_type jpg
    python -m benchmarks.training --depth 14 --width 16 --images 256 --seconds 0 --num_workers 2
"""

import argparse
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.common import machine
from benchmarks.plain_loop import plain_batches, plain_loader, plain_run
from deploy.timing import Timing, alternated
from gating.reinforce import Reinforcement, reinforce_epoch
from gating.steering import FixedAlpha
from models import ResNet, build_network
from training.forward import training_forward
from training.norms import placed
from training.optimisers import reinforcement_optimisers, sgd
from training.supervised import Supervision, supervised_epoch
from utils.data.augment import Normalisation
from utils.data.batches import TrainingBatches, training_normalisation
from utils.data.folder import load_data
from utils.data.images import Images
from utils.data.listing import IMAGE_TYPES
from utils.device import PRECISIONS, pick_device, pick_precision
from utils.errors import UserError, run_command
from utils.files import write_json
from utils.flops import network_cost
from utils.settings import image_type, number

CLASSES = 10  # of made images
MATRIX = 8192
STARTS = 5  # times that a first batch is waited for, of each kind
MATRIX_RATE = "bf16 matrix product"
HEADER = (
    "| training | images a second (quartiles) | against | ratio | GFLOPs per image | share of bf16 rate "
    "| GPU memory |\n|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Row:
    """One way to train a network."""

    name: str
    against: str | None
    timing: Timing  # of an epoch
    rate: float  # images per second, median
    lower_quartile: float
    upper_quartile: float
    ratio: float | None  # of its rate to the one that it stands against
    flops: float  # of a training step, an image
    matrix_share: float | None  # on a GPU
    gpu_memory: int | None  # bytes, largest while it trains


@dataclass(frozen=True)
class Competitor:
    """An epoch of training, what it stands against, and the FLOPs of a step for one image."""

    epoch: Callable[[], None]
    against: str | None
    flops: float


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure training.", allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data_dir", help="folder with train/ and test/; without it images are made")
    add("--img_type", type=image_type, default="png", help="image files to read")
    add("--images", type=number(int, 2), default=20000, help="training images of a round (all, if there are fewer)")
    add("--depth", type=number(int, 8), default=32, help="depth of the network, 6n+2")
    add("--width", type=number(int, 1), default=64, help="channels of the first group")
    add("--resize", type=number(int, 8), default=32, help="height and width of the images")
    add("--bs", type=number(int, 2), default=128, help="images in a batch")
    add("--num_workers", type=number(int, 0), default=16, help="workers of the plain loop, and threads that decode")
    add(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="precision of convolutions and matrix products in the three stages' steps",
    )
    add("--compile", action="store_true", help="compile the three stages' steps")
    add("--threads", type=number(int, 1), default=torch.get_num_threads(), help="CPU threads of PyTorch")
    add("--seconds", type=number(float, 0), default=120.0, help="time of all rounds, 5 rounds at least")
    add("--output", type=Path, default=Path("training.json"), help="JSON file to write")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    device = pick_device()
    with TemporaryDirectory() as scratch:
        folder = given(args) if args.data_dir else made(args, Path(scratch))
        starts = first_batches(folder, args, device)
        data = load_data(str(folder), args.img_type, args.resize, args.num_workers)
        count = min(args.images, len(data.train))
        count -= count % args.bs if count > args.bs else 0  # whole batches
        chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:count]
        normalisation = training_normalisation(data.train)
        images = data.train[chosen].to(device)
        plain = plain_loader(folder, args, normalisation, chosen)
        found = competitors(images, plain, normalisation, len(data.classes), args, device)
        runs = {name: finished(competitor.epoch, device) for name, competitor in found.items()}
        if device.type == "cuda":
            runs[MATRIX_RATE] = finished(matrix_product(device), device)
        timings = alternated({name: run_of(run) for name, run in runs.items()}, 1, args.seconds)
        memory = {name: gpu_memory(runs[name], device) for name in found}
    rows = table_rows(found, timings, memory, len(images))
    share = 1 - timings["stage 1 without gates"].median / timings["stage 1"].median
    print("\n".join([HEADER, *(line(row) for row in rows)]))
    print("\n".join(f"first batch, {name}: {figure(t, 'ms', 1e3)}" for name, t in starts.items()))
    print(f"the gate's share of stage 1's step: {share:.1%}")
    image_bytes = len(data.train) * 3 * args.resize**2
    print(
        f"main memory of this process: {peak_memory() / 2**20:,.0f} MiB at most; images {image_bytes / 2**20:,.1f} MiB"
    )
    content = {
        "machine": machine_and_versions(args.threads),
        "arguments": {k: str(v) for k, v in vars(args).items()},
        "rows": [asdict(row) for row in rows],
        "first_batch": {name: asdict(timing) for name, timing in starts.items()},
        "gate_share": share,
        "matrix_rate": matrix_rate(timings),
        "image_bytes": image_bytes,
        "peak_memory": peak_memory(),
    }
    try:
        write_json(args.output, content)
    except OSError as error:
        raise UserError(f"{args.output} cannot be written ({error}): choose another --output") from None
    print(f"written to {args.output}")


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


def first_batches(folder: Path, args: argparse.Namespace, device: torch.device) -> dict[str, Timing]:
    """Time from the start to the first batch on the device: ours, which decodes all images, and the plain loop's.

    The normalisation, which a run measures besides, is given to both.
    """
    given = Normalisation((0.5,) * 3, (0.25,) * 3)

    def ours() -> None:
        data = load_data(str(folder), args.img_type, args.resize, args.num_workers)
        images, generator = data.train.to(device), torch.Generator().manual_seed(0)
        next(iter(TrainingBatches(images, args.bs, generator, given, flip=True)))

    def plain(_: int) -> None:
        batches = plain_batches(plain_loader(folder, args, given, None), device)
        finished(lambda: next(batches), device)()
        batches.close()

    runs = {"ours": run_of(finished(ours, device)), "plain loop": plain}
    return alternated(runs, 1, 0.0, least=STARTS)


def competitors(
    images: Images,
    loader: DataLoader,
    normalisation: Normalisation,
    classes: int,
    args: argparse.Namespace,
    device: torch.device,
) -> dict[str, Competitor]:
    """Everything that is timed, by name; each has a network of its own."""

    def network(gate: str = "rnn", small: bool = False) -> ResNet:
        torch.manual_seed(0)
        ranks = half_ranks(args.depth, args.width) if small else {}
        return build_network("resnet", depth=args.depth, num_classes=classes, width=args.width, gate=gate, ranks=ranks)

    def supervised(net: ResNet) -> Callable[[], None]:
        net = placed(net, device)
        return supervised_run(net, images, normalisation, args, device)

    reinforced = placed(network(small=True), device)
    step, smaller = (3.0 * network_cost(network(small=small), args.resize).flops for small in (False, True))
    return {
        "plain loop": Competitor(plain_run(network(), loader, device), None, step),
        "stage 1": Competitor(supervised(network()), "plain loop", step),
        "stage 1 without gates": Competitor(
            supervised(network("none")), None, 3.0 * network_cost(network("none"), args.resize).flops
        ),
        "plain loop, half ranks": Competitor(plain_run(network(small=True), loader, device), None, smaller),
        "stage 2, fine-tuning": Competitor(supervised(network(small=True)), "plain loop, half ranks", smaller),
        "stage 3": Competitor(
            reinforced_run(reinforced, images, normalisation, args, device), "plain loop, half ranks", smaller * 4 / 3
        ),
    }


def half_ranks(depth: int, width: int) -> dict[str, tuple[int, int]]:
    """Half of the directions on both sides of every 3x3 convolution in the blocks."""
    blocks = build_network("resnet", depth=depth, num_classes=CLASSES, width=width, gate="none").blocks
    return {
        f"blocks.{i}.{name}": (max(1, conv.in_channels // 2), max(1, conv.out_channels // 2))
        for i, block in enumerate(blocks)
        for name, conv in (("conv1", block.conv1), ("conv2", block.conv2))
    }


def supervised_run(
    network: ResNet, images: Images, normalisation: Normalisation, args: argparse.Namespace, device: torch.device
) -> Callable[[], None]:
    optimiser = sgd(network, 0.01, 0.9, 5e-4)
    data, draws = torch.Generator().manual_seed(0), torch.Generator(device).manual_seed(0)
    batches = TrainingBatches(images, args.bs, data, normalisation, True)
    forward = training_forward(network, pick_precision(args.precision, device), args.compile)
    training = Supervision(network=network, optimiser=optimiser, draws=draws, forward=forward)

    def epoch() -> None:
        supervised_epoch(training, batches, lambda _: 0.01, "")

    return epoch


def reinforced_run(
    network: ResNet, images: Images, normalisation: Normalisation, args: argparse.Namespace, device: torch.device
) -> Callable[[], None]:
    optimisers = reinforcement_optimisers(network, 0.9, 5e-4)
    data, draws = torch.Generator().manual_seed(0), torch.Generator(device).manual_seed(0)
    batches = TrainingBatches(images, args.bs, data, normalisation, True)
    setup = Reinforcement(
        network=network, optimisers=optimisers, draws=draws,
        shares=network_cost(network, args.resize).shares.to(device),
        forward=training_forward(network, pick_precision(args.precision, device), args.compile),
    )  # fmt: skip

    def epoch() -> None:
        reinforce_epoch(setup, batches, (lambda _: 0.001, lambda _: 0.01), FixedAlpha(0.1), "")

    return epoch


def matrix_product(device: torch.device) -> Callable[[], None]:
    a, b = (torch.randn(MATRIX, MATRIX, device=device, dtype=torch.bfloat16) for _ in range(2))

    def products() -> None:
        for _ in range(10):
            torch.mm(a, b)

    return products


def matrix_rate(timings: dict[str, Timing]) -> float | None:
    """FLOPs per second."""
    return 10 * 2 * MATRIX**3 / timings[MATRIX_RATE].median if MATRIX_RATE in timings else None


def finished(run: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """``run``, waited for until the GPU has done it."""

    def whole() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return whole


def run_of(run: Callable[[], None]) -> Callable[[int], None]:
    return lambda _: run()


def gpu_memory(run: Callable[[], None], device: torch.device) -> int | None:
    """Largest number of bytes that tensors take on the GPU during one round."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated()


def peak_memory() -> int:
    """Largest number of bytes of main memory that this process has taken, all competitors together."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def table_rows(
    found: dict[str, Competitor], timings: dict[str, Timing], memory: dict[str, int | None], images: int
) -> list[Row]:
    rate = matrix_rate(timings)
    rows = []
    for name, competitor in found.items():
        timing = timings[name]
        median, lower, upper = (images / t for t in (timing.median, timing.upper_quartile, timing.lower_quartile))
        other = competitor.against
        rows.append(
            Row(
                name, other, timing, median, lower, upper, timings[other].median / timing.median if other else None,
                competitor.flops, competitor.flops * median / rate if rate else None, memory[name],
            )
        )  # fmt: skip
    return rows


def line(row: Row) -> str:
    """A row of the Markdown table."""
    ratio = "-" if row.ratio is None else f"{row.ratio:.2f}x"
    share = "-" if row.matrix_share is None else f"{row.matrix_share:.1%}"
    memory = "-" if row.gpu_memory is None else f"{row.gpu_memory / 2**20:,.0f} MiB"
    return (
        f"| {row.name} | {row.rate:,.0f} ({row.lower_quartile:,.0f} to {row.upper_quartile:,.0f}) "
        f"| {row.against or '-'} | {ratio} | {row.flops / 1e9:.3g} | {share} | {memory} |"
    )


def figure(timing: Timing, unit: str, scale: float) -> str:
    median, lower, upper = (scale * t for t in (timing.median, timing.lower_quartile, timing.upper_quartile))
    return f"{median:.0f} {unit} ({lower:.0f} to {upper:.0f})"


def machine_and_versions(threads: int) -> dict[str, Any]:
    """What the times depend on."""
    packages = ("torch", "torchvision", "numpy", "pillow")
    versions = {package: version(package) for package in packages}
    return {**machine(), "threads": threads, "cores": os.cpu_count(), "versions": versions, "started": time.ctime()}


if __name__ == "__main__":
    run_command(main, goes_on=None)
