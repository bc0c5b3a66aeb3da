"""The results of all stages: the table and the picture of all runs."""

import itertools
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from utils.errors import UserError
from utils.files import atomic_write, write_json
from utils.runs.records import RESULTS, Record, latest_chain

BATCH = 128  # images of a batch that throughput is measured with


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
                f"| {r['method']}{note} | {shown_accuracy(r):.2%} | {_three_digits(r['gflops'])} "
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


def shown_accuracy(record: Record) -> float:
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
        axis.plot(record[key], shown_accuracy(record), marker, color=colour, markersize=9, label=record["method"])
    axis.set(xlabel=label, ylabel="accuracy on the test images")
    axis.set_xlim(left=0)
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axis.grid(alpha=0.3)
    if chain:
        axis.axhline(shown_accuracy(chain[0]) - 0.01, color="#999999", linestyle=":", label="one point below the first")
        axis.legend(loc="best", fontsize=8)
