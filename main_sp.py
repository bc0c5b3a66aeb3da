"""Stage 1: train a CIFAR ResNet together with its switches, supervised.

Cross-entropy through drawn decisions with straight-through gradients; half of the images run every block.
Writes result_dir/sp/<data set>/<network><depth>/<run>/ and the results table.  The README shows the use.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from utils.interruptions import prepare

    prepare()

from dataclasses import dataclass

import torch

from deploy.speeds import measured_speeds
from models import GATES, build_network
from training.evaluate import Evaluator, check_finite
from training.forward import training_forward
from training.norms import placed
from training.optimisers import OPTIMISERS, rates_of_epoch
from training.report import Chosen, report
from training.scalars import EPOCH_CHARTS, epoch_line, epoch_scalars
from training.supervised import Supervision, supervised_epoch
from utils import parallel
from utils.data.batches import (
    Splits,
    TrainingBatches,
    check_batches,
    split_as_before,
    split_data,
    training_normalisation,
)
from utils.data.folder import DataSet, load_data
from utils.device import Randomness, device_text, pick_device, pick_precision
from utils.errors import run_command
from utils.flops import network_cost
from utils.runs.checkpoint import check_data, first_checkpoint
from utils.runs.keeper import Keeper, Progress
from utils.runs.run import LastRun, find_last_run, open_run, stage_folder
from utils.settings import MOST_CHANNELS, TrainingSettings, parse_flags, setting


@dataclass(frozen=True, kw_only=True)
class Settings(TrainingSettings):
    """The flags of stage 1."""

    width: int = setting(64, "channels of the first group; the others have 2x and 4x", low=1, high=MOST_CHANNELS)
    gate: str = setting(
        "rnn", "kind of switch: rnn (one LSTM for all), ff1, ff2 (small convolutional networks) or none", choices=GATES
    )
    optimiser: str = setting(
        "muon",
        "muon: orthogonal steps for filters, SGD for everything else; sgd: SGD for all; both use lr and momentum",
        choices=tuple(OPTIMISERS),
    )
    val_fraction: float = setting(
        0.1, "share of the training images set aside as validation images; 0: none", low=0, below=1
    )
    no_flip: bool = setting(False, "do not mirror images in training, for example for digits")


def main() -> None:
    settings, resume = parse_flags(Settings, "Stage 1: train network and switches together.")
    device = pick_device()
    precision = pick_precision(settings.precision, device)
    torch.manual_seed(settings.seed)
    randomness = Randomness(settings.seed, device)
    data = load_data(**settings.data(), download=settings.download)
    parent = stage_folder(settings.result_dir, "sp", data.name, settings.network, settings.depth)
    last = find_last_run(parent, settings) if resume else None
    splits = split_for(settings, data, last)
    check_batches(len(splits.train), settings.bs)
    normalisation = training_normalisation(splits.train)
    network = build_network(
        settings.network, depth=settings.depth, num_classes=len(data.classes), width=settings.width, gate=settings.gate
    )
    network = placed(network, device)
    cost = network_cost(network, settings.resize)
    optimiser = OPTIMISERS[settings.optimiser](network, settings.lr, settings.momentum, settings.weight_decay)

    with open_run(parent, settings, last, resume, EPOCH_CHARTS) as run:
        splits = splits.to(device)
        run.say(
            f"{run.path} on {device_text(device, precision)}, {splits.place}: {len(splits.train):,} training images, "
            f"{len(splits.val):,} {splits.val_name} images"
        )
        for note in splits.notes:
            run.say(note)
        run.say(f"{settings.network}{settings.depth}: {cost.parameters:,} parameters, {cost.flops:,} FLOPs per image")
        progress = Progress()
        start = first_checkpoint(settings, network, data, splits, normalisation, cost)
        keeper = Keeper(run, start, network, progress, {"optimiser": optimiser, "random": randomness})
        if last:
            keeper.resume(last.checkpoint)
        else:
            keeper.save_last()  # so that a run interrupted in its first epoch can be resumed
        batches = TrainingBatches(splits.train, settings.bs, randomness.data, normalisation, not settings.no_flip)
        forward = training_forward(network, precision, settings.compile)
        training = Supervision(network=network, optimiser=optimiser, draws=randomness.draws, forward=forward)
        evaluated = Evaluator(splits.val, normalisation, settings.resize, precision)

        for epoch in range(progress.step + 1, settings.epochs + 1):
            rate = rates_of_epoch(epoch, settings.epochs, settings.lr, schedule=settings.schedule)
            title = f"epoch {epoch:3d}/{settings.epochs}"
            train = supervised_epoch(training, batches, rate, title)
            val, every_block = evaluated.both(network)
            check_finite(network, val, title)
            scalars = epoch_scalars(train, val, every_block, cost.parameters, 0.0, rate(0.0))
            run.record(epoch, scalars)
            run.say(epoch_line(title, train, val, every_block, splits.val_name))
            progress.step = epoch
            # Without validation images no epoch can be selected: the last one counts.
            keeper.offer([epoch] if splits.val_is_test else val.score, val.metrics)
            keeper.save_last()

        selected_on = "last epoch" if splits.val_is_test else "validation"
        report(settings.result_dir, run, Chosen(keeper.best(), selected_on), splits.test, measured_speeds)


def split_for(settings: Settings, data: DataSet, last: LastRun | None) -> Splits:
    """The split of a new run, or that of the interrupted one."""
    if last is None:
        return split_data(data, settings.val_fraction, settings.seed)
    check_data(last.checkpoint, data, settings.resize)
    return split_as_before(data, last.checkpoint.data, resumed=True)


if __name__ == "__main__":
    run_command(parallel.distributed(main))
