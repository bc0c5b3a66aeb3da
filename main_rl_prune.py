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

from deploy.speeds import measured_speeds
from gating.baselines import BASELINES
from gating.operating_point import find_operating_point, gate_biases_restored
from gating.reinforce import Reinforcement, closing_epoch, reinforce_epoch
from gating.routing import record_routing
from gating.scalars import POLICY_CHARTS, policy_line, policy_scalars
from gating.settle import UNSETTLED, description, settle
from gating.steering import Budget, Steering
from gating.temperature import rescale_gate_logits
from models import ResNet, all_on, thresholded
from training.distillation import distillation_loss_fn
from training.evaluate import Evaluation, check_finite, evaluate
from training.forward import training_forward
from training.norms import BATCH_NORM_MODES, placed, reestimate_batch_norms
from training.optimisers import rates_of_epoch, reinforcement_optimisers
from training.report import report
from training.scalars import epoch_scalars, layer_scalars
from utils import parallel
from utils.data.batches import Splits, TrainingBatches, check_batches, split_as_before
from utils.data.folder import load_data
from utils.data.images import evenly_spaced
from utils.device import Randomness, described, pick_device, pick_precision
from utils.errors import UserError, run_command
from utils.flops import NetworkCost, network_cost
from utils.runs.checkpoint import Checkpoint, check_data, load_checkpoint, save_checkpoint
from utils.runs.keeper import Keeper, Progress
from utils.runs.predecessors import pruned_network, source_path
from utils.runs.run import BEST, Run, find_last_run, open_run, stage_folder
from utils.settings import TrainingSettings, parse_flags, setting, with_default

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
    checkpoint: str = setting("", "network to start from; empty: the smallest of stage 2 within the budget")
    alpha: float = setting(0.1, "reward for skipping everything, in nats of cross-entropy", low=0)
    fixed_alpha: bool = setting(False, "keep alpha as given; by default it is steered by the budget")
    gamma: float = setting(1.0, "discount of what follows a decision", low=0, high=1)
    closing: float = setting(
        0.33, "share of the epochs, the last ones, in which the switches stay as they are and the network adapts",
        low=0, high=1,
    )  # fmt: skip
    gate_lr: float = setting(0.01, "learning rate of the gates at the start, of Adam", low=0)
    rl_weight: float = setting(0.1, "weight of the policy loss beside the cross-entropy", low=0)
    distill: float = setting(0.5, "weight of following the predictions of the network it starts from", low=0, high=1)
    baseline: str = setting("greedy", "what a return is compared with", choices=BASELINES)
    batch_norm: str = setting(
        "frozen",
        "batch norms in training: frozen, reestimate (anew before each validation), or follow (as published)",
        choices=BATCH_NORM_MODES,
    )
    max_accuracy_drop: float = setting(0.01, "accuracy that may be lost against stage 1", low=0, high=1)
    target_computation: float | None = setting(
        None, "share of the FLOPs to execute, instead of the accuracy budget", low=0, high=1
    )
    settle: float = setting(
        0.5,
        "share of images that a switch has to decide alike for, to be fixed at the end where that pays",
        low=0.5,
        high=1,
    )

    def closes(self, epoch: int) -> bool:
        """Whether an epoch, counted from 1, is one of the last in which the switches stay as they are."""
        return self.epochs - round(self.closing * self.epochs) < epoch <= self.epochs

    def rates(self, epoch: int) -> list[Callable[[float], float]]:
        """Learning rates of an epoch, of the network and of its gates, see ``rates_of_epoch``."""
        return [rates_of_epoch(epoch, self.epochs, base, schedule=self.schedule) for base in (self.lr, self.gate_lr)]

    def __post_init__(self) -> None:
        if self.fixed_alpha and self.target_computation is not None:
            raise UserError(
                "--target_computation is reached by steering alpha, which --fixed_alpha forbids: drop one of them"
            )


def main() -> None:
    settings, resume = parse_flags(Settings, "Stage 3: teach the switches to skip blocks.")
    device = pick_device()
    precision = pick_precision(settings.precision, device)
    data = load_data(settings.data_dir, settings.img_type, settings.resize, settings.num_workers, settings.download)
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
        fixed=settings.fixed_alpha,
    )  # fmt: skip

    with open_run(parent, settings, last, resume, POLICY_CHARTS) as run:
        first = f"{run.path} on {described(device, precision)}, {splits.place}: starting from {start.source}"
        run.say("\n".join([first, *notes, *splits.notes]))
        progress = Progress()
        stateful = {"random": randomness, "steering": steering, "sgd": setup.optimisers[0], "adam": setup.optimisers[1]}
        keeper = Keeper(run, start, network, progress, stateful)
        if last:
            keeper.resume(last.checkpoint)
        else:
            begin(run, keeper, steering, splits, cost, precision)

        for epoch in range(progress.step + 1, settings.epochs + 1):
            rates = settings.rates(epoch)
            title, alpha, closing = f"epoch {epoch:3d}/{settings.epochs}", steering.controller(), settings.closes(epoch)
            if closing:
                train = closing_epoch(setup, batches, rates[0], title)
            else:
                train = reinforce_epoch(setup, batches, rates, alpha, title)
            if settings.batch_norm == "reestimate":
                reestimate(network, batches)
            at_half = evaluate(network, splits.val, normalisation, cost, precision=precision)
            check_finite(network, at_half, title)
            every_block = evaluate(network, splits.val, normalisation, cost, all_on, precision=precision)
            progress.step = epoch
            steering.observe(alpha, at_half.computation)
            at_operating_point = offered(keeper, steering, splits, cost, at_half, settings, precision, closing)
            scalars = epoch_scalars(
                train, at_operating_point, every_block, cost.parameters, start.compression(cost), rates[0](0.0)
            )
            run.record(epoch, scalars | policy_scalars(train, at_half, steering))
            run.say(policy_line(title, train, at_operating_point, every_block, at_half, splits.val_name))
            stands_at = at_operating_point.metrics
            if not settings.fixed_alpha and progress.best[0] and budget.lost(at_operating_point.accuracy):
                stands_at = go_back(run, keeper, steering, setup, budget)
            steering.plan(epoch + 1, **stands_at)
            if settings.closes(epoch + 1) and not closing:
                stand_on_best(keeper, setup)  # before last.pt is saved: the next epoch may replace best.pt
            keeper.save_last()

        finish(run, keeper.best(), splits, budget, settings, device, precision)


def reinforcement(
    settings: Settings,
    network: ResNet,
    cost: NetworkCost,
    randomness: Randomness,
    start: Checkpoint,
    precision: torch.dtype,
) -> Reinforcement:
    """What stage 3 trains and how."""
    device, loss_fn = next(network.parameters()).device, None
    if settings.distill:
        origin = load_checkpoint(source_path(start.source, settings.result_dir))
        loss_fn = distillation_loss_fn(placed(origin.network(), device).eval(), settings.distill, precision)
    return Reinforcement(
        network=network,
        optimisers=reinforcement_optimisers(network, settings.momentum, settings.weight_decay),
        shares=cost.shares,
        draws=randomness.draws,
        gamma=settings.gamma,
        rl_weight=settings.rl_weight,
        baseline=settings.baseline,
        batch_norm=settings.batch_norm,
        loss_fn=loss_fn,
        # Where blocks are skipped their images differ from batch to batch: no compiled code keeps up.
        forward=training_forward(network, precision, settings.compile and device.type != "cpu"),
    )


def begin(
    run: Run, keeper: Keeper, steering: Steering, splits: Splits, cost: NetworkCost, precision: torch.dtype
) -> None:
    """Rescale the gates' logits, and keep the network as it came: it is the first candidate."""
    network, normalisation, budget = keeper.network, keeper.described.normaliser(), steering.budget
    start = evaluate(network, splits.val, normalisation, cost, precision=precision)
    run.say(
        f"{splits.val_name} accuracy {start.accuracy:.2%}, budget at least {max(budget.floor, 0):.2%} (stage 1 had "
        f"{keeper.described.original['accuracy']:.2%}); computation {start.computation:.1%}"
    )
    rescale_gate_logits(
        network, normalisation.apply(splits.train[evenly_spaced(len(splits.train), RESCALING_IMAGES)].pixels)
    )
    run.record(0, {}, **layer_scalars(network, cost))
    steering.begin(**start.metrics)
    keeper.offer(budget.score(start.accuracy, start.computation), start.metrics)
    keeper.save_last()


def offered(
    keeper: Keeper, steering: Steering, splits: Splits, cost: NetworkCost, at_half: Evaluation, settings: Settings,
    precision: torch.dtype, stays: bool,
) -> Evaluation:  # fmt: skip
    """The network at its operating point, which may be kept as the best; where it ``stays`` there, it trains on there.

    Otherwise its switches then stand as before, so that the policy goes on from where it was.
    """
    network, budget = keeper.network, steering.budget
    with nullcontext() if stays else gate_biases_restored(network):
        if settings.fixed_alpha:
            found = at_half
        else:
            normalisation = keeper.described.normaliser()
            found = find_operating_point(network, splits.val, normalisation, budget, cost, at_half, precision)
        if keeper.offer(budget.score(found.accuracy, found.computation), found.metrics):
            steering.remember(found.computation)
    return found


def reestimate(network: ResNet, batches: TrainingBatches) -> None:
    """Measure the batch norms under thresholded switches, each process on batches of its own."""
    whole = iter(replace(batches, whole=True))
    dealt = islice(whole, parallel.rank(), REESTIMATION_BATCHES, parallel.world_size())
    reestimate_batch_norms(network, dealt, thresholded)


def finish(
    run: Run, best: Checkpoint, splits: Splits, budget: Budget, settings: Settings, device: torch.device,
    precision: torch.dtype,
) -> None:  # fmt: skip
    """Say what was chosen, draw what its switches do, and report."""
    within_budget = best.progress["best"][0]
    met = "the best within the budget" if within_budget else "the nearest to the budget, which no epoch met"
    run.say(f"chosen: epoch {best.progress['step']}, {met}")
    if (run.path / UNSETTLED).exists():  # a run that was interrupted below has fixed switches before
        best = load_checkpoint(run.path / UNSETTLED)
    cost = network_cost(best.network(), settings.resize)
    record_routing(run, best, splits.test, cost, budget.floor, device)
    if within_budget:
        best = settled(run, best, splits, budget, settings, device, precision)
    report(
        settings.result_dir, run, best, splits.test, splits.val_name, device, measured_speeds,
        within_budget=within_budget,
    )  # fmt: skip


def settled(
    run: Run, best: Checkpoint, splits: Splits, budget: Budget, settings: Settings, device: torch.device,
    precision: torch.dtype,
) -> Checkpoint:  # fmt: skip
    """The chosen network with its switches fixed where that pays, saved in its place; as it is where it does not."""
    network, normalisation = placed(best.network(), device), best.normaliser()
    found = settle(network, splits.val, settings.resize, normalisation, budget, settings.settle, precision)
    if found is not None:
        before, after = found.before, found.after
        run.say(
            f"switches fixed to what they mostly decide, {description(found.network)}: {splits.val_name} accuracy "
            f"{before.accuracy:.2%} -> {after.accuracy:.2%}, computation {before.computation:.1%} -> "
            f"{after.computation:.1%} ({UNSETTLED} has the network as it was)"
        )
        save_checkpoint(run.path / UNSETTLED, best)
        weights = {name: tensor.cpu() for name, tensor in found.network.state_dict().items()}
        best = replace(best, architecture=found.network.architecture, weights=weights, metrics=after.metrics)
    save_checkpoint(run.path / BEST, best)
    return best


def go_back(run: Run, keeper: Keeper, steering: Steering, setup: Reinforcement, budget: Budget) -> dict[str, float]:
    """After a collapse: train on from the best network; its accuracy and computation."""
    run.say(
        f"accuracy is far below {budget.floor:.2%}: back to the best network (a smaller --lr or "
        f"--batch_norm reestimate may prevent this)"
    )
    stand_on_best(keeper, setup)
    steering.go_back()
    return keeper.best().metrics


def stand_on_best(keeper: Keeper, setup: Reinforcement) -> None:
    """Train on from the best network, without the momentum that led away from it."""
    setup.network.load_state_dict(keeper.best().weights)
    for optimiser in setup.optimisers:
        optimiser.state.clear()


if __name__ == "__main__":
    run_command(parallel.distributed(main))
