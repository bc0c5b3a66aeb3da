"""Tables and pictures of a study (``scripts/study.sh``), rebuilt from its runs' small records alone.

    python -m benchmarks.study RESULT_DIR                    # writes study.md and study.png there
    python -m benchmarks.study RESULT_DIR --keep FOLDER      # copies the records that they are made from, and no images

What is read below RESULT_DIR: ``seed_*/results.json`` (the three stages), ``reference/seed_*/results.json`` (trained
without switches), ``dense_switched/seed_*/results.json`` (switches on the unpruned network), ``alternatives_*.jsonl``
and ``criteria.json`` (their benchmarks' own).  What is not there yet leaves its rows out.
"""

import argparse
import json
import shutil
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks.common import read_lines
from utils.errors import UserError, run_command
from utils.results import METHODS

RECORDS = ("seed_*/results.json", "*/seed_*/results.json", "alternatives_*.jsonl", "criteria.json", "criteria.jsonl")
METRICS = ("seed_*/*/*/*/*/metrics.jsonl", "*/seed_*/*/*/*/*/metrics.jsonl")
ALTERNATIVES = {
    "start": "static, where the others start",
    "pruned further": "(a) pruned further",
    "blocks removed": "(b) blocks removed for all images",
    "switches": "(c) switches",
    "random switches": "(d) switches at random, same rates",
    "Torch-Pruning": "Torch-Pruning, at static's FLOPs",
}

Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables and pictures of a study.", allow_abbrev=False)
    parser.add_argument("results", type=Path, help="folder of the study, or of its records")
    parser.add_argument("--keep", type=Path, help="folder to copy the small records to")
    args = parser.parse_args()
    stages = rows_by_stage(args.results, "")
    if not stages["sp"]:
        raise UserError(f"{args.results} holds no seed_*/results.json: run scripts/study.sh with this folder first")
    if args.keep:
        keep(args.results, args.keep)
    text = "\n".join(tables(args.results, stages))
    (args.results / "study.md").write_text(text)
    draw(args.results, stages).savefig(args.results / "study.png", dpi=120)
    print(text)


def keep(source: Path, target: Path) -> None:
    """Copy the records that tables and pictures are made from, and the epochs' metrics."""
    for pattern in (*RECORDS, *METRICS):
        for path in source.glob(pattern):
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def rows_by_stage(results: Path, part: str) -> dict[str, list[Record]]:
    """The last record of every stage and seed below ``results/part``."""
    found: dict[str, list[Record]] = {stage: [] for stage in METHODS}
    for path in sorted((results / part).glob("seed_*/results.json")):
        for stage, record in {record["stage"]: record for record in json.loads(path.read_text())}.items():
            found[stage].append(record)
    return found


def alternatives(results: Path) -> dict[str, list[Record]]:
    """The measurements of ``benchmarks.alternatives`` by method, one a seed."""
    lines = [line for path in sorted(results.glob("alternatives_*.jsonl")) for line in read_lines(path)]
    return {method: [line for line in lines if line["method"] == method] for method in ALTERNATIVES}


def spread(values: Iterable[float], digits: int = 2, factor: float = 1.0, unit: str = "") -> str:
    """Mean and, of more than one value, standard deviation."""
    values = [factor * value for value in values if value is not None]
    if not values:
        return "–"
    mean = f"{statistics.mean(values):,.{digits}f}"
    return (f"{mean} ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else mean) + unit


def tables(results: Path, stages: dict[str, list[Record]]) -> list[str]:
    """The study's tables in Markdown, line by line."""
    lines = ["## The three stages", ""]
    lines += ["| network | seeds | accuracy | GFLOPs executed | parameters | computation | latency | images a second |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    rows = [(METHODS[stage], records) for stage, records in stages.items()]
    rows.append(("trained without switches", rows_by_stage(results, "reference")["sp"]))
    rows.append(("switches on the unpruned network", rows_by_stage(results, "dense_switched")["rl_pruned"]))
    lines += [stage_row(name, records) for name, records in rows if records]
    found = alternatives(results)
    if any(found.values()):
        lines += [
            "",
            "## At as many executed FLOPs",
            "",
            "| method | seeds | accuracy | GFLOPs executed | parameters |",
        ]
        lines += ["|---|---|---|---|---|"]
        for method, name in ALTERNATIVES.items():
            if measured := found[method]:
                lines.append(
                    f"| {name} | {len(measured)} | {spread((m['accuracy'] for m in measured), factor=100)} % "
                    f"| {spread((m['gflops'] for m in measured), 4)} "
                    f"| {spread((m.get('parameters') for m in measured), 0)} |"
                )
        bits = [m["bits"] for m in found["switches"]]
        routes = spread(m["bits_of_routes"] for m in found["switches"])
        lines += [
            "",
            f"Decisions tell {routes} bits of an image; the switches' own entropies add up to {spread(bits)} bits.",
        ]
    return [*lines, ""]


def stage_row(name: str, records: Sequence[Record]) -> str:
    every_block = records[0]["stage"] != "rl_pruned"
    accuracy = "accuracy_every_block" if every_block else "accuracy"
    return (
        f"| {name} | {len(records)} | {spread((r[accuracy] for r in records), factor=100)} % "
        f"| {spread((r['gflops'] for r in records), 4)} | {spread((r['parameters'] for r in records), 0)} "
        f"| {'100.0' if every_block else spread((r['computation'] for r in records), 1, 100)} % "
        f"| {spread((r.get('latency_ms') for r in records), 2, unit=' ms')} "
        f"| {spread((r.get('throughput') for r in records), 0)} |"
    )


def draw(results: Path, stages: dict[str, list[Record]]) -> Figure:
    """Accuracy against executed GFLOPs, and against measured latency; a point a seed, a line where there is a curve."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    against_flops, against_latency = figure.subplots(1, 2, sharey=True)
    for stage, colour, marker in (("sp", "#333333", "o"), ("pruned", "#1f77b4", "s"), ("rl_pruned", "#d62728", "^")):
        records = stages[stage]
        accuracies = [r["accuracy" if stage == "rl_pruned" else "accuracy_every_block"] for r in records]
        style = {"color": colour, "marker": marker, "linestyle": "", "label": METHODS[stage]}
        against_flops.plot([r["gflops"] for r in records], accuracies, **style)
        measured = [(r["latency_ms"], a) for r, a in zip(records, accuracies, strict=True) if r.get("latency_ms")]
        if measured:
            against_latency.plot(*zip(*measured, strict=True), **style)
        for record in records:
            points = sorted((p["gflops"], p["accuracy"]) for p in record["points"])
            if points:
                against_flops.plot(*zip(*points, strict=True), color=colour, alpha=0.35, linewidth=1)
    styles = {
        "pruned further": ("#17becf", "v"),
        "blocks removed": ("#2ca02c", "D"),
        "random switches": ("#ff7f0e", "x"),
    }
    found = alternatives(results)
    for method, (colour, marker) in styles.items():
        if measured := found[method]:
            points = [[m[key] for m in measured] for key in ("gflops", "accuracy")]
            against_flops.plot(*points, color=colour, marker=marker, linestyle="", label=method)
    for axis, label in (
        (against_flops, "GFLOPs executed for one image"),
        (against_latency, "milliseconds for one image"),
    ):
        axis.set(xlabel=label)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
        if axis.has_data():
            axis.legend(fontsize=8)
    against_flops.set_ylabel("accuracy on the test images")
    return figure


if __name__ == "__main__":
    run_command(main, resumable=False)
