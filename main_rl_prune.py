"""Stage 3: prune dynamically.  The switches of the statically pruned network learn by REINFORCE to skip blocks.

Writes result_dir/rl_pruned/<data set>/<network><depth>/<run>/ and the results table.  The README shows the use.
"""

import argparse
import dataclasses
import json
from itertools import islice
from pathlib import Path

import torch

from gating.baselines import BASELINES, Baseline
from gating.batch_norms import BATCH_NORM_MODES
from gating.forward import training_forward
from gating.operating_point import seek_operating_point, shifts_undone
from gating.pictures import CLASSES_A_PAGE, class_averages, draw_easy_and_hard, draw_executed, draw_passing, draw_path
from gating.reinforce import Objective, ReinforceFigures, reinforce_epoch
from gating.softening import soften_switches
from gating.statistics import passing_by_class
from gating.steering import Budget, FixedAlpha, SteeredAlpha, next_aim
from models import all_on, check_depth, thresholded
from utils import parallel
from utils.arguments import NOT_COMPARED, number, training_parser
from utils.augment import Normalisation
from utils.batch_norms import reestimate_batch_norms
from utils.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from utils.data import Splits, batch_ends, check_batches, load_data, split_data, training_batches
from utils.device import Randomness, pick_device, placed
from utils.distillation import following
from utils.errors import UserError, run_command
from utils.evaluate import Evaluation, evaluate
from utils.flops import NetworkCost, network_cost
from utils.results import report
from utils.run import (
    BEST,
    LAST,
    Run,
    finished_checkpoints,
    relative_to_results,
    saved_checkpoints,
    source_path,
    stage_folder,
    write_json,
)
from utils.schedule import scheduled
from utils.training import (
    check_data,
    check_finite,
    epoch_scalars,
    layer_scalars,
    reinforcement_optimisers,
    restore_optimiser,
)

SOFTENING_IMAGES = 512  # training images that the switches' certainty is measured on
REESTIMATION_BATCHES = 40  # training batches that batch norms are re-estimated on


def parse_arguments() -> argparse.Namespace:
    parser = training_parser("Stage 3: teach the switches to skip blocks.", epochs=100, lr=0.001, batch_size=256)
    add = parser.add_argument
    add("--checkpoint", default="", help="network to start from; empty: the smallest of stage 2 within the budget")
    add("--alpha", type=number(float, 0), default=0.1, help="reward for skipping everything, in nats of cross-entropy")
    add("--fixed_alpha", action="store_true", help="keep alpha as given; by default it is steered by the budget")
    add("--gamma", type=number(float, 0, 1), default=1.0, help="discount of what follows a decision")
    add("--gate_lr", type=number(float, 0), default=0.01, help="learning rate of the gates at the start, of Adam")
    add("--rl_weight", type=number(float, 0), default=0.1, help="weight of the policy loss beside the cross-entropy")
    add("--distill", type=number(float, 0, 1), default=0.5, help="weight of following the start's predictions")
    add("--entropy_weight", type=number(float, 0), default=0.02, help="bonus for undecided switches, in nats of return")
    add("--baseline", choices=BASELINES, default="greedy", help="what a return is compared with")
    add("--batch_norm", choices=BATCH_NORM_MODES, default="frozen", help="statistics under drawn decisions")
    add("--max_accuracy_drop", type=number(float, 0, 1), default=0.01, help="accuracy that may be lost against stage 1")
    add("--target_computation", type=number(float, 0, 1), help="steer to this share of executed FLOPs instead")
    args = parser.parse_args()
    if args.fixed_alpha and args.target_computation is not None:
        raise UserError(
            "--target_computation is reached by steering alpha, which --fixed_alpha forbids: drop one of them"
        )
    return args


def main() -> None:
    args = parse_arguments()
    check_depth(args.depth)
    device = pick_device()
    data = load_data(args.data_dir, args.img_type, args.resize, args.num_workers, args.download)
    parent = stage_folder(args.result_dir, "rl_pruned", data.name, args.network, args.depth)
    if args.resume:
        run, state = Run.resume(parent, vars(args), NOT_COMPARED)
    else:
        path, pruned = find_pruned(args, data.name)
        state = dataclasses.replace(
            pruned, stage="rl_pruned", source=relative_to_results(path, args.result_dir), seed=args.seed, training={}
        )
        state.progress = {"step": 0, "alpha": args.alpha, "best": None}
    check_data(state, data, args.resize)
    splits = split_data(data, state.data["val_fraction"], state.data["split_seed"]).to(device)
    check_batches(len(splits.train), args.bs)
    normalisation = state.normaliser()
    randomness = Randomness(args.seed, device)
    network = placed(state.network(), device)
    cost = network_cost(network, args.resize)
    check_target(args.target_computation, cost)
    optimisers = reinforcement_optimisers(network, args.momentum, args.weight_decay)
    baseline = Baseline(args.baseline, network.switches, device)
    if state.training:
        for optimiser, saved in zip(optimisers, state.training["optimisers"], strict=True):
            restore_optimiser(optimiser, saved)
        baseline.restore(state.training["baseline"])
        randomness.restore(state.training["random"])
    if not args.resume:
        run = Run.new(parent, vars(args))
    accuracy = state.original["accuracy"]
    budget = Budget(accuracy - args.max_accuracy_drop, args.target_computation)
    compression = 1 - cost.parameters / state.original["parameters"]
    steps = len(batch_ends(len(splits.train), args.bs))
    forward = training_forward(network, args.compile)
    loss_of = None
    if args.distill:
        origin = load_checkpoint(source_path(state.source, args.result_dir))
        loss_of = following(placed(origin.network(), device).eval(), args.distill)

    def save_if_best(chosen: Evaluation) -> None:
        score = [*budget.score(chosen.accuracy, chosen.computation)]
        if state.progress["best"] is None or score > state.progress["best"]:
            state.progress["best"] = score
            metrics = {"accuracy": chosen.accuracy, "computation": chosen.computation}
            best = dataclasses.replace(state, weights=network.state_dict(), metrics=metrics, training={})
            save_checkpoint(run.path / BEST, best)

    def save_to_resume() -> None:
        training = {
            "optimisers": [optimiser.state_dict() for optimiser in optimisers],
            "baseline": baseline.state(),
            "random": randomness.state(),
        }
        save_checkpoint(run.path / LAST, dataclasses.replace(state, weights=network.state_dict(), training=training))

    with run:
        run.say(f"{run.path} on {device}, {splits.place}: starting from {state.source}")
        start = evaluate(network, splits.choose, normalisation)
        run.say(
            f"{splits.chosen_on} accuracy {start.accuracy:.2%}, to stay above {budget.floor:.2%} (stage 1 had "
            f"{state.original['accuracy']:.2%}); computation {start.computation:.1%}"
        )
        if state.progress["step"] == 0 and not args.resume:  # the network as it came is the first candidate
            soften_switches(network, normalisation.apply(splits.train[:SOFTENING_IMAGES].pixels))
            run.record(0, layer_scalars(network, cost))
            state.progress |= {"start": start.computation, "computation": start.computation}
            state.progress["aim"] = next_aim(
                budget, start.accuracy, start.computation, start.computation, 1, args.epochs
            )
            save_if_best(start)
            save_to_resume()

        for epoch in range(state.progress["step"] + 1, args.epochs + 1):

            def rates(share: float, done: int = epoch - 1) -> tuple[float, float]:
                progress = (done + share) / args.epochs
                return scheduled(args.schedule, args.lr, progress), scheduled(args.schedule, args.gate_lr, progress)

            alpha = steering(args, state.progress, cost, steps, device)
            train = reinforce_epoch(
                network,
                training_batches(splits.train, args.bs, randomness.data, normalisation, state.data["flip"]),
                steps,
                optimisers,
                rates,
                Objective(args.gamma, args.rl_weight, args.entropy_weight),
                alpha,
                cost.shares,
                baseline,
                args.batch_norm,
                randomness.draws,
                f"epoch {epoch}/{args.epochs}",
                loss_of,
                forward,
            )
            if args.batch_norm == "reestimate":
                batches = training_batches(
                    splits.train, args.bs, randomness.data, normalisation, state.data["flip"], whole=True
                )
                dealt = islice(batches, parallel.rank(), REESTIMATION_BATCHES, parallel.processes())
                reestimate_batch_norms(network, dealt, thresholded)
            found = evaluate(network, splits.choose, normalisation)
            check_finite(network, found, f"epoch {epoch}/{args.epochs}")
            whole = evaluate(network, splits.choose, normalisation, all_on)
            state.progress |= {"step": epoch, "computation": found.computation, **alpha.state()}
            with shifts_undone(network):
                chosen = found
                if not args.fixed_alpha:
                    chosen = seek_operating_point(network, splits.choose, normalisation, budget, cost, found)
                save_if_best(chosen)
            scalars = epoch_scalars(train, chosen, whole, cost.parameters, compression, rates(0.0)[0])
            run.record(
                epoch, scalars | policy_scalars(train, found, None if args.fixed_alpha else state.progress["aim"])
            )
            run.say(
                f"epoch {epoch:3d}/{args.epochs}  alpha {train.alpha:.3g}  loss {train.loss:.4f}  return "
                f"{train.total_return:.4f}  entropy {train.entropy:.3f}  {splits.chosen_on}: accuracy "
                f"{chosen.accuracy:.2%} (every block {whole.accuracy:.2%})  computation {chosen.computation:.1%} "
                f"(policy {found.accuracy:.2%} at {found.computation:.1%})"
            )
            state.progress["aim"] = next_aim(
                budget, chosen.accuracy, chosen.computation, state.progress["start"], epoch + 1, args.epochs
            )
            within = state.progress["best"][0]  # or a start below the floor would be trained anew from there each epoch
            if not args.fixed_alpha and within and budget.lost(chosen.accuracy, args.max_accuracy_drop):
                run.say(
                    f"accuracy is far below {budget.floor:.2%}: back to the best network (it may be kept by a smaller "
                    f"--lr or by --batch_norm reestimate)"
                )
                best = load_checkpoint(run.path / BEST)
                network.load_state_dict(best.weights)
                optimisers = reinforcement_optimisers(network, args.momentum, args.weight_decay)
                state.progress |= {"alpha": best.progress["alpha"], "computation": best.metrics["computation"]}
            save_to_resume()

        best = load_checkpoint(run.path / BEST)
        within_budget = best.progress["best"][0]
        met = "the best within the budget" if within_budget else "the nearest to the budget, which no epoch met"
        run.say(f"chosen: epoch {best.progress['step']}, {met}")
        record_routing(run, best, splits, normalisation, budget, device)
        report(Path(args.result_dir), run, best, splits.test, splits.chosen_on, device, within_budget=within_budget)


def check_target(target: float | None, cost: NetworkCost) -> None:
    """Refuse a computation that is left even where every switch closes.

    Raises:
        UserError: says what is left.
    """
    if target is not None and target < 1 - cost.skippable:
        raise UserError(
            f"--target_computation {target} is out of reach: with every switch closed {1 - cost.skippable:.3f} of the "
            f"FLOPs are left; raise it"
        )


def steering(
    args: argparse.Namespace, progress: dict, cost: NetworkCost, steps: int, device: torch.device
) -> FixedAlpha | SteeredAlpha:
    """What gives each step of the next epoch its alpha."""
    if args.fixed_alpha:
        return FixedAlpha(args.alpha)
    # From shares of all FLOPs to shares of those that can be skipped.
    now, end = (max(0.0, 1 - (1 - progress[key]) / cost.skippable) for key in ("computation", "aim"))
    return SteeredAlpha(progress["alpha"], now, end, steps, device)


def policy_scalars(train: ReinforceFigures, found: Evaluation, aim: float | None) -> dict[str, float]:
    """What the policy did in an epoch, by TensorBoard tag.

    Args:
        found: the network at its own threshold.
        aim: the computation that alpha was steered to, if it was.
    """
    scalars = {
        "Policy/alpha": train.alpha,
        "Policy/return": train.total_return,
        "Policy/return_deviation": train.return_deviation,
        "Policy/advantage_deviation": train.advantage_deviation,
        "Policy/entropy": train.entropy,
        "Policy/sampled_share_of_skippable_flops": train.executed,
        "Policy/accuracy": found.accuracy,
        "Policy/computation_percentage": 100 * found.computation,
    }
    return scalars if aim is None else scalars | {"Policy/aim_computation_percentage": 100 * aim}


def record_routing(
    run: Run, best: Checkpoint, splits: Splits, normalisation: Normalisation, budget: Budget, device: torch.device
) -> None:
    """Pictures and figures of what the best network's switches do with the test images."""
    step, classes = best.progress["step"], best.classes
    measured = evaluate(placed(best.network(), device), splits.test, normalisation)
    if not parallel.is_writer():
        return
    labels = splits.test.labels.cpu()
    passing = passing_by_class(measured.decisions, labels, len(classes))
    run.picture("passing_by_class", draw_passing(passing, classes), step)
    run.picture("executed_flops", draw_executed(measured.executed, measured.flops_all), step)
    for page, figure in enumerate(draw_easy_and_hard(splits.test, measured.executed, classes), start=1):
        run.picture("easy_and_hard" if len(classes) <= CLASSES_A_PAGE else f"easy_and_hard_{page:02d}", figure, step)
    run.histogram("Routing/executed_mflops", measured.executed / 1e6, step)
    epochs = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    epochs = [values for values in epochs if "Performance/val_acc" in values]
    path = [[values[tag] for values in epochs] for tag in ("Performance/val_acc", "Indicator/executed_flops")]
    run.picture("accuracy_against_flops", draw_path(*path, budget.floor), step)
    routing = {
        "flops_every_block": measured.flops_all,
        "flops_executed": measured.flops_executed,
        "flops_executed_by_class": class_averages(measured.executed, labels, classes),
        "passing": measured.passing,
        "passing_by_class": dict(zip(classes, passing.tolist(), strict=True)),
    }
    write_json(run.path / "routing.json", routing)


def find_pruned(args: argparse.Namespace, data_name: str) -> tuple[Path, Checkpoint]:
    """The checkpoint to start from: the one named, or stage 2's with the fewest FLOPs within the budget.

    Only networks from a stage 1 of the same size as the newest run's count.
    """
    if args.checkpoint:
        path = Path(args.checkpoint).expanduser()
        pruned = load_checkpoint(path)
    else:
        folder = (args.result_dir, "pruned", data_name, args.network, args.depth)
        found = finished_checkpoints(*folder)
        newest = found[-1][1]
        # The networks that stage 2 chose come first, those of single iterations where its budget was wider than ours.
        within = fitting(found, newest, args.max_accuracy_drop)
        within = within or fitting(saved_checkpoints(*folder, "iteration_*.pt"), newest, args.max_accuracy_drop)
        if not within:
            raise UserError(
                f"no network of stage 2 is within {args.max_accuracy_drop} of stage 1's accuracy: raise "
                f"--max_accuracy_drop, name a --checkpoint, or run main_prune.py with a smaller prune_ratio"
            )
        image_size = newest.data["image_size"]
        path, pruned = min(within, key=lambda item: network_cost(item[1].network(), image_size).flops)
    for key in ("network", "depth"):
        if pruned.architecture[key] != getattr(args, key):
            raise UserError(
                f"checkpoint {path} has {key} {pruned.architecture[key]}, not {getattr(args, key)}: change --{key}"
            )
    if pruned.architecture["gate"] == "none":
        raise UserError(f"checkpoint {path} has no switches to teach: train stage 1 with --gate rnn, ff1 or ff2")
    return path, pruned


def fitting(found: list[tuple[Path, Checkpoint]], newest: Checkpoint, drop: float) -> list[tuple[Path, Checkpoint]]:
    """The switched networks within the budget that come from a stage 1 of the same cost as the newest run's."""
    return [
        (path, c)
        for path, c in found
        if c.metrics["accuracy"] >= c.original["accuracy"] - drop - 1e-9
        and all(c.original[key] == newest.original[key] for key in ("parameters", "flops"))
        and c.architecture["gate"] == newest.architecture["gate"]
    ]


if __name__ == "__main__":
    run_command(parallel.joined(main))
