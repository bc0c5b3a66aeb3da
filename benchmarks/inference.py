"""Is it really faster?  Dense, static, static with switches, and Torch-Pruning's network with as many FLOPs as static.

Each in eager PyTorch (as it was trained) and exported (folded, ONNX Runtime), for 1, 32 and 128 images, on the CPU and,
where torch and ONNX Runtime find one, on a CUDA device.  All competitors of a line of the plan run in turns.  Prints a
table and writes a JSON file with machine, versions and spread.  Torch-Pruning's network is not fine-tuned: only its
speed is compared.

    python -m benchmarks.inference --dense PATH --static PATH --dynamic PATH --data_dir FOLDER
    python -m benchmarks.inference --ranks 0.4 --skipped 0.3

For single images the times are means over test images, since a switched network is faster on some than on others.
"""

import argparse
import copy
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor

from benchmarks.networks import Subject, channel_pruned, from_checkpoints, with_random_weights
from deploy.folding import deployable, without_switches
from deploy.graphs import batch_model, routed_model
from deploy.session import PROVIDERS, open_session, run_session
from deploy.timing import Run, Timing, alternated
from models import ResNet, all_on, thresholded
from utils.errors import UserError, run_command
from utils.files import write_json
from utils.flops import network_cost
from utils.settings import image_type, number

BATCHES = (1, 32, 128)
SINGLE_IMAGES = 32
DENSE, STATIC, DYNAMIC, CHANNELS = "dense", "static", "static with switches", "Torch-Pruning"
EAGER, EXPORTED = "PyTorch", "ONNX Runtime"
PACKAGES = ("torch", "onnx", "onnxruntime", "torch-pruning", "numpy")


@dataclass(frozen=True)
class Row:
    """One measured network; ratios are against ``baseline`` in the same runtime, on the same images."""

    device: str
    batch: int
    runtime: str
    network: str
    baseline: str
    flops: float  # executed, mean over the images
    flop_ratio: float  # of the baseline's FLOPs to these
    timing: Timing  # of a batch
    speedup: float
    kept: float  # speed-up over FLOP ratio: how much of the promise the measurement keeps


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure inference.", allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--dense", type=Path, help="checkpoint of stage 1")
    add("--static", type=Path, help="checkpoint of stage 2")
    add("--dynamic", type=Path, help="checkpoint of stage 3")
    add("--data_dir", help="data folder of the checkpoints, for its test images")
    add("--img_type", type=image_type, default="png", help="image files to read")
    add("--ranks", type=number(float, 0, 1), help="instead of checkpoints, random weights: share of each rank kept")
    add("--skipped", type=number(float, 0, 1), default=0.3, help="with --ranks: share of closed switches")
    add("--depth", type=number(int, 8), default=32, help="with --ranks: depth")
    add("--width", type=number(int, 1), default=64, help="with --ranks: width")
    add("--resize", type=number(int, 8), default=32, help="with --ranks: height and width of the images")
    add("--threads", type=number(int, 1), default=torch.get_num_threads(), help="CPU threads of both runtimes")
    add("--seconds", type=number(float, 0), default=60.0, help="time of each group of competitors, 5 rounds at least")
    add("--output", type=Path, default=Path("inference.json"), help="JSON file to write")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    subject = chosen_subject(args)
    networks = {
        DENSE: without_switches(subject.dense),
        STATIC: without_switches(subject.static),
        DYNAMIC: subject.dynamic,
    }
    size = subject.image_size
    networks[CHANNELS] = channel_pruned(subject.dense, network_cost(networks[STATIC], size).flops, size)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        if PROVIDERS[device] not in onnxruntime.get_available_providers():
            print(f"the installed onnxruntime has no {PROVIDERS[device]}: exported networks are not run on {device}")
    print(HEADER)
    rows: list[Row] = []
    for device in devices:
        for batch in BATCHES:
            new = [*compared(networks, subject, device, batch, args), *routed(subject, device, batch, args)]
            print("\n".join(line(row) for row in new), flush=True)
            rows += new
    content = {"machine": machine(args.threads), "arguments": {k: str(v) for k, v in vars(args).items()}}
    try:
        write_json(args.output, {**content, "rows": [asdict(row) for row in rows]})
    except OSError as error:
        raise UserError(f"{args.output} cannot be written ({error}): choose another --output") from None
    print(f"written to {args.output}")


def chosen_subject(args: argparse.Namespace) -> Subject:
    if args.ranks is not None:
        return with_random_weights(args.depth, args.width, args.resize, args.ranks, args.skipped)
    if not (args.dense and args.static and args.dynamic and args.data_dir):
        raise UserError("there is nothing to measure: give --dense, --static, --dynamic and --data_dir, or --ranks")
    return from_checkpoints(args.dense, args.static, args.dynamic, args.data_dir, args.img_type)


def compared(
    networks: dict[str, ResNet], subject: Subject, device: str, batch: int, args: argparse.Namespace
) -> Iterator[Row]:
    """All networks in both runtimes, against the dense one."""
    items = items_of(subject.pixels, batch)
    size, normalisation = subject.image_size, subject.normalisation
    runs: dict[tuple[str, str], Run] = {}
    for name, network in networks.items():
        runs[EAGER, name] = eager(network, subject, items, device, thresholded)
        if PROVIDERS[device] in onnxruntime.get_available_providers():
            write = routed_model if batch == 1 and network.switches else batch_model
            runs[EXPORTED, name] = exported(
                write(deployable(network, normalisation), size), items, device, args.threads
            )
    flops = {name: executed_flops(network, subject, items) for name, network in networks.items()}
    timings = alternated(runs, len(items), args.seconds)
    for (runtime, name), timing in timings.items():
        yield row(device, batch, runtime, name, DENSE, flops, timing, timings[runtime, DENSE])


def routed(subject: Subject, device: str, batch: int, args: argparse.Namespace) -> Iterator[Row]:
    """The switched network as its switches decide, against the same network with every block run.

    In PyTorch the gates are computed on both sides; the exported network that runs every block has none.
    """
    items = items_of(subject.pixels, batch)
    network, size = subject.dynamic, subject.image_size
    every = f"{DYNAMIC}, all on"
    runs: dict[tuple[str, str], Run] = {
        (EAGER, DYNAMIC): eager(network, subject, items, device, thresholded),
        (EAGER, every): eager(network, subject, items, device, all_on),
    }
    if PROVIDERS[device] in onnxruntime.get_available_providers():
        deployed = deployable(network, subject.normalisation)
        write = routed_model if batch == 1 else batch_model
        runs[EXPORTED, DYNAMIC] = exported(write(deployed, size), items, device, args.threads)
        runs[EXPORTED, every] = exported(batch_model(without_switches(deployed), size), items, device, args.threads)
    flops = {DYNAMIC: executed_flops(network, subject, items), every: float(network_cost(network, size).flops)}
    timings = alternated(runs, len(items), args.seconds)
    for runtime, name in timings:
        if name == DYNAMIC:
            yield row(device, batch, runtime, name, every, flops, timings[runtime, name], timings[runtime, every])


def row(
    device: str, batch: int, runtime: str, name: str, baseline: str, flops: dict[str, float], own: Timing, other: Timing
) -> Row:
    flop_ratio, speedup = flops[baseline] / flops[name], other.median / own.median
    return Row(device, batch, runtime, name, baseline, flops[name], flop_ratio, own, speedup, speedup / flop_ratio)


def items_of(pixels: Tensor, batch: int) -> list[Tensor]:
    """What one round runs: some single images, spread over all of them, or one batch; uint8 [batch, 3, H, W] each."""
    count = SINGLE_IMAGES if batch == 1 else batch
    chosen = pixels[torch.linspace(0, len(pixels) - 1, count).long()]
    return list(chosen.split(batch))


def eager(
    network: ResNet, subject: Subject, items: list[Tensor], device: str, decide: Callable[[Tensor], Tensor]
) -> Run:
    """The network as PyTorch runs it, with normalised images already on the device."""
    network = copy.deepcopy(network).to(device)
    images = [subject.normalisation.apply(item).to(device) for item in items]

    @torch.inference_mode()
    def run(item: int) -> None:
        network(images[item], decide=decide)
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def exported(model: Any, items: list[Tensor], device: str, threads: int) -> Run:
    """The graph as ONNX Runtime runs it, with uint8 images in main memory."""
    session = open_session(model, device, threads)
    images = [item.numpy() for item in items]
    return lambda item: run_session(session, images[item])


@torch.no_grad()
def executed_flops(network: ResNet, subject: Subject, items: list[Tensor]) -> float:
    """FLOPs of one image of the unfolded network, mean over the images; those of skipped blocks left out."""
    cost = network_cost(network, subject.image_size)
    if network.switches == 0:
        return float(cost.flops)
    return cost.executed(network(subject.normalisation.apply(torch.cat(items))).decisions).mean().item()


HEADER = (
    "| device | batch | runtime | network | against | GFLOPs | ms (quartiles) | speed-up | FLOP ratio | kept |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def line(row: Row) -> str:
    """A row of the Markdown table."""
    median, lower, upper = (
        f"{1e3 * t:.3g}" for t in (row.timing.median, row.timing.lower_quartile, row.timing.upper_quartile)
    )
    return (
        f"| {row.device} | {row.batch} | {row.runtime} | {row.network} | {row.baseline} | {row.flops / 1e9:.3g} "
        f"| {median} ({lower} to {upper}) | {row.speedup:.2f}x | {row.flop_ratio:.2f}x | {row.kept:.2f} |"
    )


def machine(threads: int) -> dict[str, Any]:
    """What the times depend on."""
    names = []
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [text.partition(":")[2].strip() for text in lines if text.startswith("model name")]
    return {
        "system": platform.platform(),
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
    }


if __name__ == "__main__":
    run_command(main, resumable=False)
