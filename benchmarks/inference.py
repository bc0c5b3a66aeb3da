"""Is it really faster?  Networks of checkpoints in ONNX Runtime on the CPU, in turns: time against executed FLOPs.

    python -m benchmarks.inference DENSE.pt SMALLER.pt... --data_dir data/cifar_100 --int8

The other networks are compared with the first one in the same precision.  Times and FLOPs are means over the same test
images, since cascades and switches run less on some images than on others; accuracies are of all test images.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from benchmarks.common import machine
from deploy.export import accuracy
from deploy.exported import exported_model
from deploy.int8 import calibration_pixels, quantised
from deploy.session import ExportedNetwork
from deploy.speeds import milliseconds
from models import allow
from training.evaluate import Evaluator
from utils.data.folder import load_data
from utils.data.images import Images, evenly_spaced
from utils.errors import UserError, run_command
from utils.files import write_json
from utils.runs.checkpoint import Checkpoint, check_data, load_checkpoint
from utils.settings import image_type, number

BATCHES = (1, 32, 128)
TIMED_IMAGES = 128


@dataclass(frozen=True)
class Row:
    """One network in one precision."""

    precision: str
    network: str
    accuracy: float
    gflops: float  # executed, mean over the timed images
    milliseconds: dict[str, float]  # for an image, by batch size


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure exported networks.", allow_abbrev=False)
    add = parser.add_argument
    add("checkpoints", type=Path, nargs="+", help="checkpoints; the others are compared with the first")
    add("--network", nargs="+", default=[], help="functions of networks of your own")
    add("--data_dir", required=True, help="data folder of the checkpoints")
    add("--img_type", type=image_type, default="any", help="image files to read")
    add("--int8", action="store_true", help="measure int8 versions, too")
    add("--threads", type=number(int, 1), default=1, help="CPU threads")
    add("--seconds", type=number(float, 0), default=20.0, help="per precision and batch size; at least 5 rounds")
    add("--output", type=Path, default=Path("inference.json"), help="JSON file to write")
    args = parser.parse_args()
    for source in args.network:
        allow(source)
    checkpoints = {str(path): load_checkpoint(path) for path in args.checkpoints}
    size = next(iter(checkpoints.values())).data["image_size"]
    data = load_data(args.data_dir, args.img_type, size, workers=2)
    for checkpoint in checkpoints.values():
        check_data(checkpoint, data, size)
    calibration = calibration_pixels(data.train)
    rows = measured("float32", checkpoints, data.test, args)
    if args.int8:
        rows += measured("int8", checkpoints, data.test, args, lambda graph: quantised(graph, calibration))
    print(table(rows))
    try:
        write_json(args.output, {"machine": machine(), "threads": args.threads, "rows": [asdict(row) for row in rows]})
    except OSError as error:
        raise UserError(f"{args.output} cannot be written ({error}): choose another --output") from None


def measured(
    precision: str, checkpoints: Mapping[str, Checkpoint], test: Images, args: argparse.Namespace, finish=None
) -> list[Row]:
    """The rows of one precision; ``finish`` is applied to every graph."""
    timed = test[evenly_spaced(len(test), TIMED_IMAGES)]
    graphs, gflops = {}, {}
    for name, checkpoint in checkpoints.items():
        network, size = checkpoint.network(), checkpoint.data["image_size"]
        graphs[name] = exported_model(network, checkpoint.normaliser(), size, finish=finish)
        gflops[name] = Evaluator(timed, checkpoint.normaliser(), size)(network).flops_executed / 1e9
    networks = {name: ExportedNetwork(graph, threads=args.threads) for name, graph in graphs.items()}
    taken = by_batch(networks, timed.pixels, args.seconds)
    return [Row(precision, name, accuracy(graphs[name], test), gflops[name], taken[name]) for name in checkpoints]


def by_batch(networks: Mapping[str, ExportedNetwork], pixels: Tensor, seconds: float) -> dict[str, dict[str, float]]:
    """Milliseconds for an image by name and batch size, for every batch size in so many seconds."""
    taken = {str(size): milliseconds(networks, pixels, size, seconds) for size in BATCHES}
    return {name: {size: found[name] for size, found in taken.items()} for name in networks}


def table(rows: Sequence[Row]) -> str:
    """Markdown: each time with its ratio to the first network's, and how much of the FLOPs saved that is."""
    sizes = [f"batch {size}" for size in rows[0].milliseconds]
    lines = [f"| precision | network | accuracy | GFLOPs | fewer FLOPs | {' | '.join(sizes)} |"]
    lines.append("|---|---|---|---|---|" + "---|" * len(sizes))
    for row in rows:
        first = next(other for other in rows if other.precision == row.precision)
        fewer = first.gflops / row.gflops
        cells = []
        for size, taken in row.milliseconds.items():
            faster = first.milliseconds[size] / taken
            cells.append(f"{taken:.3g} ms, {faster:.2f}x ({faster / fewer:.2f})")
        lines.append(
            f"| {row.precision} | {row.network} | {row.accuracy:.2%} | {row.gflops:.4f} | {fewer:.2f}x "
            f"| {' | '.join(cells)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main, goes_on=None)
