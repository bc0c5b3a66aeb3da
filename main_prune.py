"""Stage 2: prune the trained network statically and physically, in the Kronecker-factored eigenbasis of the Fisher.

Repeats prune, fine-tune, measure until the accuracy has fallen by more than the budget, and keeps every iteration's
network.  Writes result_dir/pruned/<data set>/<network><depth>/<run>/ and the results table.  Settings: config.json.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from gating.forward import training_forward
from gating.supervised import supervised_epoch
from models import ResNet, all_on, check_depth
from pruning.changes import Pruned, changes_table
from pruning.iteration import check_goal, prune_once
from pruning.method import Method
from pruning.picture import layer_ranks, ranks_picture
from pruning.selection import Goal, part_of_the_way
from utils import parallel
from utils.arguments import NOT_COMPARED
from utils.augment import Normalisation
from utils.batch_norms import reestimate_batch_norms
from utils.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from utils.config import PruneSettings, as_dictionary, load_settings
from utils.data import (
    Splits,
    batch_ends,
    check_batches,
    dealt_batches,
    load_data,
    shared_batches,
    split_data,
    training_batches,
)
from utils.device import Randomness, pick_device, placed
from utils.distillation import following
from utils.errors import UserError, run_command
from utils.evaluate import evaluate
from utils.flops import network_cost
from utils.results import report
from utils.run import (
    BEST,
    LAST,
    Run,
    epochs_missing,
    finished_checkpoints,
    relative_to_results,
    source_path,
    stage_folder,
)
from utils.schedule import scheduled
from utils.training import check_data, check_finite, epoch_scalars, layer_scalars, restore_optimiser, sgd


def parse_arguments() -> tuple[PruneSettings, bool]:
    parser = argparse.ArgumentParser(description="Stage 2: static pruning.", allow_abbrev=False)
    parser.add_argument("--config_path", default="config.json", help="settings file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the settings"
    )
    parser.add_argument("--resume", action="store_true", help="continue the newest run of this stage")
    args = parser.parse_args()
    return load_settings(args.config_path, args.set), args.resume


def main() -> None:
    settings, resume = parse_arguments()
    check_depth(settings.depth)
    check_timing(settings)
    device = pick_device()
    data = load_data(settings.data_dir, settings.img_type, settings.resize, settings.num_workers)
    parent = stage_folder(settings.result_dir, "pruned", data.name, settings.network, settings.depth)
    if resume:
        run, state = Run.resume(parent, as_dictionary(settings), NOT_COMPARED)
    else:
        path, trained = find_trained(settings, data.name)
        state = dataclasses.replace(
            trained,
            stage="pruned",
            source=relative_to_results(path, settings.result_dir),
            seed=settings.seed,
            training={},
        )
        state.progress = {"step": 0, "iteration": 0, "epoch": 0, "epochs": 0}
    check_data(state, data, settings.resize)
    check_goal(state.network(), settings.resize, last_goal(settings, state.original), method(settings))
    splits = split_data(data, state.data["val_fraction"], state.data["split_seed"]).to(device)
    check_batches(min(len(splits.train), settings.fisher_images), settings.batch_size)
    if not resume:
        run = Run.new(parent, as_dictionary(settings), settings.exp_name)

    floor = state.original["accuracy"] - settings.max_accuracy_drop
    randomness = Randomness(settings.seed, device)
    if state.training:
        randomness.restore(state.training["random"])
    with run:
        run.say(f"{run.path} on {device}, {splits.place}: pruning {state.source}")
        missing = epochs_missing(source_path(state.source, settings.result_dir))
        if missing:
            run.say(f"{state.source} is of a run that still has {missing} epochs to go: main_sp.py --resume ends it")
        run.say(f"{splits.chosen_on} accuracy of stage 1 {state.original['accuracy']:.2%}")
        if not resume:  # an interruption in the first iteration leaves a run to resume, too
            state.training = {"random": randomness.state()}
            save_checkpoint(run.path / LAST, state)
        unpruned = load_checkpoint(source_path(state.source, settings.result_dir))
        teacher = placed(unpruned.network(), device) if settings.distill else None
        stage = Stage(run, splits, settings, device, randomness, state.normaliser(), floor, teacher)
        prune_and_fine_tune(stage, state)
        iterations = [load_checkpoint(path) for path in sorted(run.path.glob("iteration_*.pt"))]
        best, within_budget = smallest_within_budget(run, state, unpruned, iterations, settings.max_accuracy_drop)
        save_checkpoint(run.path / BEST, best)
        draw_ranks(run, unpruned, iterations)
        points = [test_point(iteration, splits, device) for iteration in iterations]
        report(Path(settings.result_dir), run, best, splits.test, splits.chosen_on, device, points, within_budget)


def find_trained(settings: PruneSettings, data_name: str) -> tuple[Path, Checkpoint]:
    """The checkpoint to prune: the one named, or stage 1's with the best accuracy (the newest of equals)."""
    if settings.checkpoint:
        path = Path(settings.checkpoint).expanduser()
        trained = load_checkpoint(path)
    else:
        found = finished_checkpoints(settings.result_dir, "sp", data_name, settings.network, settings.depth)
        fitting = [item for item in found if item[1].architecture["width"] == settings.width] or found
        path, trained = max(reversed(fitting), key=lambda item: item[1].metrics["accuracy"])
    for key in ("network", "depth", "width"):
        if trained.architecture[key] != getattr(settings, key):
            raise UserError(
                f"checkpoint {path} has {key} {trained.architecture[key]}, the settings say {getattr(settings, key)}: "
                f"change {key} or the checkpoint"
            )
    return path, trained


@dataclasses.dataclass(frozen=True)
class Stage:
    """What every iteration needs."""

    run: Run
    splits: Splits
    settings: PruneSettings
    device: torch.device
    randomness: Randomness
    normalisation: Normalisation
    floor: float  # accuracy to stay above
    teacher: ResNet | None  # stage 1's network, where fine-tuning follows it

    @property
    def steps(self) -> int:
        return len(batch_ends(len(self.splits.train), self.settings.batch_size))


def prune_and_fine_tune(stage: Stage, state: Checkpoint) -> None:
    """Iterate from ``state``: stage 1's network, or where a run was interrupted.  One ``iteration_NN.pt`` each."""
    network = placed(state.network(), stage.device)
    if state.progress["iteration"] > 0:
        network = fine_tune(stage, state, network)
    while True:
        accuracy, iteration = state.metrics["accuracy"], state.progress["iteration"]
        stage.run.say(f"after iteration {iteration}: accuracy {accuracy:.2%}, to stay above {stage.floor:.2%}")
        if iteration == stage.settings.max_iter or accuracy < stage.floor - 1e-9:
            return
        smaller = prune(stage, state, network)
        if smaller is None:
            stage.run.say(
                "no layer needs or bears more pruning: the target is met, or prune_ratio_limit or prune_ratio stops it"
            )
            return
        network = fine_tune(stage, state, smaller)


def prune(stage: Stage, state: Checkpoint, network: ResNet) -> ResNet | None:
    """Start an iteration: the network without its least salient directions, None where nothing can be saved."""
    settings, splits = stage.settings, stage.splits
    order = torch.randperm(len(splits.train), generator=stage.randomness.data)
    fisher = splits.train[order[: settings.fisher_images]]
    how, keep_times = measuring_times(method(settings), stage.run)
    try:
        pruned = prune_once(
            network,
            lambda: shared_batches(fisher, settings.batch_size, stage.normalisation),
            stage.randomness.draws,
            image_size=settings.resize,
            goal=next_goal(settings, state, network),
            method=how,
        )
    finally:
        if parallel.is_writer():
            keep_times()
    # Neither rounding nor measured times may choose another network in another process.
    pruned = parallel.from_writer(pruned)
    if pruned.nothing_changed:
        return None
    smaller = placed(pruned.network, stage.device)
    old, cut = (evaluate(net, splits.choose, stage.normalisation, all_on) for net in (network, smaller))
    if settings.reestimate_batch_norm:
        reestimate_batch_norms(smaller, dealt_batches(fisher, settings.batch_size, stage.normalisation), all_on)
    compression = 1 - network_cost(smaller, settings.resize).parameters / state.original["parameters"]
    state.progress = {
        "step": state.progress["step"] + 1,
        "iteration": state.progress["iteration"] + 1,
        "epoch": 0,
        "epochs": round(settings.epochs_start + (settings.epochs_end - settings.epochs_start) * compression),
    }
    state.training = {}
    record_pruning(stage, state, pruned, cut.loss - old.loss, smaller)
    return smaller


def method(settings: PruneSettings) -> Method:
    keys = {field.name for field in dataclasses.fields(Method)} & set(as_dictionary(settings))
    return Method(**{key: getattr(settings, key) for key in keys})


def check_timing(settings: PruneSettings) -> None:
    """Refuse the objective latency where nothing can be timed.

    Raises:
        UserError: says what to install.
    """
    try:
        if settings.objective == "latency":
            import deploy.layer_times  # noqa: F401
    except ImportError:
        raise UserError("objective latency measures layers with onnx and onnxruntime: install both") from None


def measuring_times(method: Method, run: Run) -> tuple[Method, Callable[[], None]]:
    """The method with measured times of layers where its objective asks for them, and what keeps their table."""
    if method.objective != "latency":
        return method, lambda: None
    from deploy.layer_times import LayerTimes

    times = LayerTimes(run.path / "layer_times.json")
    return dataclasses.replace(method, seconds=times.seconds), times.save


def last_goal(settings: PruneSettings, original: dict[str, float]) -> Goal:
    """Where the last iteration is to arrive."""
    budgets = {}
    for key in ("flops", "parameters"):
        target = getattr(settings, f"target_{key}")
        budgets[key] = (target * original[key] if target <= 1 else target) or None
    return Goal(settings.prune_ratio, **budgets)


def next_goal(settings: PruneSettings, state: Checkpoint, network: ResNet) -> Goal:
    """Where the next iteration is to arrive, so that the last one lands on the target."""
    goal, cost = last_goal(settings, state.original), network_cost(network, settings.resize)
    left = settings.max_iter - state.progress["iteration"]
    flops = part_of_the_way(cost.flops, goal.flops, left)
    return Goal(goal.prune_ratio, flops, part_of_the_way(cost.parameters, goal.parameters, left))


def fine_tune(stage: Stage, state: Checkpoint, network: ResNet) -> ResNet:
    """Train the rest of an iteration's epochs; the network of its best epoch, whose accuracy goes into ``state``."""
    run, splits, settings = stage.run, stage.splits, stage.settings
    iteration, epochs = state.progress["iteration"], state.progress["epochs"]
    best_path = run.path / f"iteration_{iteration:02d}.pt"
    parameters = network_cost(network, settings.resize).parameters
    compression = 1 - parameters / state.original["parameters"]
    loss_of = None if stage.teacher is None else following(stage.teacher, settings.distill)
    optimiser = sgd(network, settings.lr, settings.momentum, settings.weight_decay)
    forward = training_forward(network, settings.compile)
    if state.training:
        restore_optimiser(optimiser, state.training["optimiser"])

    def save(path: Path, training: dict) -> None:
        weights = network.state_dict()
        now = dataclasses.replace(state, architecture=network.architecture, weights=weights, training=training)
        save_checkpoint(path, now)

    def resumable() -> dict:
        return {"optimiser": optimiser.state_dict(), "random": stage.randomness.state()}

    if state.progress["epoch"] == 0:
        chosen = evaluate(network, splits.choose, stage.normalisation)
        state.progress["best_accuracy"] = chosen.accuracy
        state.metrics = {"accuracy": chosen.accuracy, "computation": chosen.computation}
        save(best_path, {})
        save(run.path / LAST, resumable())

    for epoch in range(state.progress["epoch"] + 1, epochs + 1):

        def rate(share: float, done: int = epoch - 1) -> float:
            return scheduled(base=settings.lr, progress=(done + share) / epochs, **settings.schedule())

        train = supervised_epoch(
            network,
            training_batches(
                splits.train, settings.batch_size, stage.randomness.data, stage.normalisation, state.data["flip"]
            ),
            stage.steps,
            optimiser,
            rate,
            stage.randomness.draws,
            f"iteration {iteration}, epoch {epoch}/{epochs}",
            loss_of,
            forward,
        )
        chosen = evaluate(network, splits.choose, stage.normalisation)
        check_finite(network, chosen, f"iteration {iteration}, epoch {epoch}/{epochs}")
        whole = evaluate(network, splits.choose, stage.normalisation, all_on)
        state.progress = {**state.progress, "step": state.progress["step"] + 1, "epoch": epoch}
        scalars = epoch_scalars(train, chosen, whole, parameters, compression, rate(0.0))
        run.record(state.progress["step"], scalars, iteration=iteration)
        if epoch % settings.log_interval == 0 or epoch == epochs:
            run.say(
                f"iteration {iteration}  epoch {epoch:3d}/{epochs}  loss {train.loss:.4f}  accuracy "
                f"{train.accuracy:.2%}  {splits.chosen_on}: loss {chosen.loss:.4f}  accuracy {chosen.accuracy:.2%} "
                f"(every block {whole.accuracy:.2%})  computation {chosen.computation:.1%}"
            )
        # Without validation images no epoch may be preferred: the last one counts.
        if chosen.accuracy > state.progress["best_accuracy"] or splits.chosen_on == "test":
            state.progress["best_accuracy"] = chosen.accuracy
            state.metrics = {"accuracy": chosen.accuracy, "computation": chosen.computation}
            save(best_path, {})
        save(run.path / LAST, resumable())

    best = load_checkpoint(best_path)
    state.metrics = best.metrics
    return placed(best.network(), stage.device)


def record_pruning(stage: Stage, state: Checkpoint, pruned: Pruned, rise: float, after: ResNet) -> None:
    """Say and record what an iteration removed, and the predicted and the measured rise of the loss by surgery."""
    run, step, iteration = stage.run, state.progress["step"], state.progress["iteration"]
    cost = network_cost(after, stage.settings.resize)
    ready = evaluate(after, stage.splits.choose, stage.normalisation, all_on)
    compression = 1 - cost.parameters / state.original["parameters"]
    predicted = "nothing" if pruned.predicted_rise is None else f"{pruned.predicted_rise:.4f}"
    run.say(f"\niteration {iteration}\n{changes_table(pruned.changes)}")
    run.say(
        f"iteration {iteration}: {cost.parameters:,} parameters ({compression:.1%} removed), {cost.flops:,} FLOPs "
        f"({cost.flops / state.original['flops']:.1%} of stage 1); surgery raises the loss by {rise:.4f} "
        f"(predicted {predicted}), accuracy before fine-tuning {ready.accuracy:.2%}"
    )
    scalars = {
        "Indicator/total_flops": cost.flops,
        "Indicator/total_parameters": cost.parameters,
        "Indicator/prune_ratio": compression,
        "Pruning/measured_rise": rise,
        "Pruning/accuracy_before_fine_tuning": ready.accuracy,
        **layer_scalars(after, cost),
    }
    if pruned.predicted_rise is not None:
        scalars["Pruning/predicted_rise"] = pruned.predicted_rise
    run.record(step, scalars, iteration=iteration)
    for name, basis in pruned.bases.items():
        run.histogram(f"Eigenvalues/log10_d_a/{name}", basis.d_a.clamp(min=1e-20).log10(), step)
        run.histogram(f"Eigenvalues/log10_d_g/{name}", basis.d_g.clamp(min=1e-20).log10(), step)


def smallest_within_budget(
    run: Run, state: Checkpoint, unpruned: Checkpoint, iterations: list[Checkpoint], drop: float
) -> tuple[Checkpoint, bool]:
    """The iteration with the fewest FLOPs within the budget, and whether there is one: else stage 1's network."""
    within = [c for c in iterations if c.metrics["accuracy"] >= state.original["accuracy"] - drop - 1e-9]
    if within:
        image_size = state.data["image_size"]
        best = min(within, key=lambda c: network_cost(c.network(), image_size).flops)
        run.say(f"chosen: iteration {best.progress['iteration']}, the smallest network within the budget")
        return best, True
    run.say("no iteration stayed within the budget: the unpruned network is kept; try a smaller prune_ratio")
    return dataclasses.replace(unpruned, stage="pruned", source=state.source, seed=state.seed, training={}), False


def draw_ranks(run: Run, unpruned: Checkpoint, iterations: list[Checkpoint]) -> None:
    """``ranks.png`` in the run's folder: the ranks by layer, of stage 1's network and after every iteration."""
    if not parallel.is_writer():
        return
    networks = [("stage 1", unpruned)]
    networks += [(f"iteration {c.progress['iteration']}", c) for c in iterations]
    ranks_picture(run.path / "ranks.png", [(label, layer_ranks(c.network())) for label, c in networks])


def test_point(checkpoint: Checkpoint, splits: Splits, device) -> dict[str, float]:
    """GFLOPs and test accuracy of one iteration, for the picture only."""
    measured = evaluate(placed(checkpoint.network(), device), splits.test, checkpoint.normaliser(), all_on)
    return {
        "iteration": checkpoint.progress["iteration"],
        "gflops": measured.flops_all / 1e9,
        "accuracy": measured.accuracy,
    }


if __name__ == "__main__":
    run_command(parallel.joined(main))
