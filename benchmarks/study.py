"""Tables and pictures of a study (``scripts/study.sh``), rebuilt from its runs' small records alone.

    python -m benchmarks.study RESULT_DIR                    # writes study.md, study.png and passing_by_class.png there
    python -m benchmarks.study RESULT_DIR --keep FOLDER      # copies the records that they are made from

What is read below RESULT_DIR: ``seed_*/results.json`` (the three stages), ``reference/seed_*/results.json`` (trained
without switches), ``dense_switched/seed_*/results.json`` (switches on the unpruned network), ``alternatives_*.jsonl``,
``criteria.jsonl``, ``routing.json`` of stage 3's runs, and ``commands.tsv`` (what was run, and for how long).  What is
missing leaves its rows out.
``--keep`` also copies the page of images that the first seed's stage 3 found cheap and expensive.
"""

import argparse
import json
import shutil
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks.common import read_lines
from gating.pictures import draw_passing
from utils.errors import UserError, run_command
from utils.runs.records import METHODS

ROUTING = "seed_*/rl_pruned/*/*/*/routing.json"
RECORDS = (
    *("seed_*/results.json", "*/seed_*/results.json", "alternatives_*.jsonl", "criteria.jsonl"),
    *("seed_*/*/*/*/*/metrics.jsonl", "*/seed_*/*/*/*/*/metrics.jsonl", "seed_*/*/*/*/*/arguments.json"),
    ROUTING,
    "commands.tsv",
)
IMAGES = "seed_0/rl_pruned/*/*/*/easy_and_hard*.png"
ALTERNATIVES = {
    "start": "static, where the others start",
    "pruned further": "(a) pruned further",
    "blocks removed": "(b) blocks removed for all images",
    "switches": "(c) switches",
    "random switches": "(d) switches at random, same rates",
    "switches fixed": "(e) switches fixed where that pays",
    "Torch-Pruning": "Torch-Pruning, at static's FLOPs",
}
STATIC_ALONE = {  # variants of ``benchmarks.criteria``: what they are called, and how they are drawn
    "best forms, refitted": ("the default", "#1f77b4"),
    "Torch-Pruning, Hessian, global": ("Torch-Pruning, Hessian", "#9467bd"),
    "eigendamage": ("EigenDamage as published", "#8c564b"),
    "random": ("random channels", "#7f7f7f"),
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
    text = "\n".join(tables(args.results, stages) + commands(args.results))
    (args.results / "study.md").write_text(text)
    draw(args.results, stages).savefig(args.results / "study.png", dpi=120)
    routes = [json.loads(path.read_text())["passing_by_class"] for path in sorted(args.results.glob(ROUTING))]
    if routes:
        mean = torch.tensor([list(route.values()) for route in routes]).mean(dim=0)
        draw_passing(mean, list(routes[0])).savefig(args.results / "passing_by_class.png", dpi=120)
    print(text)


def keep(source: Path, target: Path) -> None:
    """Copy the records that tables and pictures are made from, and the epochs' metrics; paths lead from the study."""
    for pattern in RECORDS:
        for path in source.glob(pattern):
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(without_paths(path.read_text(), source))
    for path in source.glob(IMAGES):
        shutil.copyfile(path, target / path.name)


def without_paths(text: str, results: Path) -> str:
    """``text`` with the study's folder called RESULTS, and without the path of this program."""
    for path in dict.fromkeys((str(results.resolve()), str(results))):
        text = text.replace(f"{path}/", "RESULTS/").replace(f'"{path}"', '"RESULTS"')
    return text.replace(f"{Path.cwd()}/", "")


def commands(results: Path) -> list[str]:
    """The commands and their total times, as lines of Markdown."""
    path, taken = results / "commands.tsv", {}
    for line in path.read_text().splitlines() if path.exists() else []:
        seconds, command = line.split("\t")
        taken[command.strip()] = taken.get(command.strip(), 0) + int(seconds)
    lines = [f"    {without_paths(command, results)}  # {seconds / 3600:.1f} h" for command, seconds in taken.items()]
    return ["## Commands, with what they took", "", *lines, ""] if lines else []


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


def static_alone(results: Path) -> dict[str, dict[float, list[Record]]]:
    """The measurements of ``benchmarks.criteria`` on test images by variant and share of the FLOPs, one a seed."""
    found: dict[str, dict[float, list[Record]]] = {}
    path = results / "criteria.jsonl"
    for line in read_lines(path) if path.exists() else []:
        found.setdefault(line["variant"], {}).setdefault(line["share"], []).append(line)
    return {variant: dict(sorted(found[variant].items(), reverse=True)) for variant in STATIC_ALONE if variant in found}


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
    reference = rows_by_stage(results, "reference")
    rows.append(("trained without switches", reference["sp"]))
    rows.append(("trained without switches, pruned statically", reference["pruned"]))
    rows.append(("switches on the unpruned network", rows_by_stage(results, "dense_switched")["rl_pruned"]))
    lines += [stage_row(name, records) for name, records in rows if records]
    found = alternatives(results)
    if any(found.values()):
        lines += [
            "",
            "## At as many executed FLOPs",
            "",
            "| method | seeds | accuracy | percentage points ahead of (c) | GFLOPs executed | parameters "
            "| 1 image | 32 images |",
        ]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for method, name in ALTERNATIVES.items():
            if measured := found[method]:
                times = [spread((m.get("milliseconds", {}).get(n) for m in measured), unit=" ms") for n in ("1", "32")]
                lines.append(
                    f"| {name} | {len(measured)} | {spread((m['accuracy'] for m in measured), factor=100)} % "
                    f"| {spread(ahead(measured, found['switches']), factor=100)} "
                    f"| {spread((m['gflops'] for m in measured), 4)} "
                    f"| {spread((m.get('parameters') for m in measured), 0)} | {' | '.join(times)} |"
                )
        bits = [m["bits"] for m in found["switches"]]
        routes = spread(m["bits_of_routes"] for m in found["switches"])
        lines += [
            "",
            f"The decision pattern has {routes} bits of entropy; single switches add up to {spread(bits)} bits.",
        ]
    lines += static_pruning({"with switches": stages, "without": reference})
    if alone := static_alone(results):
        shares = list(next(iter(alone.values())))
        lines += ["", "## Static pruning alone, at once and with the same short fine-tuning", ""]
        lines += ["| method | seeds | " + " | ".join(f"{share:.0%} of the FLOPs" for share in shares) + " |"]
        lines += ["|---|---|" + "---|" * len(shares)]
        for variant, by_share in alone.items():
            cells = [f"{spread((m['test'] for m in by_share.get(share, [])), factor=100)} %" for share in shares]
            seeds = max(len(measured) for measured in by_share.values())
            lines.append(f"| {STATIC_ALONE[variant][0]} | {seeds} | {' | '.join(cells)} |")
    lines += ["", made_with(results)]
    return [*lines, ""]


def static_pruning(trained: dict[str, dict[str, list[Record]]]) -> list[str]:
    """Accuracy of networks trained in several ways, unpruned and after each iteration of stage 2, in Markdown.

    Args:
        trained: records by stage, by what the table calls their networks.
    """
    trained = {name: stages for name, stages in trained.items() if stages["pruned"]}
    if len(trained) < 2:
        return []
    every = [record["points"] for stages in trained.values() for record in stages["pruned"]]
    iterations = range(min(len(points) for points in every))
    flops = [statistics.mean(points[i]["gflops"] for points in every) for i in iterations]
    where = every[0][0].get("measured_on", "test") if iterations else "test"  # what earlier versions measured on
    lines = ["", "## Static pruning of networks with and without switches, iteration by iteration", ""]
    lines += [f"Unpruned networks on the test images, iterations on the {where} images.", ""]
    lines += ["| stage 1 | seeds | unpruned | " + " | ".join(f"{value:.4f} GFLOPs" for value in flops) + " |"]
    lines += ["|---|---|---|" + "---|" * len(iterations)]
    for name, stages in trained.items():
        points = [[record["points"][i]["accuracy"] for record in stages["pruned"]] for i in iterations]
        own = [[record["accuracy_every_block"] for record in stages["sp"]], *points]
        cells = [f"{spread(accuracies, factor=100)} %" for accuracies in own]
        lines.append(f"| {name} | {len(stages['pruned'])} | {' | '.join(cells)} |")
    return lines


def ahead(measured: Sequence[Record], others: Sequence[Record]) -> list[float]:
    """Differences in accuracy, seed by seed, since seeds start from networks of different sizes."""
    theirs = {m["seed"]: m["accuracy"] for m in others if m not in measured}
    return [m["accuracy"] - theirs[m["seed"]] for m in measured if m["seed"] in theirs]


def made_with(results: Path) -> str:
    """The machines and settings that the records name, in a sentence."""
    machines = {json.dumps(m["machine"], sort_keys=True) for own in alternatives(results).values() for m in own}
    stages = []
    for path in sorted(results.glob("seed_0/*/*/*/*/arguments.json")):
        given = json.loads(path.read_text())
        kept = ("epochs", "epochs_start", "epochs_end", "max_iter", "target_flops", "lr", "precision")
        said = ", ".join(f"{key} {given[key]}" for key in kept if key in given)
        stages.append(f"{path.relative_to(results).parts[1]}: {said}")
    machines = [", ".join(f"{key} {value}" for key, value in json.loads(m).items()) for m in sorted(machines)]
    return f"Accuracies are those of the test images. Settings: {'; '.join(stages)}. Machine: {' / '.join(machines)}."


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
    """Accuracy against executed GFLOPs and against measured latency, means with the seeds' deviations as bars.

    Latency is a multiple of what the static network of the same seed took in the same run.
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    against_flops, against_latency = figure.subplots(1, 2, sharey=True)
    for stage, colour, marker in (("sp", "#333333", "o"), ("pruned", "#1f77b4", "s"), ("rl_pruned", "#d62728", "^")):
        records = stages[stage]
        if not records:
            continue
        key = "accuracy" if stage == "rl_pruned" else "accuracy_every_block"
        style = {"color": colour, "marker": marker, "label": METHODS[stage], "zorder": 3}
        bars(against_flops, [r["gflops"] for r in records], [r[key] for r in records], **style)
        static = {r["seed"]: r.get("latency_ms") for r in stages["pruned"]}
        timed = [r for r in records if r.get("latency_ms") and static.get(r["seed"])]
        if timed:
            times = [r["latency_ms"] / static[r["seed"]] for r in timed]
            bars(against_latency, times, [r[key] for r in timed], **style)
        for record in records:
            points = sorted((p["gflops"], p["accuracy"]) for p in record["points"])
            if points:
                against_flops.plot(*zip(*points, strict=True), color=colour, alpha=0.35, linewidth=1)
    styles = {
        "switches": ("#d62728", "o"),
        "pruned further": ("#17becf", "v"),
        "blocks removed": ("#2ca02c", "D"),
        "random switches": ("#ff7f0e", "x"),
        "Torch-Pruning": ("#9467bd", "P"),
    }
    found = alternatives(results)
    for method, (colour, marker) in styles.items():
        if measured := found[method]:
            x, y = ([m[key] for m in measured] for key in ("gflops", "accuracy"))
            bars(against_flops, x, y, color=colour, marker=marker, label=method)
            static = {m["seed"]: m.get("milliseconds") for m in found["start"]}
            timed = [m for m in measured if m.get("milliseconds") and static.get(m["seed"])]
            if timed:
                times = [m["milliseconds"]["1"] / static[m["seed"]]["1"] for m in timed]
                bars(against_latency, times, [m["accuracy"] for m in timed], color=colour, marker=marker, label=method)
    plain = rows_by_stage(results, "reference")
    for number, (unpruned, pruned) in enumerate(zip(plain["sp"], plain["pruned"], strict=False)):
        points = [(unpruned["gflops"], unpruned["accuracy_every_block"])]
        points += [(p["gflops"], p["accuracy"]) for p in pruned["points"]]
        label = {} if number else {"label": "trained without switches, pruned"}
        against_flops.plot(*zip(*sorted(points), strict=True), color="#2a6f2a", linewidth=1, linestyle=":", **label)
    whole = statistics.mean(r["gflops"] for r in stages["sp"])
    for variant, by_share in static_alone(results).items():
        name, colour = STATIC_ALONE[variant]
        x = [whole * statistics.mean(m["flops"] for m in measured) for measured in by_share.values()]
        y = [[m["test"] for m in measured] for measured in by_share.values()]
        deviations = [statistics.stdev(own) if len(own) > 1 else 0 for own in y]
        style = {"color": colour, "linestyle": "--", "linewidth": 1, "capsize": 2, "label": f"at once: {name}"}
        against_flops.errorbar(x, [statistics.mean(own) for own in y], deviations, **style)
    for axis, label in (
        (against_flops, "GFLOPs executed for one image"),
        (against_latency, "time for one image, as a multiple of the static network's"),
    ):
        axis.set(xlabel=label)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
        if axis.has_data():
            axis.legend(fontsize=7)
    against_flops.set_ylabel("accuracy")
    return figure


def bars(axis: Axes, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
    """The mean of some points, with a bar for the deviation in each direction where there are several."""
    deviations = [statistics.stdev(values) if len(values) > 1 else 0 for values in (x, y)]
    axis.errorbar(
        statistics.mean(x), statistics.mean(y), xerr=deviations[0], yerr=deviations[1], linestyle="", capsize=2, **style
    )


if __name__ == "__main__":
    run_command(main, goes_on=None)
