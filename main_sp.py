"""Stage 1: train a CIFAR ResNet together with its switches, supervised.

Cross-entropy through drawn decisions with straight-through gradients; half of the images pass with every switch open.
Writes result_dir/sp/<data set>/<network><depth>/<run>/ and the results table.  The README shows the use.
"""

import argparse
from pathlib import Path

import torch

from gating.forward import training_forward
from gating.supervised import supervised_epoch
from models import GATES, all_on, build_network, check_depth
from utils import parallel
from utils.arguments import NOT_COMPARED, number, training_parser
from utils.checkpoint import Checkpoint, describe, load_checkpoint, save_checkpoint
from utils.data import (
    batch_ends,
    check_batches,
    load_data,
    split_data,
    training_batches,
    training_normalisation,
)
from utils.device import Randomness, pick_device, placed
from utils.errors import run_command
from utils.evaluate import Evaluation, evaluate
from utils.flops import network_cost
from utils.results import report
from utils.run import BEST, LAST, Run, stage_folder
from utils.schedule import scheduled
from utils.training import check_data, check_finite, epoch_scalars, layer_scalars, restore_optimiser, sgd


def parse_arguments() -> argparse.Namespace:
    parser = training_parser("Stage 1: train network and switches together.", epochs=200, lr=0.1, batch_size=128)
    add = parser.add_argument
    add("--width", type=number(int, 1), default=64, help="channels of the first group; the others have 2x and 4x")
    add("--gate", choices=GATES, default="rnn", help="kind of switch: recurrent, two feed-forward kinds, or none")
    add("--val_fraction", type=number(float, 0, below=1), default=0.1, help="share of training images to choose by")
    add("--no_flip", action="store_true", help="do not mirror images (for digits and the like)")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    check_depth(args.depth)  # before the images are read
    device = pick_device()
    torch.manual_seed(args.seed)
    randomness = Randomness(args.seed, device)
    data = load_data(args.data_dir, args.img_type, args.resize, args.num_workers, args.download)
    splits = split_data(data, args.val_fraction, args.seed)
    check_batches(len(splits.train), args.bs)
    normalisation = training_normalisation(splits.train)
    network = build_network(
        args.network, depth=args.depth, num_classes=len(data.classes), width=args.width, gate=args.gate
    )
    network = placed(network, device)
    cost = network_cost(network, args.resize)
    optimiser = sgd(network, args.lr, args.momentum, args.weight_decay)
    first_epoch, best_accuracy = 1, -1.0

    parent = stage_folder(args.result_dir, "sp", data.name, args.network, args.depth)
    if args.resume:
        run, last = Run.resume(parent, vars(args), NOT_COMPARED)
        check_data(last, data, args.resize)
        network.load_state_dict(last.weights)
        restore_optimiser(optimiser, last.training["optimiser"])
        randomness.restore(last.training["random"])
        first_epoch, best_accuracy = last.progress["step"] + 1, last.progress["best_accuracy"]
    else:
        run = Run.new(parent, vars(args))

    def keep(epoch: int, chosen: Evaluation, training: dict | None = None) -> Checkpoint:
        return Checkpoint(
            stage="sp",
            architecture=network.architecture,
            weights=network.state_dict(),
            normalisation=describe(normalisation),
            classes=list(data.classes),
            data={
                "name": data.name,
                "image_size": args.resize,
                "flip": not args.no_flip,
                "val_fraction": args.val_fraction,
                "split_seed": args.seed,
            },
            metrics={"accuracy": chosen.accuracy, "computation": chosen.computation},
            original={"accuracy": chosen.accuracy, "parameters": cost.parameters, "flops": cost.flops},
            seed=args.seed,
            progress={"step": epoch, "best_accuracy": best_accuracy},
            training=training or {},
        )

    def resumable() -> dict:
        return {"optimiser": optimiser.state_dict(), "random": randomness.state()}

    with run:
        splits = splits.to(device)
        run.say(
            f"{run.path} on {device}, {splits.place}: {len(splits.train)} to train, {len(splits.choose)} to choose by"
        )
        run.say(f"{args.network}{args.depth}: {cost.parameters:,} parameters, {cost.flops:,} FLOPs an image")
        steps = len(batch_ends(len(splits.train), args.bs))
        forward = training_forward(network, args.compile)
        if not args.resume:  # an interruption in the first epoch leaves a run to resume, too
            save_checkpoint(run.path / LAST, keep(0, evaluate(network, splits.choose, normalisation), resumable()))

        for epoch in range(first_epoch, args.epochs + 1):
            train = supervised_epoch(
                network,
                training_batches(splits.train, args.bs, randomness.data, normalisation, not args.no_flip),
                steps,
                optimiser,
                lambda share, done=epoch - 1: scheduled(args.schedule, args.lr, (done + share) / args.epochs),
                randomness.draws,
                f"epoch {epoch}/{args.epochs}",
                forward=forward,
            )
            chosen = evaluate(network, splits.choose, normalisation)
            check_finite(network, chosen, f"epoch {epoch}/{args.epochs}")
            whole = evaluate(network, splits.choose, normalisation, all_on)
            rate = scheduled(args.schedule, args.lr, (epoch - 1) / args.epochs)
            scalars = epoch_scalars(train, chosen, whole, cost.parameters, 0.0, rate)
            run.record(epoch, scalars if epoch > 1 else {**scalars, **layer_scalars(network, cost)})
            run.say(
                f"epoch {epoch:3d}/{args.epochs}  loss {train.loss:.4f}  accuracy {train.accuracy:.2%}  "
                f"{splits.chosen_on}: loss {chosen.loss:.4f}  accuracy {chosen.accuracy:.2%} "
                f"(every block {whole.accuracy:.2%})  computation {chosen.computation:.1%}"
            )
            # Without validation images no epoch may be preferred: the last one counts.
            is_best = chosen.accuracy > best_accuracy or splits.chosen_on == "test"
            best_accuracy = max(best_accuracy, chosen.accuracy)
            if is_best:
                save_checkpoint(run.path / BEST, keep(epoch, chosen))
            save_checkpoint(run.path / LAST, keep(epoch, chosen, resumable()))

        chosen_on = "validation" if splits.chosen_on == "validation" else "last epoch"
        report(Path(args.result_dir), run, load_checkpoint(run.path / BEST), splits.test, chosen_on, device)


if __name__ == "__main__":
    run_command(parallel.joined(main))
