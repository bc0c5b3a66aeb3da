"""Networks other than ResNets: trained, compressed and fine-tuned for a few epochs on images of 32x32 pixels.

    python -m benchmarks.architectures --data_dir data/cifar10 --out architectures

Every network is trained on all training images, compressed in one step and fine-tuned with distillation.  As a control,
the unpruned network is fine-tuned in the same way.  The last epoch counts, on all test images.  A line for each network
is added to OUT.jsonl; those that are there already are left out.
"""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torchvision.models import DenseNet, MobileNetV2, VisionTransformer

from benchmarks.common import append_line, beside, machine, read_lines
from models import OwnNetwork, allow
from pruning import compress
from training.distillation import distillation_loss_fn
from training.evaluate import Evaluator
from training.forward import training_forward
from training.norms import placed
from training.optimisers import rates_of_epoch, sgd
from training.supervised import LossFn, Supervision, supervised_epoch
from utils.data.batches import Splits, TrainingBatches, plain_batches, split_data, training_normalisation
from utils.data.folder import load_data
from utils.device import PRECISIONS, pick_device, pick_precision
from utils.errors import run_command
from utils.settings import image_type, number

CLASSES = 10


def vgg() -> nn.Module:
    """Eight convolutions in a row, without batch norms."""
    layers, inputs = [], 3
    for outputs in (32, 32, 0, 64, 64, 0, 128, 128, 0, 128, 128):
        if not outputs:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
        nn.init.kaiming_normal_(layers[-2].weight)
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))


def densenet() -> nn.Module:
    """torchvision's, whose layers read the outputs of all layers before, without the first two strides."""
    network = DenseNet(12, (3, 4, 6), 24, num_classes=CLASSES)
    network.features.conv0, network.features.pool0 = nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.Identity()
    return network


def mobilenet() -> nn.Module:
    """torchvision's MobileNetV2, smaller: depthwise and 1x1 convolutions."""
    blocks = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 3, 2]]
    return MobileNetV2(CLASSES, inverted_residual_setting=blocks)


def vit() -> nn.Module:
    """torchvision's vision transformer on patches of 4x4 pixels."""
    return VisionTransformer(32, 4, num_layers=5, num_heads=3, hidden_dim=96, mlp_dim=192, num_classes=CLASSES)


NETWORKS = {"vgg": vgg, "densenet": densenet, "mobilenet": mobilenet, "vit": vit}


def main() -> None:
    args = parse_arguments()
    device = pick_device()
    data = load_data(args.data_dir, args.img_type, 32, 2)
    splits = split_data(data, 0.0, seed=0).to(device)
    out = beside(args.out, ".jsonl")
    for name in args.networks:
        if name not in {line["network"] for line in read_lines(out)}:
            append_line(out, {**measured(name, splits, device, args), "machine": machine()})
    print(table(read_lines(out)))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compress networks other than ResNets.", allow_abbrev=False)
    add = parser.add_argument
    add("--data_dir", required=True, help="data folder")
    add("--img_type", type=image_type, default="png", help="image files to read")
    add("--networks", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS))
    add("--epochs", type=number(int, 1), default=8, help="epochs of training")
    add("--fine_tuning", type=number(int, 1), default=2, help="epochs of fine-tuning")
    add("--flops", type=float, default=0.5, help="share of the FLOPs to keep")
    add("--images", type=number(int, 2), default=2000, help="training images that compress measures")
    add("--precision", choices=PRECISIONS, default="auto")
    add("--out", type=Path, required=True, help="path of the results, without .jsonl")
    return parser.parse_args()


def measured(name: str, splits: Splits, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """Train, compress and fine-tune one network."""
    source = f"benchmarks.architectures:{name}"
    allow(source)
    torch.manual_seed(0)
    normalisation = training_normalisation(splits.train)
    accuracy = Evaluator(splits.test, normalisation, 32)
    precision = pick_precision(args.precision, device)

    def train(network: OwnNetwork, epochs: int, optimiser: Optimizer, rate: float, loss_fn: LossFn | None) -> float:
        draws = torch.Generator(device).manual_seed(0)
        forward = training_forward(network, precision)
        training = Supervision(network=network, optimiser=optimiser, draws=draws, loss_fn=loss_fn, forward=forward)
        batches = TrainingBatches(splits.train, 128, torch.Generator().manual_seed(0), normalisation, flip=True)
        for epoch in range(1, epochs + 1):
            rates = rates_of_epoch(epoch, epochs, rate, "cosine")
            supervised_epoch(training, batches, rates, f"{name} epoch {epoch}/{epochs}")
        return accuracy(network).accuracy

    network = placed(OwnNetwork(source, CLASSES), device)
    optimiser, rate = optimiser_of(name, network)
    found = {"network": name, "epochs": args.epochs, "accuracy": train(network, args.epochs, optimiser, rate, None)}
    some = splits.train[torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(0))[: args.images]]
    smaller, control = copy.deepcopy(network), copy.deepcopy(network)
    smaller.network = compress(
        network.network, lambda: plain_batches(some, 128, normalisation), flops=args.flops, say=print
    )
    report = smaller.network.report
    found |= {"flops": report.flops, "parameters": report.parameters, "compressed": accuracy(smaller).accuracy}
    found["fine_tuning"] = args.fine_tuning
    for key, own in (("fine_tuned", smaller), ("control", control)):
        optimiser, rate = optimiser_of(name, own)
        loss_fn = distillation_loss_fn(network, 0.5, precision)
        found[key] = train(own, args.fine_tuning, optimiser, rate / 10, loss_fn)
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each network."""
    head = [
        "| network | MFLOPs | trained | FLOPs left | parameters left | compressed | fine-tuned | control |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *map(_line, rows)])


def _line(row: dict[str, Any]) -> str:
    (flops, fewer), (parameters, less) = row["flops"], row["parameters"]
    accuracies = [f"{row[key]:.2%}" for key in ("compressed", "fine_tuned", "control")]
    cells = [row["network"], f"{flops / 1e6:.1f}", f"{row['accuracy']:.2%}", f"{fewer / flops:.1%}"]
    return f"| {' | '.join([*cells, f'{less / parameters:.1%}', *accuracies])} |"


def optimiser_of(name: str, network: OwnNetwork) -> tuple[Optimizer, float]:
    """The optimiser, and the learning rate of training."""
    if name == "vit":
        return AdamW(network.parameters(), 0.0, weight_decay=0.05), 1e-3
    return sgd(network, 0.0, 0.9, 5e-4), 0.02 if name == "vgg" else 0.1


if __name__ == "__main__":
    run_command(main, goes_on="the same command")
