"""The field's yardstick: ResNets that others trained on CIFAR-10, pruned, alone and in cascades.

The networks were trained on all training images, so thresholds and members are chosen on one half of the test images
and measured on the other, and the reverse; the mean counts.  Single networks choose nothing and are measured on all.

    python -m benchmarks.yardstick RESULT_DIR --data_dir DATA --network FILE.py:FUNCTION... --out FOLDER
    python -m benchmarks.yardstick --out FOLDER      # tables and picture again, from the record in FOLDER

Reads the networks that ``main_prune.py`` left below RESULT_DIR for these functions (with ``val_fraction=0``): each as
it was given, and every iteration.  Writes ``yardstick.json``, ``yardstick.md`` and ``yardstick.png`` to FOLDER.
"""

import argparse
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from torch import Tensor

from benchmarks.common import machine
from deploy.exported import exported_model
from deploy.session import ExportedNetwork
from deploy.timing import alternated
from gating.cascade_report import what_is_known
from gating.cascade_search import Candidate, Predictions, best_under, candidates, cheapest_within, outcome
from models import Cascade, Member, allow
from training.evaluate import Evaluator
from training.norms import placed
from utils.data.augment import Normalisation
from utils.data.folder import load_data
from utils.data.images import Images, evenly_spaced
from utils.device import pick_device
from utils.errors import UserError, run_command
from utils.runs.checkpoint import load_checkpoint
from utils.runs.run import stage_folder
from utils.settings import image_type

DROPS = (-0.005, 0.0, 0.005, 0.01, 0.02)  # of accuracy against the best single network, as cascades are asked for
SHARES = (1.0, 0.8, 0.65, 0.5, 0.4, 0.32, 0.25, 0.2, 0.16, 0.125, 0.1)  # of its FLOPs, the curve of the picture
TIMED_IMAGES, TIMED_SECONDS = 128, 60.0
# Published for ResNet-56 on CIFAR-10: accuracy, times fewer FLOPs, accuracy before.
PUBLISHED = {
    "DepGraph": ((93.77, 2.13, 93.53), (93.64, 2.57, 93.53)),
    "PPSM": ((93.22, 4.1, 93.44),),
    "CHIP": ((92.43, 3.9, 93.26),),
    "TPP": ((92.35, 3.6, 93.78), (89.63, 11.4, 93.78)),
    "L1, 120 epochs": ((93.74, 2.0, 93.78),),
}

LABELS = {"DepGraph": (-34, -13), "L1, 120 epochs": (6, -2), "CHIP": (-22, -3)}  # places beside the points

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Pruned networks of others, alone and in cascades.", allow_abbrev=False
    )
    parser.add_argument("results", type=Path, nargs="?", help="folder that main_prune.py wrote to")
    parser.add_argument("--data_dir", help="data folder")
    parser.add_argument("--img_type", type=image_type, default="png", help="image files to read")
    parser.add_argument("--network", nargs="+", default=[], help="functions that make the networks")
    parser.add_argument("--times", action="store_true", help="only measure the times of the record again")
    parser.add_argument("--out", type=Path, required=True, help="folder of the record")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    record = args.out / "yardstick.json"
    if not record.exists() and (args.times or not args.results):
        raise UserError(f"{record} does not exist: give RESULT_DIR, --data_dir and --network to make it")
    if args.results:
        for source in args.network:
            allow(source)
        data = load_data(args.data_dir, args.img_type, 32, workers=2)
        test = data.test.to(pick_device())
        found = json.loads(record.read_text()) if args.times else measured(args, data.name, test)
        record.write_text(json.dumps(with_times(found, args.results, test), indent=1))
    found = json.loads(record.read_text())
    text = "\n".join(tables(found))
    (args.out / "yardstick.md").write_text(text)
    draw(found).savefig(args.out / "yardstick.png", dpi=120)
    print(text)


def measured(args: argparse.Namespace, data: str, test: Images) -> dict[str, Any]:
    """The record: single networks, cascades by budget and by share of the FLOPs, what their decisions know."""
    cache = args.results / "yardstick_predictions.pt"
    known = torch.load(cache) if cache.exists() else {}
    singles: list[Row] = []
    for path in chain.from_iterable(networks(args.results, data, source) for source in args.network):
        key = f"{path.relative_to(args.results)} {path.stat().st_mtime_ns}"
        if key not in known:
            known[key] = predictions_of(path, test)
            torch.save(known, cache)
        place = str(path.relative_to(args.results))
        singles.append({**known[key][0], "path": place, "predictions": Predictions(*known[key][1])})
        print(f"{singles[-1]['name']}: {singles[-1]['accuracy']:.2%} at {singles[-1]['gflops']:.4g} GFLOPs", flush=True)
    if len(singles) < 2:
        raise UserError(f"{args.results} holds {len(singles)} networks of {args.network}: run main_prune.py first")
    predictions, labels = [row.pop("predictions") for row in singles], test.labels.cpu()
    reference = max(range(len(singles)), key=lambda i: (singles[i]["given"], singles[i]["accuracy"]))
    halves = split_halves(len(labels))
    searched = [candidates([part(p, half) for p in predictions], labels[half]) for half in halves]
    whole = singles[reference]["gflops"] * 1e9

    def of_budget(drop: float) -> Row | None:
        chosen = [
            cheapest_within(found, [part(p, half) for p in predictions], labels[half], reference, drop)
            for found, half in zip(searched, halves, strict=True)
        ]
        return crossed(chosen, predictions, labels, halves, singles)

    def of_share(share: float) -> Row | None:
        chosen = [best_under(found, share * whole) for found in searched]
        return crossed(chosen, predictions, labels, halves, singles)

    return {
        "reference": singles[reference]["name"],
        "networks": singles,
        "budgets": [{"drop": drop, **row} for drop in DROPS if (row := of_budget(drop))],
        "curve": [{"share": share, **row} for share in SHARES if (row := of_share(share))],
    }


def with_times(found: dict[str, Any], results: Path, test: Images) -> dict[str, Any]:
    """The record with the times of its networks and of its cascades, as chosen on the first half."""
    checkpoints = {row["name"]: load_checkpoint(results / row["path"]) for row in found["networks"]}
    timed: dict[Any, Any] = {name: checkpoint.network() for name, checkpoint in checkpoints.items()}
    normalisation = checkpoints[found["reference"]].normaliser()
    cascades = [*found["budgets"], *found["curve"]]
    for number, row in enumerate(cascades):
        one = row["chosen"][0]
        members = [Member(timed[name], list(normalisation.mean), list(normalisation.std)) for name in one["members"]]
        timed[number] = (
            members[0].network if len(members) == 1 else Cascade(members, tuple(one["thresholds"]), one["answer"])
        )
    rows = [*found["networks"], *cascades]
    for row, milliseconds in zip(rows, times(timed, normalisation, test), strict=True):
        row["milliseconds"] = milliseconds
    return {**found, "machine": machine()}


def times(networks: dict[Any, Any], normalisation: Normalisation, test: Images) -> list[dict[str, float]]:
    """Milliseconds per image of each network in ONNX Runtime on one thread, in turns: single images, and a batch."""
    exported = {
        name: ExportedNetwork(exported_model(network.eval(), normalisation, 32), threads=1)
        for name, network in networks.items()
    }
    found: list[dict[str, float]] = [{} for _ in networks]
    for size, items in ((1, TIMED_IMAGES), (TIMED_IMAGES, 1)):
        pixels = test[evenly_spaced(len(test), TIMED_IMAGES)].pixels.cpu().numpy()
        parts = [pixels[i : i + size] for i in range(0, TIMED_IMAGES, size)]
        runs = {name: lambda i, run=run, parts=parts: run(parts[i]) for name, run in exported.items()}
        for row, timing in zip(found, alternated(runs, items, TIMED_SECONDS).values(), strict=True):
            row[str(size)] = 1e3 * timing.median / size
    return found


def networks(results: Path, data: str, source: str) -> list[Path]:
    """The network as given of the newest run, and the iterations of the newest run that pruned it."""
    given = sorted(stage_folder(results, "sp", data, source, 0).glob("*/best.pt"))[-1:]
    pruned = sorted(stage_folder(results, "pruned", data, source, 0).glob("*/iteration_*.pt"))
    return [*given, *(path for path in pruned if path.parent == pruned[-1].parent)]


def predictions_of(path: Path, test: Images) -> tuple[Row, tuple[Tensor, Tensor]]:
    """A network's row, and its probabilities [N, classes] and executed FLOPs [N] on the test images."""
    checkpoint = load_checkpoint(path)
    network = placed(checkpoint.network(), test.device)
    found = Evaluator(test, checkpoint.normaliser(), checkpoint.data["image_size"])(network)
    function, given = checkpoint.architecture["network"].rpartition(":")[2], checkpoint.stage == "sp"
    share = found.flops_all / checkpoint.original["flops"]
    row = {
        "name": function if given else f"{function} at {share:.0%}",
        "function": function,
        "given": given,
        "accuracy": found.accuracy,
        "gflops": found.flops_all / 1e9,
        "share": share,
        "parameters": sum(p.numel() for p in network.parameters()),
    }
    return row, (found.logits.softmax(dim=1), found.executed)


def split_halves(images: int) -> tuple[Tensor, Tensor]:
    """Indices of two halves, drawn once and for all."""
    order = torch.randperm(images, generator=torch.Generator().manual_seed(0))
    return order[: images // 2], order[images // 2 :]


def part(predictions: Predictions, images: Tensor) -> Predictions:
    """Of some of the images."""
    return Predictions(predictions.probabilities[images], predictions.executed[images])


def crossed(
    chosen: Sequence[Candidate | None],
    predictions: Sequence[Predictions],
    labels: Tensor,
    halves: Sequence[Tensor],
    singles: Sequence[Row],
) -> Row | None:
    """Means over the halves of what was chosen on the respective other half; None where a half has no candidate."""
    if None in chosen:
        return None
    done = [
        outcome([part(p, half) for p in predictions], candidate, labels[half])
        for candidate, half in zip(chosen, reversed(halves), strict=True)
    ]
    accuracies = [one.correct.double().mean().item() for one in done]
    known = [
        what_is_known(one, [part(predictions[i], half) for i in candidate.members], labels[half])
        for one, candidate, half in zip(done, chosen, reversed(halves), strict=True)
    ]
    return {
        "accuracy": sum(accuracies) / 2,
        "gflops": sum(one.executed.mean().item() for one in done) / 2e9,
        "chosen": [
            {"members": [singles[i]["name"] for i in c.members], "thresholds": c.thresholds, "answer": c.answer}
            for c in chosen
        ],
        "accuracies": accuracies,
        "knows": known[0],
    }


def tables(found: dict[str, Any]) -> list[str]:
    """Markdown: the single networks, the cascades by budget, and by share of the FLOPs."""
    reference = next(row for row in found["networks"] if row["name"] == found["reference"])

    def compared(row: Row) -> str:
        faster = [reference["milliseconds"][size] / row["milliseconds"][size] for size in reference["milliseconds"]]
        ratios = " | ".join(f"{ratio:.1f}x" for ratio in (reference["gflops"] / row["gflops"], *faster))
        return f"{row['accuracy']:.2%} | {row['gflops']:.3f} | {ratios}"

    sizes = " | ".join(f"faster, batch {size}" for size in reference["milliseconds"])
    lines = [f"| network | accuracy | GFLOPs | fewer FLOPs | {sizes} | parameters |", "|---|---|---|---|---|---|---|"]
    lines += [f"| {row['name']} | {compared(row)} | {row['parameters']:,} |" for row in found["networks"]]
    lines += ["", f"| cascade: lost at most | accuracy | GFLOPs | fewer FLOPs | {sizes} | members |"]
    lines += ["|---|---|---|---|---|---|---|"]
    lines += [f"| {100 * row['drop']:.1f} | {compared(row)} | {members(row)} |" for row in found["budgets"]]
    lines += ["", f"| cascade: FLOPs at most | accuracy | GFLOPs | fewer FLOPs | {sizes} | members |"]
    lines += ["|---|---|---|---|---|---|---|"]
    lines += [f"| {row['share']:.1%} | {compared(row)} | {members(row)} |" for row in found["curve"]]
    return [*lines, ""]


def members(row: Row) -> str:
    """The members that were chosen on the two halves."""
    return "; ".join(dict.fromkeys(", ".join(one["members"]) for one in row["chosen"]))


def draw(found: dict[str, Any]) -> Figure:
    """Accuracy against executed GFLOPs on a log scale, with the published points."""
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axis = figure.subplots()
    best, reference = {}, next(row for row in found["networks"] if row["name"] == found["reference"])
    for row in found["networks"]:
        best.setdefault(row["function"], []).append(row)
    for function, rows in best.items():
        rows = sorted(rows, key=lambda row: row["gflops"])
        axis.plot(
            [row["gflops"] for row in rows], [100 * row["accuracy"] for row in rows], marker="o", markersize=4,
            linewidth=1, label=f"{function}, pruned statically", alpha=0.8,
        )  # fmt: skip
    curve = sorted(found["curve"], key=lambda row: row["gflops"])
    axis.plot(
        [row["gflops"] for row in curve], [100 * row["accuracy"] for row in curve], color="black", marker="D",
        markersize=4, label="cascades of these",
    )  # fmt: skip
    for name, points in PUBLISHED.items():
        for i, (accuracy, times, _) in enumerate(points):
            at = (reference["gflops"] / times, accuracy)
            axis.plot(*at, marker="x", color="#7f7f7f", linestyle="none", label="published" if name == "PPSM" else None)
            if i == 0:
                axis.annotate(name, at, LABELS.get(name, (4, -8)), textcoords="offset points", fontsize=6)
    axis.set_xscale("log")
    ticks = [0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.18, 0.25]
    axis.set_xticks(ticks, minor=False)
    axis.set_xticks([], minor=True)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set(
        xlabel="executed GFLOPs per image (log scale)",
        ylabel="accuracy on CIFAR-10's test images, %",
        xlim=(0.015, 0.3),
        ylim=(89, 95),
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="lower right")
    return figure


if __name__ == "__main__":
    run_command(main, goes_on=None)
