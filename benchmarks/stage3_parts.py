"""What earns its place in stage 3: the published recipe, each addition to it alone, all of them, and all but each.

Published (SkipNet, arXiv:1711.09485): all images draw their decisions, norms follow the drawn paths, alpha is fixed,
returns are compared with nothing, one SGD trains network and gates at one rate, no teacher, logits as stage 1 left
them, judged at the threshold of one half.  Where alpha is fixed it is --alpha, where it is steered it starts there.

Method: every variant and seed trains the same statically pruned network on the same images.  Its budget is the
validation accuracy of that network less --max_accuracy_drop.  Runs end at different accuracies and computations, so
each is judged twice, on test images that chose nothing:

* as it is: the epoch that validation chooses, the cheapest within the budget, at the operating point where the variant
  has one;
* alike: the last epoch's network at the lowest computation within the budget that one number added to all its logits
  reaches on the validation images, whatever the variant.

The network that all start from is a candidate in both, so a run that ends outside of the budget saves nothing.
Finished runs are kept in OUT.jsonl, so a benchmark that is started again with the same arguments goes on.

    python -m benchmarks.stage3_parts --checkpoint PRUNED/best.pt --data_dir data/cifar_10 --out results/stage3_parts
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import Trained, add_trained_arguments, append_line, beside, load_trained, machine, read_lines
from benchmarks.criteria import subset
from gating.operating_point import NEAR, find_operating_point, gate_biases_restored
from gating.reinforce import Reinforcement, closing_epoch, reinforce_epoch
from gating.steering import Budget, Steering
from gating.temperature import rescale_gate_logits
from main_rl_prune import RESCALING_IMAGES, Settings, reestimate
from models import ResNet
from training.distillation import distillation_loss_fn
from training.evaluate import Evaluation, check_finite, evaluate
from training.forward import training_forward
from training.optimisers import rates_of_epoch, reinforcement_optimisers, sgd
from utils.data.batches import TrainingBatches
from utils.data.images import evenly_spaced
from utils.device import PRECISIONS, Randomness, pick_precision
from utils.errors import UserError, run_command
from utils.flops import NetworkCost, network_cost


@dataclass(frozen=True)
class Recipe:
    """How stage 3 trains and is judged; as published by default."""

    all_explore: bool = True
    batch_norm: str = "follow"
    baseline: str = "none"
    steered: bool = False
    operating_point: bool = False
    rescaled: bool = False  # the gates' logits, at the start
    gates_adam: bool = False  # with a rate of their own
    distill: float = 0.0
    closing: float = 0.0  # share of the epochs, the last ones, in which the switches stay as they are


PUBLISHED = Recipe()
PARTS = {
    "half of the images explore": {"all_explore": False},
    "norms frozen": {"batch_norm": "frozen"},
    "greedy baseline": {"baseline": "greedy"},
    "steered alpha": {"steered": True},
    "operating point": {"operating_point": True},
    "softened gates": {"rescaled": True},
    "gates' own Adam": {"gates_adam": True},
    "distillation": {"distill": Settings.distill},
    "closing epochs": {"closing": Settings.closing},
}
REESTIMATED = {"batch_norm": "reestimate"}  # instead of frozen
ALL = Recipe(**{name: value for part in PARTS.values() for name, value in part.items()})


def without(part: dict) -> Recipe:
    """All additions but one."""
    return replace(ALL, **{name: getattr(PUBLISHED, name) for name in part})


VARIANTS = {
    "published": PUBLISHED,
    "all": ALL,
    **{f"published + {name}": replace(PUBLISHED, **part) for name, part in PARTS.items()},
    "published + norms re-estimated": replace(PUBLISHED, **REESTIMATED),
    **{f"all without {name}": without(part) for name, part in PARTS.items()},
    "all, norms re-estimated": replace(ALL, **REESTIMATED),
}
# What each part adds: on top of the published recipe, and to all the others; pairs of variants with and without it.
COMPARED = {
    **{name: (("published + " + name, "published"), ("all", "all without " + name)) for name in PARTS},
    "norms re-estimated": (
        ("published + norms re-estimated", "published"),
        ("all, norms re-estimated", "all without norms frozen"),
    ),
}
# What a run depends on besides seed and variant.
SETTINGS = ("checkpoint", "epochs", "lr", "bs", "alpha", "max_accuracy_drop", "train_images", "precision")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What earns its place in stage 3.", allow_abbrev=False)
    add_trained_arguments(parser, "best.pt of stage 2")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--lr", type=float, default=Settings.lr, help="of the network, and of its gates without Adam")
    parser.add_argument("--bs", type=int, default=Settings.bs)
    parser.add_argument("--alpha", type=float, default=Settings.alpha, help="where it is fixed; where steering starts")
    parser.add_argument("--max_accuracy_drop", type=float, default=0.01, help="against the network it starts from")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train_images", type=int, help="training images, all by default")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="of training")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--out", default="stage3_parts", help="path of the results, without .jsonl, .json and .md")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    lines = beside(Path(args.out), ".jsonl")
    lines.parent.mkdir(parents=True, exist_ok=True)
    earlier, settings = read_lines(lines), {key: getattr(args, key) for key in SETTINGS}
    other = next((run["settings"] for run in earlier if run["settings"] != settings), None)
    if other is not None:
        raise UserError(f"{lines} holds runs with {other}, not {settings}: choose another --out")
    trained = subset(load_trained(args), args.train_images)
    precision, network = pick_precision(args.precision, trained.device), trained.network()
    cost = network_cost(network, trained.image_size)
    start = Start(
        evaluate(network, trained.splits.val, trained.normalisation, cost, precision=precision),
        trained.evaluated(network, trained.splits.test),
    )
    done = {(run["seed"], run["variant"]) for run in earlier}
    plan = [(seed, variant) for seed in range(args.seeds) for variant in args.variants]
    for seed, variant in plan:
        if (seed, variant) not in done:
            run = {
                "variant": variant,
                "seed": seed,
                **measure(args, trained, start, VARIANTS[variant], seed, precision),
            }
            append_line(lines, {**run, "settings": settings})
            print(json.dumps(run), flush=True)
    found = {(run["seed"], run["variant"]): run for run in read_lines(lines)}
    runs = {variant: [found[seed, variant] for seed in range(args.seeds)] for variant in args.variants}
    content = {
        "machine": machine(),
        "settings": vars(args),
        "start": {"validation": start.val.metrics, "test": start.test.metrics},
        "rows": {variant: summary(of_variant) for variant, of_variant in runs.items()},
        "parts": compared(runs),
    }
    beside(Path(args.out), ".json").write_text(json.dumps(content, indent=2))
    beside(Path(args.out), ".md").write_text(table(content))
    print(table(content))


@dataclass(frozen=True)
class Start:
    """The network that all variants start from."""

    val: Evaluation
    test: Evaluation


@dataclass
class Candidate:
    """The best network of a run so far."""

    epoch: int
    val: Evaluation
    weights: dict[str, Tensor]


def measure(
    args: argparse.Namespace, trained: Trained, start: Start, recipe: Recipe, seed: int, precision: torch.dtype
) -> dict:
    """One run, judged as it is and alike."""
    began = time.perf_counter()
    network = trained.network()
    cost = network_cost(network, trained.image_size)
    budget = Budget(start.val.accuracy - args.max_accuracy_drop, drop=args.max_accuracy_drop)
    best, epochs = train(args, trained, network, start.val, recipe, budget, cost, seed, precision)
    last = within_budget(trained, network, budget, cost, precision)
    kept = budget.met(**last.metrics)
    alike = judged(trained, network if kept else None, start)
    network.load_state_dict(best.weights)
    return {
        "as it is": {"epoch": best.epoch, **judged(trained, network if best.epoch else None, start)},
        "alike": {"within_budget": kept, **alike},
        "epochs": epochs,
        "seconds": time.perf_counter() - began,
    }


def train(
    args: argparse.Namespace,
    trained: Trained,
    network: ResNet,
    start: Evaluation,
    recipe: Recipe,
    budget: Budget,
    cost: NetworkCost,
    seed: int,
    precision: torch.dtype,
) -> tuple[Candidate, list[dict]]:
    """Train ``network`` in place; the best epoch, and what validation said of each."""
    splits, normalisation, randomness = trained.splits, trained.normalisation, Randomness(seed, trained.device)
    flip = trained.checkpoint.data["flip"]
    batches = TrainingBatches(splits.train, args.bs, randomness.data, normalisation, flip)
    setup = reinforcement(recipe, trained, network, cost, randomness, precision)
    if recipe.rescaled:
        rescale_gate_logits(
            network, normalisation.apply(splits.train[evenly_spaced(len(splits.train), RESCALING_IMAGES)].pixels)
        )
    steering = Steering(
        budget, cost, alpha=args.alpha, epochs=args.epochs, steps=len(batches), device=trained.device,
        fixed=not recipe.steered,
    )  # fmt: skip
    steering.begin(**start.metrics)
    best, epochs = Candidate(0, start, copied(network)), []
    for epoch in range(1, args.epochs + 1):
        title, alpha = f"epoch {epoch}/{args.epochs}", steering.controller()
        first_closing = args.epochs - round(recipe.closing * args.epochs) + 1
        if epoch == first_closing:
            stand_on(network, best, setup)
        if epoch >= first_closing:
            closing_epoch(setup, batches, rates(args, recipe, epoch)[0], title)
        else:
            reinforce_epoch(setup, batches, rates(args, recipe, epoch), alpha, title)
        if recipe.batch_norm == "reestimate":
            reestimate(network, batches)
        at_half = found = evaluate(network, splits.val, normalisation, cost, precision=precision)
        check_finite(network, at_half, title)
        steering.observe(alpha, at_half.computation)
        with nullcontext() if epoch >= first_closing else gate_biases_restored(network):
            if recipe.operating_point:
                found = find_operating_point(network, splits.val, normalisation, budget, cost, at_half, precision)
            if budget.score(**found.metrics) > budget.score(**best.val.metrics):
                best = Candidate(epoch, found, copied(network))
                steering.remember(found.computation)
        epochs.append({**found.metrics, "alpha": steering.now.alpha})
        stands_at = found.metrics
        if recipe.steered and budget.lost(found.accuracy):
            stands_at = go_back(network, best, setup, steering)
        steering.plan(epoch + 1, **stands_at)
    return best, epochs


def reinforcement(
    recipe: Recipe, trained: Trained, network: ResNet, cost: NetworkCost, randomness: Randomness, precision: torch.dtype
) -> Reinforcement:
    momentum, weight_decay = Settings.momentum, Settings.weight_decay
    teacher = trained.network().eval()
    return Reinforcement(
        network=network,
        optimisers=reinforcement_optimisers(network, momentum, weight_decay)
        if recipe.gates_adam
        else (sgd(network, 0.0, momentum, weight_decay),),
        shares=cost.shares,
        draws=randomness.draws,
        all_explore=recipe.all_explore,
        gamma=Settings.gamma,
        rl_weight=Settings.rl_weight,
        baseline=recipe.baseline,
        batch_norm=recipe.batch_norm,
        loss_fn=distillation_loss_fn(teacher, recipe.distill, precision) if recipe.distill else None,
        forward=training_forward(network, precision),
    )


def rates(args: argparse.Namespace, recipe: Recipe, epoch: int) -> list[Callable[[float], float]]:
    """Learning rates of an epoch, one an optimiser."""
    bases = (args.lr, Settings.gate_lr) if recipe.gates_adam else (args.lr,)
    return [rates_of_epoch(epoch, args.epochs, base, schedule=Settings.schedule) for base in bases]


def copied(network: ResNet) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in network.state_dict().items()}


def go_back(network: ResNet, best: Candidate, setup: Reinforcement, steering: Steering) -> dict[str, float]:
    """After a collapse, part of steering: train on from the best network; its accuracy and computation."""
    stand_on(network, best, setup)
    steering.go_back()
    return best.val.metrics


def stand_on(network: ResNet, best: Candidate, setup: Reinforcement) -> None:
    network.load_state_dict(best.weights)
    for optimiser in setup.optimisers:
        optimiser.state.clear()


def within_budget(
    trained: Trained, network: ResNet, budget: Budget, cost: NetworkCost, precision: torch.dtype
) -> Evaluation:
    """Move all logits of ``network`` to the lowest computation within the budget, on the validation images.

    One search goes a limited way down, so it is repeated from where it ended until it finds nothing cheaper.
    """
    images, normalisation = trained.splits.val, trained.normalisation
    found = evaluate(network, images, normalisation, cost, precision=precision)
    while True:
        before = found
        found = find_operating_point(network, images, normalisation, budget, cost, before, precision)
        if found.computation > before.computation - NEAR:
            return found


def judged(trained: Trained, network: ResNet | None, start: Start) -> dict[str, float]:
    """What a network does on the test images; the start where there is none."""
    return (start.test if network is None else trained.evaluated(network, trained.splits.test)).metrics


def summary(runs: Sequence[dict]) -> dict:
    """Means and deviations over seeds of FLOPs saved and test accuracy, in percent."""
    row = {"seeds": len(runs), "within": sum(run["alike"]["within_budget"] for run in runs)}
    for way in ("as it is", "alike"):
        row[way] = {
            "saved": spread([100 - 100 * run[way]["computation"] for run in runs]),
            "accuracy": spread([100 * run[way]["accuracy"] for run in runs]),
        }
    row["lowest"] = 100 * min(epoch["accuracy"] for run in runs for epoch in run["epochs"])
    return row


def compared(runs: dict[str, list[dict]]) -> dict[str, list[dict | None]]:
    """Of each part, judged alike, what runs with it are ahead of those of the same seed without it, in points.

    First on top of the published recipe, then added to all others; None where a variant was not run.
    """

    def ahead(with_it: str, without_it: str) -> dict | None:
        if not {with_it, without_it} <= set(runs):
            return None
        pairs = [(a["alike"], b["alike"]) for a, b in zip(runs[with_it], runs[without_it], strict=True)]
        return {
            "saved": spread([100 * (b["computation"] - a["computation"]) for a, b in pairs]),
            "accuracy": spread([100 * (a["accuracy"] - b["accuracy"]) for a, b in pairs]),
        }

    return {part: [ahead(*pair) for pair in pairs] for part, pairs in COMPARED.items()}


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "deviation": statistics.stdev(values) if len(values) > 1 else 0.0}


def table(content: dict) -> str:
    def cells(values: dict | None, sign: str = "") -> str:
        return " | ".join(cell(v, sign) for v in values.values()) if values else " | "

    def cell(value: dict[str, float], sign: str) -> str:
        mean = f"{value['mean']:{sign}.2f}"
        return f"{mean} ± {value['deviation']:.2f}" if value["deviation"] else mean  # none of a single seed

    settings, start = content["settings"], content["start"]
    lines = [
        f"FLOPs saved and test accuracy in %, mean ± deviation over seeds, of a network with "
        f"{start['validation']['accuracy']:.2%} (validation images), {start['test']['accuracy']:.2%} (test images) at "
        f"{start['test']['computation']:.1%} of its FLOPs; a budget of {100 * settings['max_accuracy_drop']:g} points; "
        f"alpha {settings['alpha']:g} where it is fixed.",
        "",
        "| variant | seeds | saved, as it is | accuracy | saved, judged alike | accuracy | ended within the budget "
        "| lowest validation accuracy of an epoch |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for variant, row in content["rows"].items():
        lines.append(
            f"| {variant} | {row['seeds']} | {cells(row['as it is'])} | {cells(row['alike'])} | "
            f"{row['within']} | {row['lowest']:.2f} |"
        )
    lines += [
        "",
        "What each part adds, judged alike, in points against the same seed without it:",
        "",
        "| part | saved, added to published | accuracy | saved, added to all others | accuracy |",
        "|---|---|---|---|---|",
    ]
    for part, (alone, last) in content["parts"].items():
        if alone or last:
            lines.append(f"| {part} | {cells(alone, '+')} | {cells(last, '+')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_command(main, goes_on="the same command")
