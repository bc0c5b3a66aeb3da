"""The results of all stages: what a finished run measures, and the table and the picture of all runs."""

import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from models import all_on
from utils import parallel
from utils.checkpoint import Checkpoint
from utils.data.images import Images
from utils.device import placed
from utils.errors import UserError
from utils.evaluate import evaluate
from utils.files import atomic_write, write_json
from utils.flops import network_cost
from utils.predecessors import relative_to_results
from utils.records import METHODS, RESULTS, Record, latest_chain, read_records, results_locked, save_records
from utils.run import BEST, Run

TIMED_IMAGES = 1000  # test images at most that speeds are measured on
SHOWN = ("compression", "computation", "gflops", "latency_ms", "parameters", "throughput")  # beside hyperparameters
NOT_MEASURED = {"latency_ms": None, "throughput": None}
BATCH = 128  # images of a batch that throughput is measured with
# Of checkpoints by name and test images, uint8 [N, 3, H, W]: latency_ms and throughput by name, see ``deploy.speeds``.
MeasureSpeeds = Callable[[dict[str, Path], Tensor], dict[str, dict[str, float]]]


def report(
    result_dir: str | Path,
    run: Run,
    best: Checkpoint,
    test: Images,
    selected_on: str,
    device: torch.device,
    measure_speeds: MeasureSpeeds,
    points: list[dict[str, float]] | None = None,
    within_budget: bool = True,
) -> Record:
    """Measure a finished run's best network on the test images; add it to the results, draw them, print the table.

    Several processes share the test images; one does the rest.

    Args:
        best: the checkpoint the run chose.
        measure_speeds: of the exported networks.
        selected_on: what it was chosen on: "validation", "test" or "last epoch".
        points: gflops and accuracy of other networks of the run, for the picture.
        within_budget: whether it kept the accuracy (or the computation) that the run was asked for.
    """
    result_dir = Path(result_dir).expanduser()
    network = placed(best.network(), device)
    test = test.to(device)
    cost = network_cost(network, best.data["image_size"])
    measured = evaluate(network, test, best.normaliser(), cost)
    counted = measured.flops_executed if best.stage == "rl_pruned" else measured.flops_all
    record = {
        "method": METHODS[best.stage],
        "stage": best.stage,
        "dataset": best.data["name"],
        **{key: best.architecture[key] for key in ("network", "depth", "width", "num_classes", "gate")},
        "accuracy": measured.accuracy,
        "accuracy_every_block": evaluate(network, test, best.normaliser(), cost, all_on).accuracy,
        "gflops": counted / 1e9,
        "gflops_all": measured.flops_all / 1e9,
        "gflops_executed": measured.flops_executed / 1e9,
        "parameters": cost.parameters,
        "compression": best.compression(cost),
        "computation": measured.computation,
        "seed": best.seed,
        "checkpoint": relative_to_results(run.path / BEST, result_dir),
        "source": best.source,
        "selected_on": selected_on,
        "within_budget": within_budget,
        "points": points or [],
        **NOT_MEASURED,
    }
    if not parallel.is_main_process():
        return record
    save_records(result_dir, [record])  # first of all, so that nothing can keep a finished run from it
    with results_locked(result_dir, run.say):
        records = read_records(result_dir)
        write_results(result_dir, records)
    run.say("measuring the exported networks")
    files = {r["checkpoint"]: result_dir / r["checkpoint"] for r in latest_chain(records, record)}
    speeds = measure_speeds(files, test[:: -(-len(test) // TIMED_IMAGES)].pixels.cpu())
    with results_locked(result_dir, run.say):
        records = read_records(result_dir)  # anew: other runs may have ended meanwhile
        measured_now = [r for r in records if r["checkpoint"] in files]
        for r in measured_now:
            r.update(speeds.get(r["checkpoint"], NOT_MEASURED))
        save_records(result_dir, measured_now)
        write_results(result_dir, records)
    record = next((r for r in records if r["checkpoint"] == record["checkpoint"]), record)
    chain = latest_chain(records, record)
    run.say(f"\n{results_table(chain)}")
    shown = {"accuracy": _accuracy(record)} | {key: record[key] for key in SHOWN if record[key] is not None}
    run.results(results_table(chain), shown)
    run.picture("results", results_picture(chain))
    run.say(f"table    {result_dir / 'results.md'}")
    run.say(f"picture  {result_dir / 'results.png'}")
    run.say(f"watch    tensorboard --logdir {result_dir}  (overview: http://localhost:6006/#custom_scalars)")
    return record


def write_results(result_dir: Path, records: list[Record]) -> None:
    """Write results.json, results.md and results.png.

    Raises:
        UserError: if they cannot be written.
    """
    try:
        write_json(result_dir / RESULTS, records)
        with atomic_write(result_dir / "results.md") as file:
            file.write(results_table(records).encode())
        with atomic_write(result_dir / "results.png") as file:
            results_picture(records).savefig(file, format="png", dpi=120)
    except OSError as error:
        raise UserError(f"results cannot be written to {result_dir} ({error}): free space or mend its rights") from None


def _subject(record: Record) -> tuple:
    return tuple(record[key] for key in ("dataset", "network", "depth", "width"))


def results_table(records: list[Record]) -> str:
    """The table in Markdown: for each data set and network the newest chain of stages, with footnotes."""
    sections = []
    for subject in dict.fromkeys(_subject(r) for r in records):
        chain = latest_chain([r for r in records if _subject(r) == subject])
        dataset, network, depth, width = subject
        lines = [
            f"## {dataset}, {network}{depth}, width {width}",
            "",
            f"| Methods | Accuracy | FLOPS (in GFLOPS) | Compression | Parameters | Computation "
            f"| Latency (batch 1) | Throughput (batch {BATCH}) |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for before, r in zip([None, *chain], chain, strict=False):
            note = "[^test]" if r["selected_on"] == "test" else ""
            note += "" if r.get("within_budget", True) else "[^budget]"
            note += "[^source]" if _other_source(before, r) else ""
            computation = r["computation"] if r["stage"] == "rl_pruned" else 1.0
            lines.append(
                f"| {r['method']}{note} | {_accuracy(r):.2%} | {_three_digits(r['gflops'])} "
                f"| {r['compression']:.1%} | {r['parameters']:,} | {computation:.1%} "
                f"| {_or_dash(r, 'latency_ms', '{:.2f} ms')} | {_or_dash(r, 'throughput', '{:,.0f}/s')} |"
            )
        lines += [
            "",
            "Accuracy on the test images. FLOPS: two per multiply-add, one image. Every block is run and counted in "
            "the first two rows; in the third the switches decide, and FLOPS are the mean of what is executed. "
            "Computation: executed share. Latency and throughput: exported networks with ONNX Runtime on the CPU, all "
            "rows in one run; in the third, blocks are skipped, in batches as on single images.",
        ]
        if any(r.get("latency_ms") is None for r in chain):
            lines += ["", "–: not measured; it needs the row's checkpoint."]
        if any(r["selected_on"] == "test" for r in chain):
            lines += ["", "[^test]: chosen on the test images, for want of validation images: its accuracy flatters."]
        if not all(r.get("within_budget", True) for r in chain):
            lines += [
                "",
                "[^budget]: no network met the budget; this is the nearest to it, or the one it started from.",
            ]
        for before, r in itertools.pairwise(chain):
            if _other_source(before, r):
                lines += ["", f"[^source]: made from {r['source']}, not from the network of the row above."]
        sections.append("\n".join(lines) + "\n")
    return "\n".join(sections)


def _other_source(before: Record | None, record: Record) -> bool:
    """Whether a row was made from another network of the run that the row above it shows the choice of."""
    return before is not None and Path(record["source"]) != Path(before["checkpoint"])


def _accuracy(record: Record) -> float:
    """Of the same network that the row's FLOPs are counted for; older records have only the switches' accuracy."""
    switched = record["stage"] == "rl_pruned" or "accuracy_every_block" not in record
    return record["accuracy"] if switched else record["accuracy_every_block"]


def _or_dash(record: Record, key: str, form: str) -> str:
    """The value, or a dash where it was not measured (or the record is older than the measurement)."""
    value = record.get(key)
    return "–" if value is None else form.format(value)


def _three_digits(gflops: float) -> str:
    return f"{gflops:.3g}" if gflops < 1 else f"{gflops:.2f}"


def results_picture(records: list[Record]) -> Figure:
    """A column for each data set and network: accuracy against GFLOPs and, where measured, against latency.

    Every iteration of static pruning is a point of the first.
    """
    subjects = list(dict.fromkeys(_subject(r) for r in records))
    chains = [latest_chain([r for r in records if _subject(r) == subject]) for subject in subjects]
    rows = 2 if any(r.get("latency_ms") for chain in chains for r in chain) else 1
    figure = Figure(figsize=(6 * len(subjects), 4.2 * rows), layout="constrained")
    axes = figure.subplots(rows, len(subjects), squeeze=False)
    for column, (subject, chain) in enumerate(zip(subjects, chains, strict=True)):
        title = f"{subject[0]}, {subject[1]}{subject[2]}, width {subject[3]}"
        _draw_panel(axes[0][column], chain, "gflops", "GFLOPs for one image")
        axes[0][column].set_title(title)
        if rows == 2:
            measured = [r for r in chain if r.get("latency_ms")]
            _draw_panel(axes[1][column], measured, "latency_ms", "measured milliseconds for one image")
    return figure


def _draw_panel(axis: Axes, chain: list[Record], key: str, label: str) -> None:
    """Accuracy of the records of one chain against ``key``."""
    styles = {"sp": ("o", "#333333"), "pruned": ("s", "#1f77b4"), "rl_pruned": ("^", "#d62728")}
    for record in chain:
        marker, colour = styles[record["stage"]]
        points = sorted((p[key], p["accuracy"]) for p in record["points"] if key in p)
        if points:
            axis.plot(*zip(*points, strict=True), marker=".", color=colour, alpha=0.4, linewidth=1)
        axis.plot(record[key], _accuracy(record), marker, color=colour, markersize=9, label=record["method"])
    axis.set(xlabel=label, ylabel="accuracy on the test images")
    axis.set_xlim(left=0)
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axis.grid(alpha=0.3)
    if chain:
        axis.axhline(_accuracy(chain[0]) - 0.01, color="#999999", linestyle=":", label="one point below the first")
        axis.legend(loc="best", fontsize=8)
