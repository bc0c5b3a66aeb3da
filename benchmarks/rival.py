"""Torch-Pruning on a ResNet that others trained, with the images, the schedule and the distillation of stage 2.

    python -m benchmarks.rival --weights data/networks/resnet56.th --data_dir data/cifar10 --share 0.25 --epochs 6 \\
        --out rival

The trained network is pruned in one step and fine-tuned in one schedule.  The last epoch counts, on all test images.
A line is added to OUT.jsonl.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import append_line, beside, machine
from benchmarks.competitor import IMPORTANCES, torch_pruned
from models import ResNet, build_network
from training.distillation import distillation_loss_fn
from training.evaluate import Evaluator
from training.forward import training_forward
from training.norms import placed, reestimate_batch_norms
from training.optimisers import rates_of_epoch, sgd
from training.supervised import Supervision, supervised_epoch
from utils.data.augment import Normalisation
from utils.data.batches import TrainingBatches, plain_batches, split_data
from utils.data.folder import load_data
from utils.device import PRECISIONS, pick_device, pick_precision
from utils.errors import run_command
from utils.flops import every_block, network_cost
from utils.settings import image_type

NORMALISATION = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
IMAGES = 2000  # for importances and for the statistics of batch norms


def main() -> None:
    parser = argparse.ArgumentParser(description="Prune a pretrained network with Torch-Pruning.", allow_abbrev=False)
    add = parser.add_argument
    add("--weights", type=Path, required=True, help="file of akamaster/pytorch_resnet_cifar10")
    add("--depth", type=int, default=56, help="depth of the network")
    add("--data_dir", required=True, help="data folder")
    add("--img_type", type=image_type, default="png", help="image files to read")
    add("--share", type=float, required=True, help="share of the FLOPs to keep")
    add("--importance", choices=IMPORTANCES, default="Hessian")
    add("--epochs", type=int, required=True, help="epochs of fine-tuning")
    add("--lr", type=float, default=0.01, help="learning rate of the first epoch")
    add("--precision", choices=PRECISIONS, default="auto")
    add("--out", type=Path, required=True, help="path of the results, without .jsonl")
    args = parser.parse_args()
    device = pick_device()
    precision = pick_precision(args.precision, device)
    splits = split_data(load_data(args.data_dir, args.img_type, 32, 2), 0.0, seed=0).to(device)
    trained = placed(imported(args.weights, args.depth, len(splits.test.labels.unique())), device)
    measured = Evaluator(splits.test, NORMALISATION, 32)
    some = splits.train[torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(0))[:IMAGES]]
    batches = list(plain_batches(some, 128, NORMALISATION))
    target = args.share * network_cost(trained, 32).flops
    smaller = placed(torch_pruned(trained, args.importance, target, 32, batches), device)
    reestimate_batch_norms(smaller, batches, every_block)
    before, cost = measured(smaller).accuracy, network_cost(smaller, 32)
    training = Supervision(
        network=smaller, optimiser=sgd(smaller, args.lr, 0.9, 5e-4), draws=torch.Generator(device).manual_seed(0),
        loss_fn=distillation_loss_fn(trained.eval(), 0.5, precision), forward=training_forward(smaller, precision),
    )  # fmt: skip
    train = TrainingBatches(splits.train, 128, torch.Generator().manual_seed(0), NORMALISATION, flip=True)
    for epoch in range(1, args.epochs + 1):
        rate = rates_of_epoch(epoch, args.epochs, args.lr, schedule="cosine")
        supervised_epoch(training, train, rate, f"{args.share:.1%} epoch {epoch}/{args.epochs}")
    found = {"share": args.share, "gflops": cost.flops / 1e9, "parameters": cost.parameters, "epochs": args.epochs}
    found |= {"before_fine_tuning": before, "accuracy": measured(smaller).accuracy}
    print(json.dumps(found))
    append_line(beside(args.out, ".jsonl"), {**found, "importance": args.importance, "machine": machine()})


def imported(path: Path, depth: int, classes: int) -> ResNet:
    """The network of the file as ours: its shortcuts as 1x1 convolutions that select, behind norms that do nothing.

    Torch-Pruning cannot follow shortcuts that pad with zeros.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    given = {name.removeprefix("module."): weight for name, weight in content.items()}
    network = build_network("resnet", depth=depth, num_classes=classes, width=16, gate="none").eval()
    count = (depth - 2) // 6
    with torch.no_grad():
        for name, own in network.state_dict().items():
            if ".shortcut.0." in name:
                own.copy_(selecting(own.shape))
            elif ".shortcut." not in name and not name.endswith("num_batches_tracked"):
                own.copy_(given[their_name(name, count)])
        for block in network.blocks:
            if block.shortcut is not None:
                block.shortcut[1].running_var.sub_(block.shortcut[1].eps)
    return network


def their_name(name: str, count: int) -> str:
    """The name of a weight in the file; ``count`` blocks make a group."""
    first, _, rest = name.partition(".")
    if first == "blocks":
        number, _, rest = rest.partition(".")
        return f"layer{int(number) // count + 1}.{int(number) % count}.{rest}"
    return {"stem.0": "conv1", "stem.1": "bn1"}.get(name[:6], "linear") + name[name.rindex(".") :]


def selecting(shape: torch.Size) -> Tensor:
    """The kernel [out, in, 1, 1] that passes channels on between equal numbers of channels of zeros."""
    kernel = torch.zeros(shape)
    before = (shape[0] - shape[1]) // 2
    kernel[before : before + shape[1], :, 0, 0] = torch.eye(shape[1])
    return kernel


if __name__ == "__main__":
    run_command(main, goes_on=None)
