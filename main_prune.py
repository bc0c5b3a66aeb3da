"""Stage 2: prune the trained network statically and physically, in the Kronecker-factored eigenbasis of the Fisher.

Repeats prune, fine-tune, measure until the accuracy has fallen by more than the budget, and keeps every iteration's
network.  Writes result_dir/pruned/<data set>/<network><depth>/<run>/ and the results table.  Settings: config.json.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from utils.interruptions import prepare

    prepare()

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from deploy.speeds import measured_speeds
from models import ResNet, all_on, allow, is_own
from pruning.changes import Pruned, changes_table, eigenvalues_picture, layer_ranks, ranks_picture
from pruning.compress import check_goal, prune_once
from pruning.goals import Goal, as_count, part_of_the_way
from pruning.settings import PruneSettings
from training.distillation import distillation_loss_fn
from training.evaluate import Evaluation, Evaluator, check_finite
from training.forward import training_forward
from training.given import register_given
from training.norms import placed, reestimate_batch_norms
from training.optimisers import rates_of_epoch, sgd
from training.report import Chosen, report
from training.scalars import EPOCH_CHARTS, epoch_line, epoch_scalars
from training.supervised import LossFn, Supervision, supervised_epoch
from utils import parallel
from utils.data.augment import Normalisation
from utils.data.batches import (
    Splits,
    TrainingBatches,
    check_batches,
    plain_batches,
    split_as_before,
)
from utils.data.folder import DataSet, load_data
from utils.device import Randomness, device_text, pick_device, pick_precision
from utils.errors import run_command
from utils.flops import NetworkCost, every_block, network_cost
from utils.runs.checkpoint import (
    Checkpoint,
    check_data,
    is_checkpoint,
    load_checkpoint,
    save_checkpoint,
    weights_digest,
)
from utils.runs.keeper import Keeper, Progress
from utils.runs.predecessors import has_ended, source_of, source_path, trained_network
from utils.runs.run import BEST, Run, find_last_run, open_run, stage_folder
from utils.settings import RESUME, Parser, load_settings


def parse_arguments() -> tuple[PruneSettings, bool]:
    parser = Parser(
        "Stage 2: static pruning.  docs/options.md lists the keys of its settings.",
        hint="--help lists the flags; a key of the settings is given as --set key=value",
    )
    parser.add_argument("--config_path", default="config.json", help="settings file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the settings"
    )
    parser.add_argument("--resume", action="store_true", help=RESUME)
    args = parser.parse_args()
    return load_settings(PruneSettings, args.config_path, args.set), args.resume


@dataclass
class PruningProgress(Progress):
    """The progress of stage 2; ``best`` is that of the current iteration."""

    iteration: int = 0
    epoch: int = 0  # of fine-tuning in this iteration
    epochs: int = 0  # that this iteration is fine-tuned for


@dataclass(frozen=True)
class Stage:
    """Everything that an iteration needs."""

    run: Run
    splits: Splits
    settings: PruneSettings
    device: torch.device
    precision: torch.dtype
    randomness: Randomness
    start: Checkpoint  # stage 1's network, or where an interrupted run continues
    loss_fn: LossFn | None  # of fine-tuning, where it follows stage 1's network
    evaluated: Evaluator  # on the images that choices look at

    @property
    def normalisation(self) -> Normalisation:
        return self.start.normaliser()


def main() -> None:
    settings, resume = parse_arguments()
    device = pick_device()
    precision = pick_precision(settings.precision, device)
    data = load_data(**settings.data())
    if is_own(settings.network):
        allow(settings.network)
    parent = stage_folder(settings.result_dir, "pruned", data.name, settings.network, settings.depth)
    last = find_last_run(parent, settings) if resume else None
    start, notes = (last.checkpoint, []) if last else first_network(settings, data, device)
    check_data(start, data, settings.resize)
    check_goal(start.network(), settings.resize, last_goal(settings, start.original), settings, every_block)
    splits = split_as_before(data, start.data, resumed=last is not None).to(device)
    start = replace(start, data={**start.data, **splits.identity})
    check_batches(min(len(splits.train), settings.fisher_images), settings.batch_size)
    randomness = Randomness(settings.seed, device)
    accuracy, floor = start.metrics["accuracy"], start.original["accuracy"] - settings.max_accuracy_drop

    with open_run(parent, settings, last, resume, EPOCH_CHARTS) as run:
        first = f"{run.path} on {device_text(device, precision)}, {splits.place}: pruning {start.source}"
        run.say("\n".join([first, *notes, *splits.notes]))
        unpruned = stage_1_network(run, start, settings)
        loss_fn = None
        if settings.distill:
            loss_fn = distillation_loss_fn(placed(unpruned.network(), device), settings.distill, precision)
        evaluated = Evaluator(splits.val, start.normaliser(), settings.resize, precision)
        stage = Stage(run, splits, settings, device, precision, randomness, start, loss_fn, evaluated)
        run.say(f"{splits.val_name} accuracy of the unpruned network {start.original['accuracy']:.2%}")
        network = placed(start.network(), device)
        progress = PruningProgress(source_weights=weights_digest(unpruned))
        keeper = Keeper(run, start, network, progress, {"random": randomness})
        if last:
            keeper.resume(last.checkpoint)
        else:
            keeper.save_last()  # so that a run interrupted in its first iteration can be resumed

        while True:
            if progress.iteration > 0:
                network, accuracy = fine_tune(stage, network, progress, last and last.checkpoint)
            last = None
            least = max(floor, 0)
            run.say(f"after iteration {progress.iteration}: accuracy {accuracy:.2%}, which may fall to {least:.2%}")
            if progress.iteration == settings.max_iter or accuracy < floor - 1e-9:
                break
            smaller = prune(stage, network, progress)
            if smaller is None:
                run.say("nothing more to prune: the target is met, or prune_ratio or prune_ratio_limit allows no more")
                break
            network = smaller

        iterations = [load_checkpoint(path) for path in sorted(run.path.glob("iteration_*.pt"))]
        best, within_budget = smallest_within_budget(run, start, unpruned, iterations, floor)
        save_checkpoint(run.path / BEST, best)
        draw_ranks(run, unpruned, iterations)
        points = [point(iteration, stage) for iteration in iterations]
        chosen = Chosen(best, splits.val_name, within_budget, points)
        report(settings.result_dir, run, chosen, splits.test, measured_speeds)


def first_network(settings: PruneSettings, data: DataSet, device: torch.device) -> tuple[Checkpoint, list[str]]:
    """Stage 1's network, or the user's own, and lines for the log about the choice."""
    if is_own(settings.network) and not is_checkpoint(Path(settings.checkpoint).expanduser()):
        registered = register_given(settings, data, device, measured_speeds)
        settings = replace(settings, checkpoint=str(registered))
    return trained_network(settings, data)


def stage_1_network(run: Run, start: Checkpoint, settings: PruneSettings) -> Checkpoint:
    """The network that is pruned, before pruning; logs if its training has not ended."""
    if not has_ended(source_path(start.source, settings.result_dir)):
        run.say(f"{start.source}: stage 1 has not ended; rerun its command with --resume")
    return source_of(start, settings.result_dir)


def last_goal(settings: PruneSettings, original: dict[str, float]) -> Goal:
    """The goal of the last iteration."""
    flops = as_count(settings.target_flops, original["flops"])
    return Goal(settings.prune_ratio, flops, as_count(settings.target_parameters, original["parameters"]))


def next_goal(stage: Stage, progress: PruningProgress, cost: NetworkCost) -> Goal:
    """The goal of the next iteration, so that the last one lands on the target."""
    goal = last_goal(stage.settings, stage.start.original)
    left = stage.settings.max_iter - progress.iteration
    flops = part_of_the_way(cost.flops, goal.flops, left)
    return Goal(goal.prune_ratio, flops, part_of_the_way(cost.parameters, goal.parameters, left))


def prune(stage: Stage, network: ResNet, progress: PruningProgress) -> ResNet | None:
    """Start an iteration: the pruned network, None if nothing can be saved."""
    settings, splits, normalisation = stage.settings, stage.splits, stage.normalisation
    order = torch.randperm(len(splits.train), generator=stage.randomness.data)
    fisher = splits.train[order[: settings.fisher_images]]
    cost = network_cost(network, settings.resize)
    passes = settings.passes(
        lambda: plain_batches(fisher, settings.batch_size, normalisation, shared=True), stage.randomness.draws,
        every_block, say=stage.run.say,
    )  # fmt: skip
    pruned = prune_once(network, passes, cost=cost, goal=next_goal(stage, progress, cost), method=settings)
    # All processes take the first one's choice: rounding could make theirs differ.
    pruned = parallel.broadcast_object(pruned)
    # Gates are never pruned, which needs no line.
    alone = {name: why for name, why in pruned.left_alone.items() if not name.startswith("gate.")}
    if pruned.nothing_changed:
        return None
    smaller = placed(pruned.network, stage.device)
    cut = ready = stage.evaluated(smaller, all_on)
    rise = cut.loss - stage.evaluated(network, all_on).loss
    if settings.reestimate_batch_norm and not settings.refit:
        reestimate_batch_norms(smaller, plain_batches(fisher, settings.batch_size, normalisation), every_block)
        ready = stage.evaluated(smaller, all_on)
    compression = stage.start.compression(network_cost(smaller, settings.resize))
    progress.step += 1
    progress.iteration += 1
    progress.epoch, progress.best = 0, None
    progress.epochs = round(settings.epochs_start + (settings.epochs_end - settings.epochs_start) * compression)
    record_pruning(stage, progress, replace(pruned, network=smaller, left_alone=alone), rise, ready)
    return smaller


def fine_tune(
    stage: Stage, network: ResNet, progress: PruningProgress, last: Checkpoint | None
) -> tuple[ResNet, float]:
    """Train an iteration's epochs, or the rest of them; returns the network of its best epoch, and its accuracy.

    Args:
        last: where an interrupted iteration continues.
    """
    run, splits, settings, randomness = stage.run, stage.splits, stage.settings, stage.randomness
    cost = network_cost(network, settings.resize)
    optimiser = sgd(network, settings.lr, settings.momentum, settings.weight_decay)
    batches = TrainingBatches(
        splits.train, settings.batch_size, randomness.data, stage.normalisation, stage.start.data["flip"]
    )
    forward = training_forward(network, stage.precision, settings.compile)
    training = Supervision(
        network=network, optimiser=optimiser, draws=randomness.draws, loss_fn=stage.loss_fn, forward=forward
    )
    stateful = {"optimiser": optimiser, "random": randomness}
    keeper = Keeper(run, stage.start, network, progress, stateful, f"iteration_{progress.iteration:02d}.pt")
    if last:
        keeper.resume(last)
    else:
        val = stage.evaluated(network)
        keeper.offer([0] if splits.val_is_test else val.score, val.metrics)
        keeper.save_last()

    for epoch in range(progress.epoch + 1, progress.epochs + 1):
        title = f"iteration {progress.iteration}  epoch {epoch:3d}/{progress.epochs}"
        rate = rates_of_epoch(epoch, progress.epochs, settings.lr, settings.schedule)
        train = supervised_epoch(training, batches, rate, title)
        val, every_block = stage.evaluated.both(network)
        check_finite(network, val, title)
        progress.step, progress.epoch = progress.step + 1, epoch
        compression = stage.start.compression(cost)
        scalars = epoch_scalars(train, val, every_block, cost.parameters, compression, rate(0.0))
        run.record(progress.step, scalars, iteration=progress.iteration)
        run.say(epoch_line(title, train, val, every_block, splits.val_name))
        # Without validation images no epoch can be selected: the last one counts.
        keeper.offer([epoch] if splits.val_is_test else val.score, val.metrics)
        keeper.save_last()

    best = keeper.best()
    return placed(best.network(), stage.device), best.metrics["accuracy"]


def record_pruning(stage: Stage, progress: PruningProgress, pruned: Pruned, rise: float, ready: Evaluation) -> None:
    """Log and record what an iteration removed, and the predicted and the measured rise of the loss by surgery.

    Args:
        ready: the pruned network before fine-tuning.
    """
    run, step, iteration, original = stage.run, progress.step, progress.iteration, stage.start.original
    cost = network_cost(pruned.network, stage.settings.resize)
    compression = stage.start.compression(cost)
    run.say(f"\niteration {iteration}\n{changes_table(pruned)}")
    predicted = f"{'predicted before the refit' if stage.settings.refit else 'predicted'} {pruned.predicted_rise:.4f}"
    run.say(
        f"iteration {iteration}: {cost.parameters:,} parameters ({compression:.1%} removed), {cost.flops:,} FLOPs "
        f"({cost.flops / original['flops']:.1%} of stage 1); replacing layers changes the loss by {rise:+.4f} "
        f"({predicted}); accuracy before fine-tuning {ready.accuracy:.2%}"
    )
    scalars = {
        "Size/flops": cost.flops,
        "Size/parameters": cost.parameters,
        "Size/prune_ratio": compression,
        "Pruning/measured_rise": rise,
        "Pruning/predicted_rise": pruned.predicted_rise,
        "Pruning/accuracy_before_fine_tuning": ready.accuracy,
    }
    notes = {f"Layers/predicted_rise/{c.name}": c.predicted_rise for c in pruned.changes}
    run.record(step, scalars, iteration=iteration, **notes)
    if pruned.bases:
        run.picture("eigenvalues", eigenvalues_picture(pruned.bases), step, iteration)


def smallest_within_budget(
    run: Run, start: Checkpoint, unpruned: Checkpoint, iterations: list[Checkpoint], floor: float
) -> tuple[Checkpoint, bool]:
    """The iteration with the fewest FLOPs within the budget, or stage 1's network, and whether the budget is met."""
    within = [c for c in iterations if c.metrics["accuracy"] >= floor - 1e-9]
    if within:
        best = min(within, key=lambda c: network_cost(c.network(), start.data["image_size"]).flops)
        run.say(f"chosen: iteration {best.progress['iteration']}, the smallest network within the budget")
        return best, True
    below = start.metrics["accuracy"] < floor - 1e-9
    if iterations:
        run.say(
            "no iteration met the budget, so the unpruned network is kept: try a "
            "smaller prune_ratio or, with a target, a larger max_iter"
        )
    elif below:
        run.say(
            "the accuracy is below the budget before pruning, so nothing was pruned and stage 1's network is kept: "
            "raise max_accuracy_drop"
        )
    else:
        run.say(
            "nothing was pruned, so the unpruned network is kept: no layer has a cheaper form, or the target is met"
        )
    kept = {"source": start.source, "seed": start.seed, "progress": asdict(PruningProgress()), "training": {}}
    return replace(unpruned, stage="pruned", **kept), not iterations and not below


def draw_ranks(run: Run, unpruned: Checkpoint, iterations: list[Checkpoint]) -> None:
    """``ranks.png`` in the run's folder: the ranks by layer, of stage 1's network and after every iteration."""
    networks = [("stage 1", unpruned)]
    networks += [(f"iteration {c.progress['iteration']}", c) for c in iterations]
    run.picture("ranks", ranks_picture([(label, layer_ranks(c.network())) for label, c in networks]))


def point(checkpoint: Checkpoint, stage: Stage) -> dict[str, float | str]:
    """GFLOPs of one iteration and its accuracy on the images that choices look at, every block run: for the picture."""
    measured = replace(stage.evaluated, precision=torch.float32)(placed(checkpoint.network(), stage.device), all_on)
    return {
        "iteration": checkpoint.progress["iteration"],
        "gflops": measured.flops_all / 1e9,
        "accuracy": measured.accuracy,
        "measured_on": stage.splits.val_name,
    }


if __name__ == "__main__":
    run_command(parallel.distributed(main))
