"""Every criterion on one trained network at equal FLOPs: accuracy before any fine-tuning and after the same short one.

Method: for each variant, share of FLOPs and seed the network is pruned to the share (at once, or in --steps geometric
steps with the batch norms measured again between them), judged as it is and with its batch norms measured again (where
the refit has not set them), fine-tuned without its switches with the same epochs, order, schedule and distillation,
and judged again. Torch-Pruning prunes at once, all layers that share channels together. Every accuracy in table and
picture is that of the validation images with every block run: defaults are chosen by it. The seed decides the
Fisher's images and labels, the random criterion and the order of fine-tuning. Finished measurements are kept in
OUT.jsonl, so a run that is started again with the same arguments continues.

Times are those of the exported network on one thread, the fastest of many runs; "per second" chooses among forms by
times that were measured layer by layer.

    python -m benchmarks.criteria --checkpoint best.pt --data_dir data/cifar_10 --out results/criteria
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from benchmarks.common import (
    Trained,
    add_trained_arguments,
    append_line,
    beside,
    load_trained,
    machine,
    milliseconds,
    read_lines,
)
from benchmarks.competitor import IMPORTANCES, Competitor, torch_pruned
from deploy.folding import without_switches
from models import ResNet, all_on
from pruning.compress import prune_once
from pruning.goals import Goal, part_of_the_way
from pruning.settings import CHANNEL_CRITERIA, Batches, Method
from training.distillation import distillation_loss_fn
from training.evaluate import evaluate
from training.forward import training_forward
from training.norms import placed, reestimate_batch_norms
from training.optimisers import rates_of_epoch, sgd
from training.supervised import Supervision, supervised_epoch
from utils.data.batches import TrainingBatches, plain_batches
from utils.data.images import Images
from utils.device import PRECISIONS, pick_precision
from utils.errors import UserError, run_command
from utils.flops import every_block, network_cost

# Channel criteria may only take what lies inside of blocks, so a share of 12 % needs nearly all of it.
BASE = Method(prune_ratio_limit=0.97, decomposition="truncate", objective="saliency", refit=False)
PER_FLOP = replace(BASE, objective="flops")
VARIANTS = {
    "eigendamage": BASE,
    "eigendamage per FLOP": PER_FLOP,
    "eigendamage, K-FAC": replace(BASE, correct_eigenvalues=False),
    **{
        f"{name}{', refitted' if refit else ''}": replace(PER_FLOP, decomposition=decomposition, refit=refit)
        for name, decomposition in (("Tucker", "tucker"), ("depthwise", "depthwise"), ("best forms", "best"))
        for refit in (False, True)
    },
    **{criterion: replace(BASE, criterion=criterion) for criterion in CHANNEL_CRITERIA},
    **{
        f"Torch-Pruning, {importance}{', global' if everywhere else ''}": Competitor(importance, everywhere)
        for importance in IMPORTANCES
        for everywhere in (False, True)
    },
    "Torch-Pruning, Hessian, global, rounded": Competitor("Hessian", everywhere=True, round_to=8),
    **{f"{name} per FLOP": replace(PER_FLOP, criterion=name) for name in ("kron_obs", "c_obs", "magnitude")},
}
# What a measurement depends on besides share, seed and variant.
SETTINGS = (
    "checkpoint",
    "steps",
    "epochs",
    "lr",
    "batch_size",
    "fisher_images",
    "train_images",
    "round_to",
    "distill",
    "precision",
)
MEASURES = ("before", "before, batch norms anew", "after")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Criteria at equal FLOPs.", allow_abbrev=False)
    add_trained_arguments(parser)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25, 0.12], help="of the FLOPs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help="iterations of measuring and pruning to the share")
    parser.add_argument("--epochs", type=int, default=5, help="of fine-tuning")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--fisher_images", type=int, default=4000)
    parser.add_argument("--train_images", type=int, help="training images of the fine-tuning, all by default")
    parser.add_argument("--round_to", type=int, default=1)
    parser.add_argument("--distill", type=float, default=0.5, help="weight of following the unpruned network")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="of fine-tuning")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--out", default="criteria", help="path of the results, without .jsonl, .json, .md and .png")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = beside(out, ".jsonl")
    trained = subset(load_trained(args), args.train_images)
    plan = [(share, seed, variant) for share in args.shares for seed in range(args.seeds) for variant in args.variants]
    earlier = read_lines(lines)
    settings = {key: getattr(args, key) for key in SETTINGS}
    other = next((m["settings"] for m in earlier if m["settings"] != settings), None)
    if other is not None:
        raise UserError(f"{lines} holds measurements with {other}, not {settings}: choose another --out")
    done = {(m["share"], m["seed"], m["variant"]) for m in earlier}
    for share, seed, variant in plan:
        if (share, seed, variant) not in done:
            measurement = {**measure(args, trained, share, seed, variant), "settings": settings}
            append_line(lines, measurement)
            print(json.dumps(measurement), flush=True)
    wanted = set(plan)
    measurements = [m for m in read_lines(lines) if (m["share"], m["seed"], m["variant"]) in wanted]
    rows = summarise(args, measurements)
    whole = trained.evaluated(trained.network(), trained.splits.val, all_on).accuracy
    content = {"machine": machine(), "settings": vars(args), "unpruned": whole, "rows": rows}
    beside(out, ".json").write_text(json.dumps(content, indent=2))
    beside(out, ".md").write_text(table(rows, whole))
    draw(beside(out, ".png"), args, rows, whole)
    print(table(rows, whole))


def subset(trained: Trained, count: int | None) -> Trained:
    """The same network with the first training images in a fixed order: fewer where the machine is slow."""
    train = trained.splits.train
    chosen = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:count]]
    return replace(trained, splits=replace(trained.splits, train=chosen))


def measure(args: argparse.Namespace, trained: Trained, share: float, seed: int, variant: str) -> dict:
    start = time.perf_counter()
    network, splits = trained.network().eval(), trained.splits
    order = torch.Generator().manual_seed(seed)
    draws = torch.Generator(trained.device).manual_seed(seed)
    fisher = splits.train[torch.randperm(len(splits.train), generator=order)[: args.fisher_images]]
    whole = network_cost(network, trained.image_size)

    def batches():
        return plain_batches(fisher, args.batch_size, trained.normalisation)

    method, rise = VARIANTS[variant], None
    if isinstance(method, Competitor):
        smaller = torch_pruned(network, method, share * whole.flops, trained.image_size, list(batches()))
    else:
        smaller, rise = pruned_in_steps(args, trained, network, share * whole.flops, method, batches, draws)
        smaller = without_switches(smaller)
    cost = network_cost(smaller, trained.image_size)

    def judged(images: Images = splits.val) -> float:
        return evaluate(smaller, images, trained.normalisation, cost, all_on).accuracy

    accuracies = [judged()]
    if isinstance(method, Competitor) or not method.refit:  # which leaves norms as they are to be
        reestimate_batch_norms(smaller, batches(), all_on)
    accuracies.append(judged())
    fine_tune(args, trained, smaller, order, draws)
    accuracies.append(judged())
    return {
        "share": share,
        "seed": seed,
        "variant": variant,
        "flops": cost.flops / whole.flops,
        "parameters": cost.parameters / whole.parameters,
        "predicted_rise": rise,
        **dict(zip(MEASURES, accuracies, strict=True)),
        "test": judged(splits.test),  # after fine-tuning; nothing is chosen by it
        "milliseconds": milliseconds(trained, smaller),
        "seconds": time.perf_counter() - start,
    }


def pruned_in_steps(
    args: argparse.Namespace,
    trained: Trained,
    network: ResNet,
    flops: float,
    method: Method,
    batches: Batches,
    draws: torch.Generator,
) -> tuple[ResNet, float]:
    """The network brought to ``flops``, and the rise of the loss that was predicted for all steps."""
    method, rise = replace(method, round_to=args.round_to), 0.0
    for left in range(args.steps, 0, -1):
        if left < args.steps and not method.refit:
            reestimate_batch_norms(network, batches(), all_on)
        cost = network_cost(network, trained.image_size)
        goal = Goal(flops=part_of_the_way(cost.flops, flops, left))
        passes = method.passes(batches, draws, every_block)
        pruned = prune_once(network, passes, cost=cost, goal=goal, method=method)
        network = placed(pruned.network, trained.device)
        rise += pruned.predicted_rise
    return network, rise


def fine_tune(args: argparse.Namespace, trained: Trained, network, order, draws) -> None:
    optimiser = sgd(network, args.lr, momentum=0.9, weight_decay=5e-4)
    flip = trained.checkpoint.data["flip"]
    batches = TrainingBatches(trained.splits.train, args.batch_size, order, trained.normalisation, flip)
    precision = pick_precision(args.precision, trained.device)
    teacher = None
    if args.distill:
        teacher = distillation_loss_fn(without_switches(trained.network().eval()), args.distill, precision)
    training = Supervision(
        network=network, optimiser=optimiser, draws=draws, loss_fn=teacher, forward=training_forward(network, precision)
    )
    for epoch in range(1, args.epochs + 1):
        rate = rates_of_epoch(epoch, args.epochs, args.lr, schedule="cosine")
        supervised_epoch(training, batches, rate, f"epoch {epoch}/{args.epochs}")


def summarise(args: argparse.Namespace, measurements: list[dict]) -> list[dict]:
    """Mean and deviation over seeds of each variant and share."""
    rows = []
    for share in args.shares:
        for variant in args.variants:
            found = [m for m in measurements if (m["share"], m["variant"]) == (share, variant)]
            row = {"share": share, "variant": variant, "seeds": len(found)}
            for key in ("flops", "parameters", *MEASURES):
                values = [m[key] for m in found]
                deviation = statistics.stdev(values) if len(values) > 1 else 0.0
                row[key] = {"mean": statistics.mean(values), "deviation": deviation}
            rows.append(row)
    return rows


def table(rows: list[dict], whole: float) -> str:
    def cell(value: dict) -> str:
        return f"{100 * value['mean']:.2f} ± {100 * value['deviation']:.2f}"

    lines = [
        f"Validation accuracy in %, mean ± deviation over seeds; unpruned {100 * whole:.2f}.",
        "",
        "| FLOPs | criterion | parameters | before fine-tuning | with batch norms measured again | after fine-tuning |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = " | ".join(cell(row[name]) for name in MEASURES)
        share, parameters = 100 * row["flops"]["mean"], 100 * row["parameters"]["mean"]
        lines.append(f"| {share:.1f} % | {row['variant']} | {parameters:.1f} % | {cells} |")
    return "\n".join(lines) + "\n"


def marker(variant: Method | Competitor) -> str:
    if isinstance(variant, Competitor):
        return "^"
    return "o" if variant.criterion == "eigendamage" else "s"


def draw(path: Path, args: argparse.Namespace, rows: list[dict], whole: float) -> None:
    figure, axes = plt.subplots(1, len(MEASURES), sharey=True, figsize=(14, 4.6), layout="constrained")
    colours = matplotlib.colormaps["tab20"]
    for axis, name in zip(axes, MEASURES, strict=True):
        for i, variant in enumerate(args.variants):
            own = [row for row in rows if row["variant"] == variant]
            axis.errorbar(
                [100 * row["flops"]["mean"] for row in own],
                [100 * row[name]["mean"] for row in own],
                [100 * row[name]["deviation"] for row in own],
                marker=marker(VARIANTS[variant]),
                color=colours(i % 20),
                capsize=3,
                label=variant,
            )
        axis.axhline(100 * whole, color="0.5", linestyle=":", linewidth=1)
        axis.set_title(f"{name} fine-tuning" if "," not in name else name, fontsize=10)
        axis.set_xlabel("FLOPs, % of the unpruned network")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation accuracy, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    run_command(main, goes_on="the same command")
