"""What can a switch know?  How much of what skipping a block costs an image can be told from what its switch sees.

For each image and switched block of a trained network: how far its prediction moves (divergence from that with every
block run) where this block alone is skipped.  Regressions of it on what the switch sees, the pooled inputs of its block
and of those before it, are fitted on training images; their R^2 on test images says what any gate could know.  So does
that of a convolutional network for the whole feature map that enters the block: what a gate that sees more could.

Then deciders at equal executed FLOPs.  Each ranks all pairs of image and block by what it expects a skip to cost over
the FLOPs that it saves, and skips the cheapest until the computation that is asked for is left; its threshold is found
on the validation images, and the network really runs its decisions on the test images:

* ``alike``: the mean divergence of each block, so that all images skip the same ones; at the last block a coin decides;
* ``switches``: the network's own probabilities;
* ``linear``, ``multilayer``: the regressions; ``multilayer`` has two hidden layers;
* ``labelled``: the rise of the image's own loss, which takes the label and turns errors into hits: out of reach.

    python -m benchmarks.switch_knowledge --checkpoint RL_PRUNED/unsettled.pt --data_dir DATA --out OUT
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.alternatives import decided
from benchmarks.common import Trained, add_trained_arguments, beside, load_trained, machine
from benchmarks.regressions import Regression, convolutional, linear, multilayer
from models import ResNet, all_on
from models.gates import pooled
from utils.data.batches import plain_batches
from utils.data.images import Images
from utils.errors import UserError, run_command
from utils.flops import NetworkCost, network_cost
from utils.modes import evaluation_mode

DECIDERS = ("alike", "switches", "linear", "multilayer", "labelled")
AT_ONCE = 256  # images


@dataclass(frozen=True)
class Skips:
    """What single skips do to N images, for the B blocks that still have a switch."""

    rise: Tensor  # [N, B], of the cross-entropy, in nats
    moved: Tensor  # [N, B], divergence of the prediction from that of the whole network, in nats
    probabilities: Tensor  # [N, B], the switches' own
    features: list[Tensor]  # B of [N, n], what each switch sees, with every block run


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What a switch can know.", allow_abbrev=False)
    add_trained_arguments(parser, "best.pt of stage 3, or unsettled.pt where switches were fixed")
    parser.add_argument("--train_images", type=int, default=20000, help="that regressions are fitted on")
    parser.add_argument("--computation", type=float, nargs="+", default=[0.9, 0.8, 0.7], help="shares of the FLOPs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("switch_knowledge"), help="path of the results, without .json")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    trained = load_trained(args)
    network, splits = trained.network(), trained.splits
    cost = network_cost(network, trained.image_size)
    if not network.deciding:
        raise UserError(f"{args.checkpoint} has no switch that decides: give a network with switches")
    some = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(args.seed))[: args.train_images]
    train, val, test = (
        single_skips(trained, network, images) for images in (splits.train[some], splits.val, splits.test)
    )
    fits = {"linear": linear, "multilayer": multilayer}
    expected: dict[str, Callable[[Skips], Tensor]] = {
        "alike": lambda skips: alike(train.moved.mean(dim=0), len(skips.moved)),
        "switches": lambda skips: skips.probabilities,
        "labelled": lambda skips: skips.rise,
        **{name: regression(fit, train) for name, fit in fits.items()},
    }
    content = {
        "machine": machine(),
        "settings": {key: str(value) for key, value in vars(args).items()},
        "blocks": [f"blocks.{switch + 1}" for switch in network.deciding],
        "shares": [cost.blocks[switch] / cost.flops for switch in network.deciding],
        "divergence": test.moved.mean(dim=0).tolist(),
        "r_squared": {
            **{name: r_squared(expected[name](test), test.moved).tolist() for name in fits},
            "convolutional": from_maps(trained, network, splits.train[some], train.moved, test.moved),
        },
        "whole": trained.evaluated(network, splits.test, all_on).metrics,
        "as it is": trained.evaluated(network, splits.test).metrics,
        "rows": [],
    }
    for computation in args.computation:
        for name in DECIDERS:
            threshold = threshold_for(computation, per_flop(expected[name](val), network, cost), network, cost)
            keep = per_flop(expected[name](test), network, cost) > threshold
            content["rows"].append({"decider": name, "asked": computation, **run(trained, network, cost, keep)})
            print(json.dumps(content["rows"][-1]), flush=True)
    out = beside(args.out, ".json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=2))
    beside(args.out, ".md").write_text(table(content))
    print(table(content))


def from_maps(trained: Trained, network: ResNet, images: Images, moved: Tensor, of_test: Tensor) -> list[float]:
    """R^2 on the test images of regressions on the feature maps, block by block, fitted on ``images``."""
    found = []
    for column, switch in enumerate(network.deciding):
        model = convolutional(maps_entering(trained, network, images, switch), moved[:, column])
        expected = model(maps_entering(trained, network, trained.splits.test, switch))
        found.append(r_squared(expected[:, None], of_test[:, column, None]).item())
    return found


@torch.no_grad()
def maps_entering(trained: Trained, network: ResNet, images: Images, switch: int) -> Tensor:
    """The input of a switched block for all images, every block run; float16 [N, channels, H, W]."""
    seen: list[Tensor] = []
    handle = network.blocks[switch + 1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].half()))
    try:
        with evaluation_mode(network):
            for x, _ in plain_batches(images, AT_ONCE, trained.normalisation):
                network(x, decide=all_on, skip=False)
    finally:
        handle.remove()
    return torch.cat(seen)


def alike(mean: Tensor, images: int) -> Tensor:
    """The mean cost of each skip for all images, [B] -> [N, B], with noise too small to change the order of the blocks.

    It is the coin that decides between images where all cost the same.
    """
    return mean * (1 + 1e-6 * torch.rand(images, len(mean), device=mean.device))


def regression(fit: Callable[[Tensor, Tensor], Regression], train: Skips) -> Callable[[Skips], Tensor]:
    """What a fit for each block expects of the skips of other images, [N, B]."""
    models = [fit(x, y) for x, y in zip(train.features, train.moved.t(), strict=True)]
    return lambda skips: torch.stack([model(x) for model, x in zip(models, skips.features, strict=True)], dim=1)


@torch.no_grad()
def single_skips(trained: Trained, network: ResNet, images: Images) -> Skips:
    """Run ``images`` with every block, and without each single one."""
    blocks = network.deciding
    rise, moved, probabilities, features = [], [], [], [[] for _ in blocks]
    seen: list[Tensor] = []
    handles = [
        network.blocks[switch + 1].register_forward_pre_hook(
            lambda _, inputs: seen.append(pooled(inputs[0], torch.float32))
        )
        for switch in range(network.switches)
    ]
    try:
        with evaluation_mode(network):
            for x, y in plain_batches(images, AT_ONCE, trained.normalisation):
                seen.clear()
                whole = network(x, decide=all_on, skip=False)
                inputs = list(seen)
                log_p, loss = whole.logits.log_softmax(dim=1), F.cross_entropy(whole.logits, y, reduction="none")
                for column, switch in enumerate(blocks):
                    features[column].append(torch.cat(inputs[: switch + 1], dim=1))
                of_batch = [without(network, x, y, switch, log_p) for switch in blocks]
                rise.append(torch.stack([own - loss for own, _ in of_batch], dim=1))
                moved.append(torch.stack([divergence for _, divergence in of_batch], dim=1))
                probabilities.append(network(x).probabilities[:, blocks])
    finally:
        for handle in handles:
            handle.remove()
    return Skips(torch.cat(rise), torch.cat(moved), torch.cat(probabilities), [torch.cat(own) for own in features])


def without(network: ResNet, x: Tensor, y: Tensor, switch: int, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each image without one block, and the divergence of its prediction from ``log_p``; [N] each."""
    kept = torch.ones(network.switches, device=x.device)
    kept[switch] = 0
    log_q = network(x, decide=decided(kept), skip=False).logits.log_softmax(dim=1)
    return F.nll_loss(log_q, y, reduction="none"), (log_p.exp() * (log_p - log_q)).sum(dim=1)


def r_squared(expected: Tensor, true: Tensor) -> Tensor:
    """Share of the variance of ``true`` [N, B] that ``expected`` explains, [B]."""
    return 1 - (true - expected).square().mean(dim=0) / true.var(dim=0, unbiased=False)


def per_flop(expected: Tensor, network: ResNet, cost: NetworkCost) -> Tensor:
    """[N, B] over the share of all FLOPs that each skip saves."""
    shares = [cost.blocks[switch] / cost.flops for switch in network.deciding]
    return expected / torch.tensor(shares, device=expected.device)


def threshold_for(computation: float, prices: Tensor, network: ResNet, cost: NetworkCost) -> float:
    """The price up to which pairs of image and block are skipped so that ``computation`` of the FLOPs is left."""
    prices = prices.cpu()
    shares = torch.tensor([cost.blocks[switch] / cost.flops for switch in network.deciding], dtype=torch.float64)
    ranked, order = prices.flatten().sort()
    saved = shares.expand_as(prices).flatten()[order].cumsum(0) / len(prices)
    already = 1 - cost.executed(torch.ones(1, network.switches)).item() / cost.flops  # by switches settled closed
    count = int((saved <= 1 - computation - already).sum())
    return ranked[count - 1].item() if count > 0 else -float("inf")


@torch.no_grad()
def run(trained: Trained, network: ResNet, cost: NetworkCost, keep: Tensor) -> dict[str, float]:
    """Accuracy and computation on the test images under decisions keep [N, B]."""
    test, correct, executed, loss = trained.splits.test, 0, [], 0.0
    rows = keep.float().split(AT_ONCE)
    with evaluation_mode(network):
        for (x, y), of_batch in zip(plain_batches(test, AT_ONCE, trained.normalisation), rows, strict=True):
            decisions = torch.ones(len(x), network.switches, device=x.device)
            decisions[:, network.deciding] = of_batch
            output = network(x, decide=decided(decisions))
            correct += (output.logits.argmax(dim=1) == y).sum().item()
            loss += F.cross_entropy(output.logits, y, reduction="sum").item()
            executed.append(cost.executed(output.decisions.cpu()))
    return {
        "accuracy": correct / len(test),
        "loss": loss / len(test),
        "computation": torch.cat(executed).mean().item() / cost.flops,
    }


def table(content: dict) -> str:
    lines = [
        f"Every block: {content['whole']['accuracy']:.2%}; as the switches stand: "
        f"{content['as it is']['accuracy']:.2%} at {content['as it is']['computation']:.1%} of the FLOPs.",
        "",
        "| decider | "
        + " | ".join(f"{c:.0%}: accuracy, loss" for c in sorted({r["asked"] for r in content["rows"]}))
        + " |",
    ]
    asked = sorted({row["asked"] for row in content["rows"]})
    lines.append("|---|" + "---|" * len(asked))
    for name in DECIDERS:
        own = {row["asked"]: row for row in content["rows"] if row["decider"] == name}
        cells = [f"{own[c]['accuracy']:.2%}, {own[c]['loss']:.4f} (at {own[c]['computation']:.1%})" for c in asked]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| block | " + " | ".join(content["blocks"]) + " |", "|---|" + "---|" * len(content["blocks"])]
    lines.append("| mean divergence | " + " | ".join(f"{v:.3f}" for v in content["divergence"]) + " |")
    for name, values in content["r_squared"].items():
        lines.append(f"| R², {name} | " + " | ".join(f"{v:.2f}" for v in values) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_command(main, goes_on=None)
