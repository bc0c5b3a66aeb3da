"""Stage 3: prune dynamically.  The switches of the statically pruned network learn by REINFORCE to skip blocks.

Writes result_dir/rl_pruned/<data set>/<network><depth>/<run>/ and the results table.  The README shows the use.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from utils.interruptions import prepare

    prepare()

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import nn

from deploy.speeds import measured_speeds
from gating.fixing import BEFORE_FIXING, fix_switches, fixed_blocks_text
from gating.operating_point import find_operating_point, gate_biases_restored
from gating.reinforce import Reinforcement, closing_epoch, reinforce_epoch
from gating.routing import record_routing
from gating.scalars import POLICY_CHARTS, policy_line, policy_scalars
from gating.steering import Budget, Steering
from gating.temperature import rescale_gate_logits
from models import ResNet
from training.distillation import distillation_loss_fn
from training.evaluate import Evaluation, Evaluator, check_finite
from training.forward import training_forward
from training.norms import BATCH_NORM_MODES, placed, reestimate_batch_norms
from training.optimisers import rates_of_epoch, reinforcement_optimisers, sgd
from training.report import Chosen, report
from training.scalars import epoch_scalars
from utils import parallel
from utils.data.batches import TrainingBatches, check_batches, split_as_before
from utils.data.folder import load_data
from utils.data.images import Images, evenly_spaced
from utils.device import Randomness, device_text, pick_device, pick_precision
from utils.errors import UserError, run_command
from utils.flops import NetworkCost, network_cost
from utils.runs.checkpoint import Checkpoint, check_data, load_checkpoint, save_checkpoint, weights_digest
from utils.runs.keeper import Keeper, Progress
from utils.runs.predecessors import pruned_network, source_of
from utils.runs.run import BEST, Run, find_last_run, open_run, stage_folder
from utils.settings import TrainingSettings, parse_flags, setting, with_default

RECIPES = ("default", "published")
RESCALING_IMAGES = 512  # training images that the switches' certainty is measured on
REESTIMATION_BATCHES = 40  # training batches that batch norms are re-estimated on


@dataclass(frozen=True, kw_only=True)
class Settings(TrainingSettings):
    """The flags of stage 3.

    Raises:
        UserError: for flags that exclude each other.
    """

    epochs: int = with_default(TrainingSettings, "epochs", 100)
    lr: float = with_default(TrainingSettings, "lr", 0.001)
    bs: int = with_default(TrainingSettings, "bs", 256)
    checkpoint: str = setting("", "checkpoint to start from; empty: the smallest of stage 2 within the budget")
    alpha: float = setting(
        0.1, "initial reward for skipping every block, in nats of cross-entropy; then adjusted", low=0, high=1e6
    )
    recipe: str = setting(
        "default",
        "default, or published as in SkipNet: drawn decisions, one SGD for all weights, fixed alpha, "
        "no baseline, no distillation",
        choices=RECIPES,
    )
    gamma: float = setting(1.0, "discount factor of later rewards", low=0, high=1)
    closing: float = setting(
        0.33, "share of the epochs, at the end, in which the gates are frozen and only the network trains",
        low=0, high=1,
    )  # fmt: skip
    gate_lr: float = setting(0.01, "initial learning rate of the gates (Adam)", low=0)
    rl_weight: float = setting(0.1, "weight of the policy loss; both losses are means over the batch", low=0, high=1e6)
    distill: float = setting(
        0.5, "weight of distillation from the network that stage 3 started from, with every block run", low=0, high=1
    )
    batch_norm: str = setting(
        "frozen",
        "statistics of the batch norms: frozen, or reestimate (measured again before each validation)",
        choices=BATCH_NORM_MODES,
    )
    max_accuracy_drop: float = setting(
        0.01, "accuracy that may be lost against stage 1; 0.01 is one percentage point", low=0, high=1
    )
    target_computation: float | None = setting(
        None, "aim at this share of executed FLOPs instead of at the accuracy budget", low=0, high=1
    )
    settle: float = setting(
        0.5,
        "a switch may be fixed at the end if it decides the same for at least this share of validation images",
        low=0.5,
        high=1,
    )

    @property
    def published(self) -> bool:
        return self.recipe == "published"

    def closes(self, epoch: int) -> bool:
        """Whether an epoch, counted from 1, is one of the last, in which the gates are frozen."""
        first = self.epochs - round(self.closing * self.epochs) + 1
        return not self.published and first <= epoch <= self.epochs

    def rates(self, epoch: int) -> list[Callable[[float], float]]:
        """Learning rates of an epoch, of the network and of its gates, or one for both, see ``rates_of_epoch``."""
        bases = [self.lr] if self.published else [self.lr, self.gate_lr]
        return [rates_of_epoch(epoch, self.epochs, base, schedule=self.schedule) for base in bases]

    def __post_init__(self) -> None:
        if self.published and self.target_computation is not None:
            raise UserError(
                "--target_computation steers alpha, but --recipe published keeps it fixed: leave one of them out"
            )


@dataclass(frozen=True)
class Stage:
    """Everything that an epoch needs."""

    run: Run
    settings: Settings
    evaluated: Evaluator  # on the validation images
    val_name: str
    batches: TrainingBatches
    setup: Reinforcement
    steering: Steering
    cost: NetworkCost
    keeper: Keeper

    @property
    def start(self) -> Checkpoint:
        return self.keeper.template

    @property
    def budget(self) -> Budget:
        return self.steering.budget


def main() -> None:
    settings, resume = parse_flags(Settings, "Stage 3: teach the switches to skip blocks.")
    device = pick_device()
    precision = pick_precision(settings.precision, device)
    data = load_data(**settings.data(), download=settings.download)
    parent = stage_folder(settings.result_dir, "rl_pruned", data.name, settings.network, settings.depth)
    last = find_last_run(parent, settings) if resume else None
    start, notes = (last.checkpoint, []) if last else pruned_network(settings, data)
    check_data(start, data, settings.resize)
    splits = split_as_before(data, start.data, resumed=last is not None).to(device)
    start = replace(start, data={**start.data, **splits.identity})
    check_batches(len(splits.train), settings.bs)
    network = placed(start.network(), device)
    cost = network_cost(network, settings.resize)
    floor = start.original["accuracy"] - settings.max_accuracy_drop
    budget = Budget(floor, settings.target_computation, settings.max_accuracy_drop)
    budget.check(cost)
    randomness, normalisation = Randomness(settings.seed, device), start.normaliser()
    batches = TrainingBatches(splits.train, settings.bs, randomness.data, normalisation, start.data["flip"])
    setup = reinforcement(settings, network, cost, randomness, start, precision)
    steering = Steering(
        budget, cost, alpha=settings.alpha, epochs=settings.epochs, steps=len(batches), device=device,
        fixed=settings.published,
    )  # fmt: skip
    evaluated = Evaluator(splits.val, normalisation, settings.resize, precision)

    with open_run(parent, settings, last, resume, POLICY_CHARTS) as run:
        first = f"{run.path} on {device_text(device, precision)}, {splits.place}: starting from {start.source}"
        run.say("\n".join([first, *notes, *splits.notes]))
        progress = Progress(source_weights=weights_digest(start))
        optimisers = dict(zip(("sgd", "adam"), setup.optimisers, strict=False))
        stateful = {"random": randomness, "steering": steering, **optimisers}
        keeper = Keeper(run, start, network, progress, stateful)
        stage = Stage(run, settings, evaluated, splits.val_name, batches, setup, steering, cost, keeper)
        if last:
            keeper.resume(last.checkpoint)
        else:
            begin(stage)
        for epoch in range(progress.step + 1, settings.epochs + 1):
            train_and_judge(stage, epoch)
            keeper.save_last()
        finish(stage, splits.test)


def reinforcement(
    settings: Settings,
    network: ResNet,
    cost: NetworkCost,
    randomness: Randomness,
    start: Checkpoint,
    precision: torch.dtype,
) -> Reinforcement:
    """The network, its optimisers and the loss of stage 3."""
    device, loss_fn = next(network.parameters()).device, None
    momentum, weight_decay = settings.momentum, settings.weight_decay
    if settings.published:
        optimisers = (sgd(network, settings.lr, momentum, weight_decay),)
    else:
        optimisers = reinforcement_optimisers(network, momentum, weight_decay)
        if settings.distill and start.progress.get("step", 0) < settings.epochs:
            teacher = placed(source_of(start, settings.result_dir).network(), device)
            loss_fn = distillation_loss_fn(teacher, settings.distill, precision)
    return Reinforcement(
        network=network,
        optimisers=optimisers,
        shares=cost.shares.to(device),
        draws=randomness.draws,
        gamma=settings.gamma,
        rl_weight=settings.rl_weight,
        published=settings.published,
        frozen_norms=settings.batch_norm == "frozen" and not settings.published,
        loss_fn=loss_fn,
        # Skipped blocks run on another number of images in each batch, and would be compiled again each time.
        forward=training_forward(network, precision, settings.compile and device.type != "cpu"),
    )


def begin(stage: Stage) -> None:
    """Rescale the gates' logits, and keep the given network as the first candidate."""
    network, budget, train = stage.setup.network, stage.budget, stage.batches.images
    start = stage.evaluated(network)
    stage.run.say(
        f"{stage.val_name} accuracy {start.accuracy:.2%}, which may fall to {max(budget.floor, 0):.2%} (stage 1 had "
        f"{stage.start.original['accuracy']:.2%}); computation {start.computation:.1%}"
    )
    if not stage.settings.published:
        pixels = train[evenly_spaced(len(train), RESCALING_IMAGES)].pixels
        rescale_gate_logits(network, stage.batches.normalisation.apply(pixels))
    stage.steering.begin(**start.metrics)
    stage.keeper.offer([*budget.score(**start.metrics), -start.loss], start.metrics)
    stage.keeper.save_last()


def train_and_judge(stage: Stage, epoch: int) -> None:
    """One epoch: train, find the operating point, keep the best network, and plan the next epoch."""
    settings, steering, network = stage.settings, stage.steering, stage.setup.network
    title, closing = f"epoch {epoch:3d}/{settings.epochs}", settings.closes(epoch)
    rates, alpha = settings.rates(epoch), steering.controller()
    if closing:
        train = closing_epoch(stage.setup, stage.batches, rates[0], title)
    else:
        train = reinforce_epoch(stage.setup, stage.batches, rates, alpha, title)
    if settings.batch_norm == "reestimate" and not settings.published:
        reestimate(network, stage.batches, gates=not closing)
    at_half, every_block = stage.evaluated.both(network)
    check_finite(network, at_half, title)
    stage.keeper.progress.step = epoch
    steering.observe(alpha, at_half.computation)
    chosen = offered(stage, at_half, stays=closing)
    compression = stage.start.compression(stage.cost)
    scalars = epoch_scalars(train, chosen, every_block, stage.cost.parameters, compression, rates[0](0.0))
    stage.run.record(epoch, scalars | policy_scalars(train, at_half, steering))
    stage.run.say(policy_line(title, train, chosen, every_block, at_half, stage.val_name))
    stands_at = chosen.metrics
    if not settings.published and stage.keeper.progress.best[0] and stage.budget.lost(chosen.accuracy):
        stands_at = go_back(stage)
    steering.plan(epoch + 1, **stands_at)
    if settings.closes(epoch + 1) and not closing:
        stand_on_best(stage)  # before last.pt is saved: the next epoch may replace best.pt


def offered(stage: Stage, at_half: Evaluation, stays: bool) -> Evaluation:
    """The network at its operating point, a candidate for the best; with ``stays`` it also trains on from there.

    Otherwise its biases are restored, so that the policy continues from where it was.  The published recipe has no
    operating point.
    """
    network, budget, found = stage.setup.network, stage.budget, at_half
    with nullcontext() if stays else gate_biases_restored(network):
        if not stage.settings.published:
            found = find_operating_point(network, stage.evaluated, budget, stage.cost, at_half)
        if stage.keeper.offer([*budget.score(**found.metrics), -found.loss], found.metrics):
            stage.steering.remember(found.computation)
    return found


def reestimate(network: ResNet, batches: TrainingBatches, gates: bool) -> None:
    """Measure the batch norms under thresholded switches.

    Args:
        gates: also those of the gates; without, the gates do not change.
    """
    some = islice(replace(batches, whole=True), REESTIMATION_BATCHES)
    reestimate_batch_norms(network, some, nn.Module.__call__, None if gates else network.gate)


def finish(stage: Stage, test: Images) -> None:
    """Log the choice, draw what its switches do, and report."""
    run, settings, best = stage.run, stage.settings, stage.keeper.best()
    within_budget = best.progress["best"][0]
    met = "the best within the budget" if within_budget else "no epoch met the budget, so the closest one is kept"
    run.say(f"chosen: epoch {best.progress['step']}, {met}")
    if (run.path / BEFORE_FIXING).exists():  # from a run that was interrupted after fixing
        best = load_checkpoint(run.path / BEFORE_FIXING)
    record_routing(run, best, test, stage.budget.floor, stage.setup.device)
    if within_budget and not settings.published:
        best = with_fixed(stage, best)
    chosen = Chosen(best, stage.val_name, within_budget)
    report(settings.result_dir, run, chosen, test, measured_speeds)


def with_fixed(stage: Stage, best: Checkpoint) -> Checkpoint:
    """The chosen network with switches fixed if that saves time, saved in its place."""
    run, network = stage.run, placed(best.network(), stage.setup.device)
    found = fix_switches(network, stage.evaluated, stage.budget, stage.settings.settle)
    if found is not None:
        before, after = found.before, found.after
        run.say(
            f"switches fixed for all images, {fixed_blocks_text(found.network)}: {stage.val_name} accuracy "
            f"{before.accuracy:.2%} -> {after.accuracy:.2%}, computation {before.computation:.1%} -> "
            f"{after.computation:.1%} ({BEFORE_FIXING} has the network before this)"
        )
        save_checkpoint(run.path / BEFORE_FIXING, best)
        weights = {name: tensor.cpu() for name, tensor in found.network.state_dict().items()}
        best = replace(best, architecture=found.network.architecture, weights=weights, metrics=after.metrics)
    save_checkpoint(run.path / BEST, best)
    return best


def go_back(stage: Stage) -> dict[str, float]:
    """After a collapse, continue from the best network; returns its accuracy and computation."""
    stage.run.say(
        f"accuracy is far below {stage.budget.floor:.2%}; going back to the best network (a smaller --lr or "
        f"--batch_norm reestimate may prevent this)"
    )
    stand_on_best(stage)
    stage.steering.go_back()
    return stage.keeper.best().metrics


def stand_on_best(stage: Stage) -> None:
    """Continue from the best network with fresh momentum."""
    stage.setup.network.load_state_dict(stage.keeper.best().weights)
    for optimiser in stage.setup.optimisers:
        optimiser.state.clear()


if __name__ == "__main__":
    run_command(parallel.distributed(main))
