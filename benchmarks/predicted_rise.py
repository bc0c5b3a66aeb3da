"""Predicted against measured rise of the loss: over the forms of layers, and over shares of the FLOPs.

Method: for each form and share of FLOPs the network is pruned at once, nothing is refitted or measured again, and the
divergence from the unpruned network's prediction is measured on the images that the Fisher was measured on: for it the
network stands at a minimum, and the prediction is its second order.  Two predictions are given: the sum over layers of
what each brings alone, and that of all of them together, which is the one reported.  Finished measurements are kept in
OUT.jsonl, so a run that is started again with the same arguments continues.

    python -m benchmarks.predicted_rise --checkpoint best.pt --data_dir data/cifar_10 --out results/predicted_rise
"""

import argparse
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from scipy.stats import spearmanr
from torch.nn import functional as F

from benchmarks.common import append_line, beside, machine, read_lines
from models import all_on
from pruning.compress import prune_once
from pruning.goals import Goal
from pruning.settings import Method
from training.norms import placed
from utils.data.batches import plain_batches, split_as_before
from utils.data.folder import load_data
from utils.data.images import Images
from utils.device import pick_device
from utils.errors import UserError, run_command
from utils.files import write_json
from utils.flops import every_block, network_cost
from utils.runs.checkpoint import Checkpoint, check_data, load_checkpoint
from utils.settings import image_type

BASE = Method(prune_ratio_limit=0.97, objective="flops", round_to=1, refit=False)
FORMS = {
    "truncated": replace(BASE, decomposition="truncate"),
    "Tucker": replace(BASE, decomposition="tucker"),
    "depthwise": replace(BASE, decomposition="depthwise"),
    "best": replace(BASE, decomposition="best"),
    "channels, kron_obd": replace(BASE, criterion="kron_obd"),
    "channels, kron_obs": replace(BASE, criterion="kron_obs"),
}
PREDICTIONS = ("sum", "together")
SETTINGS = ("checkpoint", "images")
BATCH = 128


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare predicted and measured rise of the loss.", allow_abbrev=False)
    add = parser.add_argument
    shares = [0.95, 0.9, 0.8, 0.65, 0.5, 0.35, 0.25]
    add("--checkpoint", required=True, help="best.pt of stage 1")
    add("--data_dir", required=True, help="data folder it was trained on")
    add("--img_type", type=image_type, default="png", help="image files to read")
    add("--shares", type=float, nargs="+", default=shares, help="shares of the FLOPs to keep")
    add("--forms", nargs="+", default=list(FORMS), choices=FORMS, help="forms of layers to compare")
    add("--images", type=int, default=2000, help="training images for the Fisher and the divergence")
    add("--out", default="predicted_rise", help="path of the results, without .jsonl, .json and .png")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    lines, settings = beside(out, ".jsonl"), {key: getattr(args, key) for key in SETTINGS}
    checkpoint = load_checkpoint(args.checkpoint)
    data = load_data(args.data_dir, args.img_type, checkpoint.data["image_size"], workers=2)
    check_data(checkpoint, data, checkpoint.data["image_size"])
    train = split_as_before(data, checkpoint.data).train
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    images = train[order[: args.images]].to(pick_device())
    earlier = read_lines(lines)
    other = next((m["settings"] for m in earlier if m["settings"] != settings), None)
    if other is not None:
        raise UserError(f"{lines} holds measurements with {other}, not {settings}: choose another --out")
    done = {(m["form"], m["share"]) for m in earlier}
    plan = [(form, share) for share in args.shares for form in args.forms]
    for form, share in plan:
        if (form, share) not in done:
            append_line(lines, {**measure(checkpoint, images, form, share), "settings": settings})
    points = [m for m in read_lines(lines) if (m["form"], m["share"]) in set(plan)]
    correlations = {
        name: float(spearmanr([p[name] for p in points], [p["divergence"] for p in points]).statistic)
        for name in PREDICTIONS
    }
    content = {"machine": machine(), "settings": vars(args), "correlations": correlations, "points": points}
    write_json(beside(out, ".json"), content)
    draw(beside(out, ".png"), points)
    print("| FLOPs | form | predicted, sum over layers | predicted, together | divergence |\n|---|---|---|---|---|")
    for p in points:
        print(f"| {p['flops']:.1%} | {p['form']} | {p['sum']:.4f} | {p['together']:.4f} | {p['divergence']:.4f} |")
    print("Spearman: " + ", ".join(f"{name} {value:.3f}" for name, value in correlations.items()))


def measure(checkpoint: Checkpoint, images: Images, form: str, share: float) -> dict:
    network, size = placed(checkpoint.network(), images.device), checkpoint.data["image_size"]

    def batches():
        return plain_batches(images, BATCH, checkpoint.normaliser())

    draws = torch.Generator(images.device).manual_seed(0)
    cost, method = network_cost(network, size), FORMS[form]
    passes = method.passes(batches, draws, every_block)
    pruned = prune_once(network, passes, cost=cost, goal=Goal(flops=share * cost.flops), method=method)
    smaller = placed(pruned.network, images.device).eval()
    return {
        "form": form,
        "share": share,
        "flops": network_cost(smaller, size).flops / cost.flops,
        "sum": sum(change.predicted_rise for change in pruned.changes),
        "together": pruned.predicted_rise,
        "divergence": divergence(network, smaller, batches()),
    }


@torch.no_grad()
def divergence(network, smaller, batches) -> float:
    """Mean over images of the Kullback-Leibler divergence of ``smaller``'s prediction from that of ``network``."""
    total, images = 0.0, 0
    for x, _ in batches:
        before, after = (net(x, decide=all_on).logits.double().log_softmax(dim=1) for net in (network, smaller))
        total += F.kl_div(after, before, reduction="sum", log_target=True).item()
        images += len(x)
    return total / images


def draw(path: Path, points: list[dict]) -> None:
    figure, axes = plt.subplots(1, len(PREDICTIONS), sharey=True, figsize=(9, 4.2), layout="constrained")
    for axis, name in zip(axes, PREDICTIONS, strict=True):
        for form in FORMS:
            own = [p for p in points if p["form"] == form and p["divergence"] > 0 and p[name] > 0]
            axis.loglog([p[name] for p in own], [p["divergence"] for p in own], "o-", label=form, alpha=0.8)
        ends = [min(p["divergence"] for p in points), max(p["divergence"] for p in points)]
        axis.loglog(ends, ends, color="0.5", linestyle=":", linewidth=1)
        axis.set_xlabel(f"predicted rise, {name}, nats")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("measured divergence, nats")
    axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    run_command(main, goes_on="the same command")
