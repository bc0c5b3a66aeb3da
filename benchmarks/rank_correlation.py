"""Rank correlation between the predicted and the measured rise of the loss over single directions.

Method: directions are drawn at random from all layers and sides of the eigenbasis; each is projected out of its layer's
weight on its own, and the loss is measured on the same images that the Fisher was measured on, switches all on.  Two
rises are given: of the cross-entropy with the data's labels, and of the divergence from the network's own prediction,
for which the network stands at a minimum and the Fisher is the Hessian.  Claim: 0.9 or better with EK-FAC.

    python -m benchmarks.rank_correlation --checkpoint best.pt --data_dir data/cifar_10 --out results/rank_correlation
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from scipy.stats import spearmanr
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.common import Trained, add_trained_arguments, beside, load_trained, machine
from models import all_on
from pruning.eigenbasis import curvature, eigenbasis, eigendamage, gradient_squares, rotate
from pruning.factors import collect_factors
from pruning.layers import prunable_layers
from utils.data.batches import plain_batches
from utils.errors import run_command

PREDICTORS = ("EK-FAC", "K-FAC", "magnitude")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Predicted against measured rise of the loss.", allow_abbrev=False)
    add_trained_arguments(parser)
    parser.add_argument("--directions", type=int, default=240)
    parser.add_argument("--images", type=int, default=2000, help="training images for the Fisher and for the loss")
    parser.add_argument("--fisher_draws", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="rank_correlation", help="path of the results, without .json and .png")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    points = measure(args, load_trained(args))
    correlations = {
        predictor: {
            rise: float(spearmanr([p[predictor] for p in points], [p[rise] for p in points]).statistic)
            for rise in ("loss_rise", "divergence")
        }
        for predictor in PREDICTORS
    }
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(), "settings": vars(args), "correlations": correlations, "points": points}
    beside(out, ".json").write_text(json.dumps(content, indent=2))
    draw(beside(out, ".png"), points, correlations)
    print("| Spearman correlation with | rise of the loss | divergence from the prediction |\n|---|---|---|")
    for predictor, values in correlations.items():
        print(f"| {predictor} | {values['loss_rise']:.3f} | {values['divergence']:.3f} |")


def measure(args: argparse.Namespace, trained: Trained) -> list[dict]:
    """Predicted and measured rises of each direction that was drawn."""
    network = trained.network().eval()
    choice = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(trained.splits.train), generator=choice)[: args.images]
    images = trained.splits.train[order]

    def batches():
        return plain_batches(images, args.batch_size, trained.normalisation)

    draws = torch.Generator(trained.device).manual_seed(args.seed)
    layers = prunable_layers(network)
    factors = collect_factors(network, layers, batches(), "true", draws, args.fisher_draws)
    bases = {name: eigenbasis(factors[name]) for name in layers}
    spectra = gradient_squares(network, layers, bases, batches(), "true", draws, args.fisher_draws)
    logits = torch.cat([_logits(network, x) for x, _ in batches()])
    labels = images.labels.to(logits.device)
    loss = F.cross_entropy(logits, labels).item()
    sides = [(name, side, size) for name, layer in layers.items() for side, size in enumerate(layer.weight.shape[:2])]
    every = [(name, side, i) for name, side, size in sides for i in range(size)]
    picked = torch.randperm(len(every), generator=choice)[: args.directions].tolist()
    points = []
    for name, side, i in tqdm([every[k] for k in sorted(picked)], "directions", disable=None):
        layer, basis = layers[name], bases[name]
        weight = layer.weight.detach().clone()
        rotated = rotate(weight, basis)
        point = {"layer": name, "side": ("output", "input")[side], "direction": i}
        for predictor, s in zip(
            PREDICTORS, (spectra[name], curvature(basis, weight), torch.ones_like(rotated)), strict=True
        ):
            saliency = eigendamage(rotated, s, 0.0)
            point[predictor] = (saliency.rows, saliency.columns)[side][i].item()
        q = (basis.Q_g, basis.Q_a)[side][:, i].to(weight)
        removed = torch.tensordot(weight, q, dims=([side], [0]))
        outer = torch.einsum("o,ihw->oihw" if side == 0 else "i,ohw->oihw", q, removed)
        with torch.no_grad():
            layer.weight.copy_(weight - outer)
            changed = torch.cat([_logits(network, x) for x, _ in batches()])
            layer.weight.copy_(weight)
        point["loss_rise"] = F.cross_entropy(changed, labels).item() - loss
        point["divergence"] = F.kl_div(
            changed.log_softmax(1), logits.log_softmax(1), reduction="batchmean", log_target=True
        ).item()
        points.append(point)
    return points


@torch.no_grad()
def _logits(network, x) -> torch.Tensor:
    return network(x, decide=all_on, skip=False).logits.double()


def draw(path: Path, points: list[dict], correlations: dict) -> None:
    figure, axes = plt.subplots(1, len(PREDICTORS), sharey=True, figsize=(11, 3.8), layout="constrained")
    for axis, predictor in zip(axes, PREDICTORS, strict=True):
        shown = [p for p in points if p[predictor] > 0 and p["divergence"] > 0]
        axis.loglog([p[predictor] for p in shown], [p["divergence"] for p in shown], ".", alpha=0.6)
        axis.set_title(f"{predictor}: Spearman {correlations[predictor]['divergence']:.3f}", fontsize=10)
        axis.set_xlabel("predicted rise, nats" if predictor != "magnitude" else "squared norm / 2")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("measured divergence, nats")
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    run_command(main, goes_on=None)
