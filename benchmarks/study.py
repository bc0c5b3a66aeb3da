"""The study: networks that the stages left, alone and in cascades, accuracy against executed FLOPs and against time.

Members and thresholds of cascades are chosen on the validation images and measured on the test images.  Networks that
others trained have seen all training images: for them the choice is made on one half of the test images and measured
on the other, and the reverse, and the mean counts.  Single networks choose nothing: all test images.

    python -m benchmarks.study RESULT_DIR... --data_dir DATA --out FOLDER
    python -m benchmarks.study --out FOLDER      # tables and picture again, from the record in FOLDER
    python -m benchmarks.study --seeds FOLDER... --out FOLDER      # how far the records of several seeds agree

Takes the newest network of stage 1 below each RESULT_DIR, every iteration of stage 2 and the network of stage 3; with
several functions in --network, those of each.  Writes ``study.json``, ``study.md`` and pictures to FOLDER.
"""

import argparse
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from torch import Tensor

from benchmarks.common import machine
from benchmarks.inference import by_batch
from deploy.exported import exported_model
from deploy.session import ExportedNetwork
from gating.cascade_report import draw_answered, hardness_by_answer, what_is_known
from gating.cascade_search import Candidate, Predictions, best_under, candidates, outcome
from gating.pictures import draw_easy_and_hard
from models import Cascade, Member, allow, is_own
from training.evaluate import Evaluator
from training.norms import placed
from utils.data.batches import Splits, split_as_before
from utils.data.folder import load_data
from utils.data.images import Images, evenly_spaced
from utils.device import pick_device
from utils.errors import UserError, run_command
from utils.files import write_json
from utils.runs.checkpoint import load_checkpoint
from utils.runs.run import stage_folder
from utils.settings import image_type, number

SHARES = (1.0, 0.8, 0.65, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.125, 0.1, 0.083)  # of its FLOPs, the curve of the picture
DRAWN = 0.25  # share of the FLOPs of the cascade whose decisions are drawn
TIMED_IMAGES, TIMED_SECONDS = 256, 60.0  # seconds for each batch size
CASCADES = {
    "curve": "cascade: FLOPs at most",
    "one_family": "cascade of one network and its pruned versions: FLOPs at most",
}
YARDSTICK = "resnet56"
# Published for this network on CIFAR-10: accuracy, times fewer FLOPs, accuracy before.
PUBLISHED = {
    "DepGraph": ((93.77, 2.13, 93.53), (93.64, 2.57, 93.53)),
    "PPSM": ((93.22, 4.1, 93.44),),
    "CHIP": ((92.43, 3.9, 93.26),),
    "TPP": ((92.35, 3.6, 93.78), (89.63, 11.4, 93.78)),
    "L1, 120 epochs": ((93.74, 2.0, 93.78),),
}

TICKS = [0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.18, 0.25, 0.4, 0.6, 1, 1.5, 2, 3]  # GFLOPs or milliseconds
STYLES = [("#0072b2", "o"), ("#e69f00", "s"), ("#009e73", "^"), ("#d55e00", "v")]  # of families: colour and marker
# Places beside the points, by their fewer FLOPs; of two points with one label between them the second has none.
LABELS = {2.13: (-14, -10), 2.57: None, 2.0: (6, -2), 3.9: (-22, -3)}

OF_ALL = "cascades of all"

Row = dict[str, Any]


@dataclass(frozen=True)
class Round:
    """Images that choices look at, and images that these are measured on."""

    chosen_on: list[Predictions]  # of every network
    chosen_labels: Tensor
    measured_on: list[Predictions]
    measured: Tensor  # indices of these test images
    measured_labels: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure networks alone and in cascades.", allow_abbrev=False)
    add = parser.add_argument
    add("results", type=Path, nargs="*", help="folders that the stages wrote to, all below the first")
    add("--data_dir", help="data folder")
    add("--img_type", type=image_type, default="png", help="image files to read")
    add("--network", nargs="+", default=["resnet"], help="resnet, or functions that build networks of your own")
    add("--depth", type=number(int, 8), nargs="+", default=[32], help="depths of resnet")
    add("--resize", type=number(int, 8), default=32, help="size of the images")
    add("--seeds", type=Path, nargs="+", help="folders of the records of several seeds, to be compared")
    add("--out", type=Path, required=True, help="folder of the record")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    record = args.out / "study.json"
    if args.seeds:
        lacking = [folder for folder in args.seeds if not (folder / "study.json").exists()]
        if lacking or len(args.seeds) < 2:
            raise UserError(
                f"--seeds takes two folders with a study.json or more: {[*map(str, lacking or args.seeds)]}"
            )
        found = [json.loads((folder / "study.json").read_text()) for folder in args.seeds]
        write_json(args.out / "seeds.json", [accuracies(one) for one in found])
        print("\n".join(seeds_table([accuracies(one) for one in found])))
        return
    if not record.exists() and not args.results:
        raise UserError(f"{record} does not exist: give RESULT_DIR and --data_dir to make it")
    if args.results and not args.data_dir:
        raise UserError("RESULT_DIR is measured on images, and none were given: add --data_dir")
    if args.results:
        for source in filter(is_own, args.network):
            allow(source)
        data = load_data(args.data_dir, args.img_type, args.resize, workers=2)
        kinds = [(source, 0) for source in args.network if is_own(source)] or product(["resnet"], args.depth)
        paths = [*chain.from_iterable(networks(args.results, data.name, *kind) for kind in kinds)]
        if len(paths) < 2:
            raise UserError(f"{args.results[0]} holds {len(paths)} networks of {args.network}: run main_prune.py first")
        splits, root = split_as_before(data, load_checkpoint(paths[0]).data).to(pick_device()), args.results[0]
        found, pictures = measured(root, paths, splits, data.classes)
        write_json(record, with_times(found, root, splits.test))
        for name, figure in pictures:
            figure.savefig(args.out / f"{name}.png", dpi=110)
    found = json.loads(record.read_text())
    text = "\n".join(tables(found))
    (args.out / "study.md").write_text(text)
    draw(found).savefig(args.out / "study.png", dpi=120)
    print(text)


def networks(folders: Sequence[Path], data: str, source: str, depth: int) -> list[Path]:
    """The newest network of stage 1, the iterations of the newest run of stage 2, the newest network of stage 3."""
    found = []
    kinds = (("sp", "best.pt"), ("pruned", "iteration_*.pt"), ("rl_pruned", "best.pt"))
    for results, (stage, name) in product(folders, kinds):
        paths = sorted(stage_folder(results, stage, data, source, depth).glob(f"*/{name}"))
        found += [path for path in paths if path.parent == paths[-1].parent]
    return found


def measured(
    results: Path, paths: Sequence[Path], splits: Splits, classes: Sequence[str]
) -> tuple[dict[str, Any], list[tuple[str, Figure]]]:
    """The record: single networks, cascades by share of the FLOPs, what their decisions know; pictures of one."""
    singles, on_test, on_val = [], [], []
    for path in paths:
        row, predictions = predictions_of(path, splits.test)
        twins = sum(other["name"].partition(" (")[0] == row["name"] for other in singles)
        row["name"] += f" ({twins + 1})" * (twins > 0)  # of another run with the same share
        singles.append({**row, "path": str(path.relative_to(results))})
        on_test.append(predictions)
        if not splits.val_is_test:
            own, predictions = predictions_of(path, splits.val)
            singles[-1]["validation"] = own["accuracy"]
            on_val.append(predictions)
        print(f"{row['name']}: {row['accuracy']:.2%} at {row['gflops']:.4g} GFLOPs", flush=True)
    labels = splits.test.labels.cpu()
    rounds = [Round(on_val, splits.val.labels.cpu(), on_test, torch.arange(len(labels)), labels)]
    if splits.val_is_test:
        rounds = halves(on_test, labels)
    reference = max(range(len(singles)), key=lambda i: (singles[i]["given"], singles[i]["accuracy"]))
    whole = singles[reference]["gflops"] * 1e9

    def searched(among: Collection[int]) -> list[list[Candidate]]:
        return [candidates(one.chosen_on, one.chosen_labels, among=among) for one in rounds]

    def curve(searched: list[list[Candidate]]) -> list[Row]:
        chosen = ((share, [best_under(found, share * whole) for found in searched]) for share in SHARES)
        return [{"share": share, **row} for share, one in chosen if (row := mean_of(one, rounds, singles))]

    relatives = {i for i, row in enumerate(singles) if row["family"] == singles[reference]["family"]}
    of_all = searched(range(len(singles)))
    record = {
        "reference": singles[reference]["name"],
        "networks": singles,
        "curve": curve(of_all),
        "one_family": curve(searched(relatives)) if len(relatives) < len(singles) else [],
    }
    return record, pictures_of(best_under(of_all[0], DRAWN * whole), rounds[0], splits.test, classes)


def pictures_of(
    candidate: Candidate | None, one_round: Round, test: Images, classes: Sequence[str]
) -> list[tuple[str, Figure]]:
    """Which classes, and which of their images, a cascade hands on; nothing of a network alone."""
    if candidate is None or len(candidate.members) == 1:
        return []
    done = outcome(one_round.measured_on, candidate, one_round.measured_labels)
    hardness = hardness_by_answer(done, one_round.measured_on[candidate.members[0]])
    return [
        ("answered_by_class", draw_answered(done, one_round.measured_labels, classes)),
        *draw_easy_and_hard(test[one_round.measured], hardness, classes),
    ]


def with_times(found: dict[str, Any], results: Path, test: Images) -> dict[str, Any]:
    """The record with milliseconds per image on one thread; of cascades, the mean over what was chosen."""
    checkpoints = {row["name"]: load_checkpoint(results / row["path"]) for row in found["networks"]}
    timed: dict[str, Any] = {name: checkpoint.network() for name, checkpoint in checkpoints.items()}
    cascades = [row for kind in CASCADES for row in found[kind]]
    for one in (one for row in cascades for one in row["chosen"]):
        own = [(timed[name], checkpoints[name].normaliser()) for name in one["members"]]
        chosen = [Member(network, list(norm.mean), list(norm.std)) for network, norm in own]
        if len(own) > 1:
            timed.setdefault(label_of(one), Cascade(chosen, tuple(one["thresholds"]), one["answer"]))
    reference = checkpoints[found["reference"]]
    exported = {
        name: ExportedNetwork(
            exported_model(network.eval(), reference.normaliser(), reference.data["image_size"]), threads=1
        )
        for name, network in timed.items()
    }
    taken = by_batch(exported, test[evenly_spaced(len(test), TIMED_IMAGES)].pixels, TIMED_SECONDS)
    for row in found["networks"]:
        row["milliseconds"] = taken[row["name"]]
    for row in cascades:
        own = [taken[label_of(one)] for one in row["chosen"]]
        row["milliseconds"] = {size: mean(one[size] for one in own) for size in own[0]}
    return {**found, "machine": machine()}


def label_of(chosen: Row) -> str:
    """A name for a choice; a network alone keeps its own."""
    return chosen["members"][0] if len(chosen["members"]) == 1 else json.dumps(chosen)


def predictions_of(path: Path, images: Images) -> tuple[Row, Predictions]:
    """A network's row, and what it answers for the images."""
    checkpoint = load_checkpoint(path)
    network = placed(checkpoint.network(), images.device)
    found = Evaluator(images, checkpoint.normaliser(), checkpoint.data["image_size"])(network)
    architecture = checkpoint.architecture
    family = architecture["network"].rpartition(":")[2] + str(architecture.get("depth", ""))
    share = found.flops_executed / checkpoint.original["flops"]
    switched = " with switches" if checkpoint.stage == "rl_pruned" else ""
    row = {
        "name": family if checkpoint.stage == "sp" else f"{family}{switched} at {share:.0%}",
        "family": family + switched,
        "given": checkpoint.stage == "sp",
        "accuracy": found.accuracy,
        "gflops": found.flops_executed / 1e9,
        "share": share,
        "parameters": sum(p.numel() for p in network.parameters()),
    }
    return row, Predictions(found.logits.softmax(dim=1), found.executed)


def halves(predictions: Sequence[Predictions], labels: Tensor) -> list[Round]:
    """Each of two halves, drawn once and for all, chooses for the other."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    one, other = order[: len(labels) // 2], order[len(labels) // 2 :]
    return [
        Round([part(p, a) for p in predictions], labels[a], [part(p, b) for p in predictions], b, labels[b])
        for a, b in ((one, other), (other, one))
    ]


def part(predictions: Predictions, images: Tensor) -> Predictions:
    """Of some of the images."""
    return Predictions(predictions.probabilities[images], predictions.executed[images])


def mean_of(chosen: Sequence[Candidate | None], rounds: Sequence[Round], singles: Sequence[Row]) -> Row | None:
    """Means over the rounds of what was chosen in each; None where a round has no candidate."""
    if None in chosen:
        return None
    done = [outcome(r.measured_on, c, r.measured_labels) for c, r in zip(chosen, rounds, strict=True)]
    accuracies = [one.correct.double().mean().item() for one in done]
    first, candidate = rounds[0], chosen[0]
    return {
        "accuracy": sum(accuracies) / len(rounds),
        "accuracy_where_chosen": mean(candidate.accuracy for candidate in chosen),
        "gflops": sum(one.executed.mean().item() for one in done) / len(rounds) / 1e9,
        "chosen": [
            {"members": [singles[i]["name"] for i in c.members], "thresholds": c.thresholds, "answer": c.answer}
            for c in chosen
        ],
        "accuracies": accuracies,
        "knows": what_is_known(done[0], [first.measured_on[i] for i in candidate.members], first.measured_labels),
    }


def tables(found: dict[str, Any]) -> list[str]:
    """Markdown: the single networks, and the cascades by share of the FLOPs."""
    sizes = reference_of(found)["milliseconds"]
    columns = " | ".join(["GFLOPs", "fewer FLOPs", *(f"speed-up, batch {size}" for size in sizes)])
    lines = []
    for kind, first in {"networks": "network", **CASCADES}.items():
        if not found[kind]:
            continue
        shown, last = "accuracy", "parameters"
        if kind in CASCADES:
            shown, last = "accuracy | where chosen", "members, answer"
        header = f"| {first} | {shown} | {columns} | {last} |"
        lines += [header, "|---" * (header.count("|") - 1) + "|", *rows(found, kind), ""]
    return lines


def rows(found: dict[str, Any], kind: str) -> list[str]:
    """The rows of one of the tables."""
    reference, lines = reference_of(found), []
    for row, following in zip(found[kind], [*found[kind][1:], {}], strict=True):
        if kind in CASCADES and row["chosen"] == following.get("chosen"):
            continue  # fewer FLOPs are enough for the same cascade
        faster = [reference["milliseconds"][size] / taken for size, taken in row["milliseconds"].items()]
        ratios = " | ".join(f"{ratio:.1f}x" for ratio in (reference["gflops"] / row["gflops"], *faster))
        shown = f"{row['accuracy']:.2%}"
        if kind == "networks":
            first, last = row["name"], f"{row['parameters']:,}"
        else:
            first, last = f"{row['share']:.1%}", members(row)
            shown += f" | {row['accuracy_where_chosen']:.2%}"
        lines.append(f"| {first} | {shown} | {row['gflops']:.3f} | {ratios} | {last} |")
    return lines


def accuracies(found: dict[str, Any]) -> dict[str, float]:
    """The accuracy of every network that was pruned, and of the cascade for each share of the FLOPs."""
    pruned = {row["name"]: row["accuracy"] for row in found["networks"] if not row["given"]}
    return pruned | {f"cascade, {row['share']:.1%} of the FLOPs": row["accuracy"] for row in found["curve"]}


def seeds_table(found: Sequence[dict[str, float]]) -> list[str]:
    """Markdown: what every seed has, by seed, and the mean with the standard deviation of one seed."""
    header = f"| network | {' | '.join(f'seed {seed}' for seed in range(len(found)))} | mean |"
    lines = [header, "|---" * (header.count("|") - 1) + "|"]
    for name in (name for name in found[0] if all(name in one for one in found)):
        own = [one[name] for one in found]
        cells = " | ".join(f"{accuracy:.2%}" for accuracy in own)
        lines.append(f"| {name} | {cells} | {100 * mean(own):.2f} ± {100 * stdev(own):.2f}% |")
    return lines


def reference_of(found: dict[str, Any]) -> Row:
    """The network that all others are compared with."""
    return next(row for row in found["networks"] if row["name"] == found["reference"])


def members(row: Row) -> str:
    """The members that were chosen on the two halves, and whether the last one answers or the mean."""
    chosen = (", ".join(one["members"]) + f" ({one['answer']})" * (len(one["members"]) > 1) for one in row["chosen"])
    return "; ".join(dict.fromkeys(chosen))


def draw(found: dict[str, Any]) -> Figure:
    """Accuracy against executed GFLOPs, with the published points, and against the time of one image."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    by_flops, by_time = figure.subplots(1, 2, sharey=True)
    draw_panel(by_flops, found, lambda row: row["gflops"], line="-")
    draw_panel(by_time, found, lambda row: row["milliseconds"]["1"], line="none")  # not in the order of the FLOPs
    reference = reference_of(found)
    for name, points in PUBLISHED.items() if found["reference"] == YARDSTICK else ():
        for accuracy, times, _ in points:
            at = (reference["gflops"] / times, accuracy)
            by_flops.plot(*at, marker="x", color="#7f7f7f", linestyle="none")
            if place := LABELS.get(times, (5, -9)):
                by_flops.annotate(name, at, place, textcoords="offset points", fontsize=7)
    shown = [100 * row["accuracy"] for row in [*found["networks"], *found["curve"]]]
    by_flops.set(
        xlabel="executed GFLOPs per image (log scale)",
        ylabel="accuracy on the test images, %",
        ylim=(min(shown) - 0.4, max(shown) + 0.6),
    )
    by_time.set(xlabel="milliseconds for one image, ONNX Runtime, one CPU thread (log scale)")
    label_curves(by_flops)
    by_time.legend(fontsize=8, loc="lower right")
    return figure


def label_curves(axis: Axes) -> None:
    """Names at the curves: of networks at the expensive end, of cascades at the cheap one, where they lie alone."""
    for line in axis.lines:
        name, (x, y) = line.get_label(), line.get_xydata()[-1]
        place = {"xytext": (6, -3)}
        if name.startswith("_"):  # no name of ours
            continue
        if name.startswith("cascades"):
            x, y = line.get_xydata()[0]
            place = {"xytext": (-7, -3), "ha": "right"} if name == OF_ALL else {"xytext": (7, -12)}
        axis.annotate(name, (x, y), textcoords="offset points", fontsize=8, color=line.get_color(), **place)
    low, high = axis.get_xlim()
    axis.set_xlim(0.7 * low, 1.4 * high)


def draw_panel(axis: Axes, found: dict[str, Any], cost: Callable[[Row], float], line: str) -> None:
    """Accuracy against a cost: a series for each family of networks, and for the cascades."""
    series: dict[str, list[Row]] = {}
    for row in found["networks"]:
        series.setdefault(row["family"], []).append(row)
    styles = [*STYLES[: len(series)], ("black", "D"), ("#888888", "d")]
    series[OF_ALL] = found["curve"]
    if found["one_family"]:
        series[f"cascades of {found['reference']}\nand its pruned versions"] = found["one_family"]
    for (label, rows), (colour, marker) in zip(series.items(), styles, strict=False):
        rows = sorted(rows, key=lambda row: row["gflops"])
        style = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1, "linestyle": line, "label": label}
        axis.plot([cost(row) for row in rows], [100 * row["accuracy"] for row in rows], **style)
    costs = [cost(row) for rows in series.values() for row in rows]
    axis.set_xscale("log")
    axis.set_xticks(TICKS, minor=False)
    axis.set_xticks([], minor=True)
    axis.set_xlim(0.8 * min(costs), 1.2 * max(costs))  # the ticks would widen it
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.grid(alpha=0.3)


if __name__ == "__main__":
    run_command(main, goes_on=None)
