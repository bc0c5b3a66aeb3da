"""The results of all stages: the table and the picture of all runs."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from utils.errors import UserError
from utils.files import atomic_write, write_json
from utils.runs.records import DYNAMIC, RESULTS, Record, chains, names, timed_together
from utils.sizes import shown_size

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
        raise UserError(
            f"results cannot be written to {result_dir} ({error}): free disk space or fix permissions"
        ) from None


def _subject(record: Record) -> tuple:
    return tuple(record[key] for key in ("dataset", "network", "depth", "width"))


def _title(record: Record) -> str:
    """The title of a chain: data, network, gate (which users' networks do not have), seed and image size."""
    dataset, network, depth, width = _subject(record)
    parts = [str(dataset), f"{network}{depth}", *([f"width {width}"] if width else [])]
    parts += [f"gate {record['gate']}"] if "gate" in record else []
    return ", ".join([*parts, f"seed {record['seed']}", f"{shown_size(record['image_size'])} pixels"])


def results_table(records: list[Record]) -> str:
    """Markdown: a table for every chain of stages, newest first, then the meaning of the columns, and footnotes."""
    sections, footnotes = [], {}
    found = [timed_together(chain) for chain in chains(records)]
    for chain in found:
        lines = [
            f"## {_title(chain[0])}",
            "",
            f"| Methods | Accuracy | FLOPS (in GFLOPS) | Compression | Parameters | Computation "
            f"| Latency (batch 1) | Throughput (batch {BATCH}) |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for before, r in zip([None, *chain], chain, strict=False):
            speeds = (_or_dash(r, "latency_ms", "{:.2f} ms"), _or_dash(r, "throughput", "{:,.0f}/s"))
            lines.append(f"| {' | '.join([r['method'] + _marks(before, r, footnotes), *cells(r), *speeds])} |")
        lines += ["", "Runs: " + ", ".join(f"`{Path(r['checkpoint']).parent}`" for r in chain)]
        sections.append("\n".join(lines) + "\n")
    if any(r["latency_ms"] is None for chain in found for r in chain):
        sections.append("–: not measured; it needs the row's checkpoint, and a network that can be exported.\n")
    sections.append(
        "Accuracy is that on the test images. FLOPS are for one image, two per multiply-add. In the first two methods "
        "every block is run and counted. In the others, switches or a cascade decide, and FLOPS are the mean of what "
        "is executed. Computation is the executed share. Latency and throughput are those of the exported networks in "
        "ONNX Runtime on the CPU, all rows of a table measured in one run. Blocks and networks that are skipped are "
        "not computed, neither in batches nor for single images.\n"
    )
    sections += [f"[^{mark}]: {text}\n" for text, mark in footnotes.items()]
    return "\n".join(sections)


def cells(record: Record) -> list[str]:
    """A record's accuracy, FLOPS, compression, parameters and computation as the table shows them."""
    computation = record["computation"] if record["stage"] in DYNAMIC else 1.0
    return [
        f"{shown_accuracy(record):.2%}",
        f"{record['gflops']:.3g}" if record["gflops"] < 1 else f"{record['gflops']:.2f}",
        f"{record['compression']:.1%}",
        f"{record['parameters']:,}",
        f"{computation:.1%}",
    ]


def _marks(before: Record | None, record: Record, footnotes: dict[str, str]) -> str:
    """The marks of a row's footnotes; new ones are added to ``footnotes`` (mark by text)."""
    texts = []
    if record["selected_on"] == "test":
        text = "chosen on the test images, as there are no validation images: its accuracy is too optimistic."
        texts.append((text, "test"))
    if not record["within_budget"]:
        text = "no network met the budget; this is the closest, or the network that the stage started from."
        texts.append((text, "budget"))
    if before is not None and Path(record["source"]) not in map(Path, names(before)):
        others = sum(mark.startswith("source") for mark in footnotes.values())
        text = f"made from {record['source']}, not from the network of the row above."
        texts.append((text, f"source{others + 1 if others else ''}"))
    return "".join(f"[^{footnotes.setdefault(text, mark)}]" for text, mark in texts)


def shown_accuracy(record: Record) -> float:
    """The accuracy of the network whose FLOPs the row shows."""
    return record["accuracy" if record["stage"] in DYNAMIC else "accuracy_every_block"]


def _or_dash(record: Record, key: str, form: str) -> str:
    """The value, or a dash where it was not measured."""
    value = record[key]
    return "–" if value is None else form.format(value)


def results_picture(records: list[Record]) -> Figure:
    """One column per data set and network: its newest chain's accuracy against GFLOPs and, if measured, latency.

    The upper panel shows every iteration of static pruning.
    """
    newest = {}
    for chain in chains(records):
        newest.setdefault(_subject(chain[0]), timed_together(chain))
    rows = 2 if any(r["latency_ms"] for chain in newest.values() for r in chain) else 1
    figure = Figure(figsize=(6 * len(newest), 4.2 * rows), layout="constrained")
    axes = figure.subplots(rows, len(newest), squeeze=False)
    for column, chain in enumerate(newest.values()):
        _draw_panel(axes[0][column], chain, "gflops", "GFLOPs for one image")
        axes[0][column].legend(loc="best", fontsize=8)  # of both panels: below, it would hide points
        axes[0][column].set_title(_title(chain[0]), fontsize=9, parse_math=False)
        if rows == 2:
            measured = [r for r in chain if r["latency_ms"]]
            _draw_panel(axes[1][column], measured, "latency_ms", "latency of one image, ms")
    return figure


def _draw_panel(axis: Axes, chain: list[Record], key: str, label: str) -> None:
    """Accuracy of the records of one chain against ``key``."""
    styles = {
        "sp": ("o", "#333333"),
        "pruned": ("s", "#1f77b4"),
        "rl_pruned": ("^", "#d62728"),
        "cascade": ("D", "#2ca02c"),
    }
    for record in chain:
        marker, colour = styles[record["stage"]]
        points = sorted((p[key], p["accuracy"]) for p in record["points"] if key in p)
        if points:
            images = record["points"][0]["measured_on"]
            style = {"marker": ".", "color": colour, "alpha": 0.4, "linewidth": 1}
            axis.plot(*zip(*points, strict=True), label=f"iterations, on the {images} images", **style)
        axis.plot(record[key], shown_accuracy(record), marker, color=colour, markersize=9, label=record["method"])
    axis.set(xlabel=label, ylabel="accuracy")
    axis.set_xlim(left=0)
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.grid(alpha=0.3)
