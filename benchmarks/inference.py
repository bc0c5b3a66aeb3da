"""Is it really faster?  Dense, static, static with switches, and Torch-Pruning's network with as many FLOPs as static.

Each in eager PyTorch as it was trained, folded, with --compile compiled (where nothing is skipped), and exported, in
float32 and int8; for 1, 32 and 128 images, on the CPU and, where torch and ONNX Runtime find one, on a CUDA device.
All networks of a runtime and a batch size run in turns; runtimes run after one another, since the threads of one wait
busily for a while and slow the next.  Prints every measurement, then a table, and writes a JSON file with
machine, versions and spread.  Torch-Pruning's network is not fine-tuned: only its speed is compared.  Accuracies in
float32 are those of the exported graphs, from which PyTorch's differ by rounding alone; int8 has its own.

    python -m benchmarks.inference --dense PATH --static PATH [--dynamic PATH] --data_dir FOLDER
    python -m benchmarks.inference --ranks 0.5 --skipped 0.3 0.6 --threads 1 2

For single images the times are means over test images, since a switched network is faster on some than on others.
"""

import argparse
import copy
import itertools
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

from benchmarks.competitor import Competitor, torch_pruned
from benchmarks.networks import Subject, from_checkpoints, with_random_weights
from deploy.export import accuracy
from deploy.folding import deployable, folded, without_switches
from deploy.graphs import onnx_model
from deploy.int8 import quantised
from deploy.session import PROVIDERS, ExportedNetwork
from deploy.timing import Run, Timing, alternated
from models import ResNet, all_on, thresholded
from models.decisions import DecisionRule
from training.evaluate import evaluate
from training.norms import placed
from utils.data.images import evenly_spaced
from utils.errors import UserError, run_command
from utils.files import write_json
from utils.flops import network_cost
from utils.settings import image_type, number

BATCHES = (1, 32, 128)
SINGLE_IMAGES = 32
DENSE, STATIC, DYNAMIC, CHANNELS = "dense", "static", "static with switches", "Torch-Pruning"
EAGER, FOLDED, COMPILED = "PyTorch", "PyTorch, folded", "PyTorch, folded, compiled"
EXPORTED, INT8 = "ONNX Runtime", "ONNX Runtime, int8"
NETWORKS, RUNTIMES = (DENSE, STATIC, DYNAMIC, CHANNELS), (EAGER, FOLDED, COMPILED, EXPORTED, INT8)
INSTRUCTIONS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni")  # int8 is slow on CPUs without VNNI
PACKAGES = ("torch", "onnx", "onnxruntime", "torch-pruning", "numpy")


COLUMNS = {1: "latency, batch 1", 32: "throughput, batch 32", 128: "throughput, batch 128"}


@dataclass(frozen=True)
class Row:
    """One measured network; ratios are against ``baseline`` in the same runtime, on the same images."""

    device: str
    threads: int
    skipped: float | None  # share of closed switches asked for with random weights
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
    add("--dynamic", type=Path, help="checkpoint of stage 3, if there is one")
    add("--data_dir", help="data folder of the checkpoints, for its test images")
    add("--img_type", type=image_type, default="png", help="image files to read")
    add("--ranks", type=number(float, 0, 1), help="instead of checkpoints, random weights: share of each rank kept")
    add("--skipped", type=number(float, 0, 1), nargs="+", default=[0.3], help="with --ranks: shares of closed switches")
    add("--depth", type=number(int, 8), default=32, help="with --ranks: depth")
    add("--width", type=number(int, 1), default=64, help="with --ranks: width")
    add("--resize", type=number(int, 8), default=32, help="with --ranks: height and width of the images")
    add("--threads", type=number(int, 1), nargs="+", default=[torch.get_num_threads()], help="CPU threads to compare")
    add("--compile", action="store_true", help="measure torch.compile too")
    add("--seconds", type=number(float, 0), default=15.0, help="for a runtime and a batch size, 5 rounds at least")
    add("--output", type=Path, default=Path("inference.json"), help="JSON file to write")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        if PROVIDERS[device] not in onnxruntime.get_available_providers():
            print(f"the installed onnxruntime has no {PROVIDERS[device]}: exported networks are not run on {device}")
    print(", ".join(f"{name}: {value}" for name, value in machine().items()))
    rows: list[Row] = []
    accuracies: dict[str, float] = {}
    for skipped in args.skipped if args.ranks is not None else [None]:
        subject = chosen_subject(args, skipped)
        contest = Contest(subject)
        accuracies |= contest.accuracies()
        for device, threads in itertools.product(devices, args.threads):
            torch.set_num_threads(threads)
            print(HEADER)
            for batch in BATCHES:
                place = {"device": device, "threads": threads, "skipped": skipped, "batch": batch}
                new = list(compared(contest, place, args))
                if subject.dynamic is not None and subject.dynamic.free_switches:
                    new += routed(contest, place, args)
                print("\n".join(line(row) for row in new), flush=True)
                rows += new
    print("\n" + table(rows, accuracies))
    content = {"machine": machine(), "arguments": {k: str(v) for k, v in vars(args).items()}}
    try:
        write_json(args.output, {**content, "accuracies": accuracies, "rows": [asdict(row) for row in rows]})
    except OSError as error:
        raise UserError(f"{args.output} cannot be written ({error}): choose another --output") from None
    print(f"written to {args.output}")


def chosen_subject(args: argparse.Namespace, skipped: float | None) -> Subject:
    if skipped is not None:
        return with_random_weights(args.depth, args.width, args.resize, args.ranks, skipped)
    if not (args.dense and args.static and args.data_dir):
        raise UserError("there is nothing to measure: give --dense, --static and --data_dir, or --ranks")
    return from_checkpoints(args.dense, args.static, args.dynamic, args.data_dir, args.img_type)


class Contest:
    """The networks that are compared, in all their forms."""

    def __init__(self, subject: Subject):
        self.subject = subject
        size, normalisation = subject.image_size, subject.normalisation
        self.networks = {
            DENSE: without_switches(subject.dense),
            STATIC: without_switches(subject.static),
        }
        if subject.dynamic is not None:
            self.networks[DYNAMIC] = subject.dynamic
        flops = network_cost(self.networks[STATIC], size).flops
        round_to = 8 if subject.dense.classifier.in_features >= 128 else None
        rounded = Competitor("magnitude", everywhere=False, round_to=round_to)
        self.networks[CHANNELS] = torch_pruned(subject.dense, rounded, flops, size, batches=[])
        self.graphs = {n: onnx_model(deployable(net, normalisation), size) for n, net in self.networks.items()}
        self.quantised = {n: quantised(graph, subject.calibration.numpy()) for n, graph in self.graphs.items()}

    def accuracies(self) -> dict[str, float]:
        """On the test images, by runtime and network; Torch-Pruning's network is not fine-tuned."""
        test = self.subject.test
        if test is None:
            return {}
        measured = {}
        for name in (n for n in self.networks if n != CHANNELS):
            network = self.networks[name]
            cost = network_cost(network, self.subject.image_size)
            for runtime, form in ((EAGER, network), (FOLDED, folded(network))):
                measured[f"{runtime}: {name}"] = evaluate(form, test, self.subject.normalisation, cost).accuracy
            measured[f"{EXPORTED}: {name}"] = accuracy(self.graphs[name], test)
            measured[f"{INT8}: {name}"] = accuracy(self.quantised[name], test)
        return measured


def compared(contest: Contest, place: dict[str, Any], args: argparse.Namespace) -> Iterator[Row]:
    """All networks in all runtimes, against the dense one in the same."""
    subject, device, threads = contest.subject, place["device"], place["threads"]
    items = items_of(subject.pixels, place["batch"])
    runs: dict[tuple[str, str], Run] = {}
    for name, network in contest.networks.items():
        runs[EAGER, name] = eager(network, subject, items, device, thresholded)
        runs[FOLDED, name] = eager(folded(network), subject, items, device, thresholded)
        if args.compile and not network.switches:
            runs[COMPILED, name] = eager(folded(network), subject, items, device, thresholded, compiled=True)
        if PROVIDERS[device] in onnxruntime.get_available_providers():
            runs[EXPORTED, name] = exported(contest.graphs[name], items, device, threads)
            if device == "cpu":
                runs[INT8, name] = exported(contest.quantised[name], items, device, threads)
    flops = {name: executed_flops(network, subject, items) for name, network in contest.networks.items()}
    timings = in_turns(runs, len(items), args.seconds)
    for (runtime, name), timing in timings.items():
        yield row(place, runtime, name, DENSE, flops, timing, timings[runtime, DENSE])


def routed(contest: Contest, place: dict[str, Any], args: argparse.Namespace) -> Iterator[Row]:
    """The switched network as its switches decide, against the same network with every block run.

    In PyTorch the gates are computed on both sides; the exported network that runs every block has none.
    """
    subject, device = contest.subject, place["device"]
    items = items_of(subject.pixels, place["batch"])
    network, size = subject.dynamic, subject.image_size
    every = f"{DYNAMIC}, all on"
    runs: dict[tuple[str, str], Run] = {
        (EAGER, DYNAMIC): eager(network, subject, items, device, thresholded),
        (EAGER, every): eager(network, subject, items, device, all_on),
    }
    if PROVIDERS[device] in onnxruntime.get_available_providers():
        whole = onnx_model(without_switches(deployable(network, subject.normalisation)), size)
        runs[EXPORTED, DYNAMIC] = exported(contest.graphs[DYNAMIC], items, device, place["threads"])
        runs[EXPORTED, every] = exported(whole, items, device, place["threads"])
    flops = {
        name: executed_flops(network, subject, items, rule) for name, rule in ((DYNAMIC, thresholded), (every, all_on))
    }
    timings = in_turns(runs, len(items), args.seconds)
    for runtime, name in timings:
        if name == DYNAMIC:
            yield row(place, runtime, name, every, flops, timings[runtime, name], timings[runtime, every])


def in_turns(runs: dict[tuple[str, str], Run], items: int, seconds: float) -> dict[tuple[str, str], Timing]:
    """Timings of all networks, those of each runtime in turns."""
    timings: dict[tuple[str, str], Timing] = {}
    for runtime in dict.fromkeys(runtime for runtime, _ in runs):
        timings |= alternated({pair: run for pair, run in runs.items() if pair[0] == runtime}, items, seconds)
    return timings


def row(
    place: dict[str, Any], runtime: str, name: str, baseline: str, flops: dict[str, float], own: Timing, other: Timing
) -> Row:
    flop_ratio, speedup = flops[baseline] / flops[name], other.median / own.median
    return Row(
        **place, runtime=runtime, network=name, baseline=baseline, flops=flops[name], flop_ratio=flop_ratio, timing=own,
        speedup=speedup, kept=speedup / flop_ratio,
    )  # fmt: skip


def items_of(pixels: Tensor, batch: int) -> list[Tensor]:
    """What one round runs: some single images, spread over all of them, or one batch; uint8 [batch, 3, H, W] each."""
    count = SINGLE_IMAGES if batch == 1 else batch
    chosen = pixels[evenly_spaced(len(pixels), count)]
    return list(chosen.split(batch))


def eager(
    network: ResNet,
    subject: Subject,
    items: list[Tensor],
    device: str,
    decide: Callable[[Tensor], Tensor],
    compiled: bool = False,
) -> Run:
    """The network as the stages run it, with normalised images already on the device."""
    network = placed(copy.deepcopy(network), torch.device(device))
    if compiled:
        network.compile()
    images = [subject.normalisation.apply(item).to(device, memory_format=torch.channels_last) for item in items]

    @torch.inference_mode()
    def run(item: int) -> None:
        network(images[item], decide=decide)
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def exported(model: Any, items: list[Tensor], device: str, threads: int) -> Run:
    """The graph as ONNX Runtime runs it, with uint8 images in main memory."""
    network = ExportedNetwork(model, device, threads)
    images = [item.numpy() for item in items]
    return lambda item: network(images[item])


@torch.no_grad()
def executed_flops(network: ResNet, subject: Subject, items: list[Tensor], decide: DecisionRule = thresholded) -> float:
    """FLOPs of one image of the unfolded network, mean over the images; those of skipped blocks left out."""
    cost = network_cost(network, subject.image_size)
    if network.switches == 0:
        return float(cost.flops)
    decisions = network(subject.normalisation.apply(torch.cat(items)), decide=decide).decisions
    return cost.executed(decisions).mean().item()


HEADER = (
    "| device, threads | batch | runtime | network | against | GFLOPs | ms (quartiles) | speed-up "
    "| FLOP ratio | kept |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def line(row: Row) -> str:
    """A row of the Markdown table."""
    median, lower, upper = (
        f"{1e3 * t:.3g}" for t in (row.timing.median, row.timing.lower_quartile, row.timing.upper_quartile)
    )
    return (
        f"| {row.device}, {row.threads} | {row.batch} | {row.runtime} | {row.network} | {row.baseline} "
        f"| {row.flops / 1e9:.3g} | {median} ({lower} to {upper}) | {row.speedup:.2f}x "
        f"| {row.flop_ratio:.2f}x | {row.kept:.2f} |"
    )


def table(rows: list[Row], accuracies: dict[str, float]) -> str:
    """Accuracy, FLOPs, latency and throughput of every network, each with its ratio to the dense one's, in Markdown."""
    lines = []
    against_dense = [row for row in rows if row.baseline == DENSE]
    for device, threads, skipped in dict.fromkeys((r.device, r.threads, r.skipped) for r in against_dense):
        lines += [
            f"{device}, {threads} threads" + ("" if skipped is None else f", {skipped:.0%} of the switches closed"),
            "",
            "| runtime | network | accuracy | GFLOPs of the timed images | " + " | ".join(COLUMNS.values()) + " |",
            "|---|---|---|---|" + "---|" * len(COLUMNS),
        ]
        own = [r for r in against_dense if (r.device, r.threads, r.skipped) == (device, threads, skipped)]
        place = lambda pair: (RUNTIMES.index(pair[0]), NETWORKS.index(pair[1]))  # noqa: E731
        for runtime, network in sorted({(r.runtime, r.network) for r in own}, key=place):
            by_batch = {r.batch: r for r in own if (r.runtime, r.network) == (runtime, network)}
            cells = []
            for batch in COLUMNS:
                seconds, speedup = by_batch[batch].timing.median, by_batch[batch].speedup
                shown = f"{1e3 * seconds:.2f} ms" if batch == 1 else f"{batch / seconds:,.0f}/s"
                cells.append(f"{shown} ({speedup:.2f}x)")
            measured = accuracies.get(f"{FOLDED if runtime == COMPILED else runtime}: {network}")
            first = by_batch[1]
            lines.append(
                f"| {runtime} | {network} | {'–' if measured is None else f'{measured:.2%}'} "
                f"| {first.flops / 1e9:.3g} ({first.flop_ratio:.2f}x fewer) | {' | '.join(cells)} |"
            )
        lines.append("")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the times depend on."""
    names, flags = [], []
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [text.partition(":")[2].strip() for text in lines if text.startswith("model name")]
        flags = next((text.split() for text in lines if text.startswith("flags")), [])
    return {
        "system": platform.platform(),
        "cpu": names[0] if names else platform.processor(),
        "instructions": [flag for flag in INSTRUCTIONS if flag in flags],
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
    }


if __name__ == "__main__":
    run_command(main, goes_on=None)
