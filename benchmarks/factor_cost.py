"""Cost of the pass that collects the Kronecker factors, over a plain forward and backward pass of the same batches.

Beside it the other passes of an iteration: the correction of the eigenvalues, the predicted rise of the loss, and the
refit, which runs both networks as far as each rebuilt layer (every layer at half of its ranks here).

Method: the competitors take turns in every round, so that all see the same machine; medians and quartiles over rounds.
Memory: peak resident memory of a fresh process that runs one competitor alone.  curvlinops is asked for the factors of
the same layers.  Claim: the factors cost at most 1.15 of a plain pass (ResNet-32, width 64, batch 32, CPU).

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.factor_cost --out results/factor_cost
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import required
from benchmarks.common import beside, machine
from models import all_on, build_network
from pruning.compress import prune_once
from pruning.eigenbasis import eigenbasis, gradient_squares
from pruning.factors import collect_factors
from pruning.goals import Goal
from pruning.layers import composed, prunable_layers, read_weights
from pruning.prediction import predicted_rise
from pruning.refit import refit
from pruning.settings import Method
from pruning.surgery import merged, rebuild, truncated
from pruning.survey import survey
from utils.flops import every_block, network_cost

CLASSES = 100


class Logits(nn.Module):
    """The network as curvlinops takes it: images in, logits out."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x, decide=all_on, skip=False).logits


def competitors(args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    network = build_network("resnet", depth=args.depth, num_classes=CLASSES, width=args.width, gate="none").eval()
    layout = torch.channels_last if args.layout == "channels_last" else torch.contiguous_format
    network = network.to(memory_format=layout)
    batches = [
        (torch.randn(args.batch, 3, 32, 32).contiguous(memory_format=layout), torch.randint(CLASSES, (args.batch,)))
        for _ in range(args.batches)
    ]
    layers = prunable_layers(network)

    def plain() -> None:
        for x, y in batches:
            network.zero_grad(set_to_none=True)
            F.cross_entropy(network(x, decide=all_on, skip=False).logits, y).backward()
        network.zero_grad(set_to_none=True)

    def passes():
        return Method().passes(lambda: batches, torch.Generator().manual_seed(0), every_block)

    def factors():
        return collect_factors(network, layers, passes())

    # Only the passes that build on the factors compute them here: a pass that runs alone shows its own memory.
    building = {"eigendecompositions", "eigenvalue correction", "predicted rise", "refit"}
    found = factors() if building & set(args.competitors) else {}
    bases = {name: eigenbasis(found[name]) for name in found}
    halved = {
        name: truncated(
            layer.weight.detach(), bases[name], *(torch.arange(n // 2, n) for n in layer.weight.shape[1::-1])
        )
        for name, layer in layers.items()
        if name in bases and name != "stem.0"
    }
    changes = {name: composed(half) - layers[name].weight.detach().double() for name, half in halved.items()}
    smaller = rebuild(network, {name: merged(read_weights(network, name), half) for name, half in halved.items()})

    def curvlinops(approximation: str) -> Callable[[], object]:
        KFACLinearOperator = required("curvlinops").KFACLinearOperator

        operator = KFACLinearOperator(
            Logits(network),
            nn.CrossEntropyLoss(),
            [layer.weight for layer in layers.values()],
            batches,
            check_deterministic=False,
            kfac_approx=approximation,
            num_per_example_loss_terms=1,
            num_data=args.batch * args.batches,
        )
        # It hides its hooks and adds to earlier sums: emptied, each call starts again from zero.

        def compute() -> None:
            operator._input_covariances, operator._gradient_covariances = {}, {}
            operator.compute_kronecker_factors()

        return compute

    every = {
        "plain forward and backward": plain,
        "factors": factors,
        "eigendecompositions": lambda: {name: eigenbasis(found[name]) for name in layers},
        "eigenvalue correction": lambda: gradient_squares(network, layers, bases, passes()),
    }
    every["predicted rise"] = lambda: predicted_rise(network, layers, changes, passes())
    norms = survey(network, batches[0][0][:2], every_block).norms
    every["refit"] = lambda: refit(network, smaller, {n: norms[n] for n in norms if n in halved}, {}, passes())
    cost = network_cost(network, 32)
    every["whole iteration"] = lambda: prune_once(
        network, passes(), cost=cost, goal=Goal(flops=0.5 * cost.flops), method=Method()
    )
    for approximation in ("expand", "reduce"):
        name = f"curvlinops {approximation}"
        if name in args.competitors:
            every[name] = curvlinops(approximation)
    return {name: every[name] for name in args.competitors}


NAMES = (
    "plain forward and backward",
    "factors",
    "eigendecompositions",
    "eigenvalue correction",
    "predicted rise",
    "refit",
    "whole iteration",
    "curvlinops expand",
    "curvlinops reduce",
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Cost of the factor pass.", allow_abbrev=False)
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32, help="images in a batch")
    parser.add_argument("--batches", type=int, default=1, help="batches in a pass")
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each competitor, after one to warm up")
    parser.add_argument("--layout", default="channels_last", choices=("channels_last", "contiguous"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--competitors", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--out", default="factor_cost", help="path of the results, without .json and .md")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # one competitor, for its memory
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    runs = competitors(args)
    if args.alone:
        for run in runs.values():
            run()
        status = Path("/proc/self/status").read_text().splitlines()
        print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
        return
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(args.rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn > 0:
                seconds[name].append(time.perf_counter() - start)
        print(f"round {turn}/{args.rounds}", flush=True)
    plain = statistics.median(seconds[NAMES[0]]) if NAMES[0] in seconds else None
    rows = []
    for name, values in seconds.items():
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        rows.append(
            {
                "name": name,
                "median_s": middle,
                "quartiles_s": [low, high],
                "over_plain": None if plain is None else middle / plain,
                "peak_memory_mib": peak_memory(name),
            }
        )
    write(Path(args.out), args, rows)


def peak_memory(name: str) -> float:
    """MiB of a fresh process with the arguments of this one that runs ``name`` alone, once."""
    command = [sys.executable, "-m", "benchmarks.factor_cost", *sys.argv[1:], "--competitors", name, "--alone"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(output.strip().splitlines()[-1]) / 1024


def write(out: Path, args: argparse.Namespace, rows: list[dict]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "alone")}
    beside(out, ".json").write_text(json.dumps({"machine": machine(), "settings": settings, "rows": rows}, indent=2))
    lines = ["| pass | seconds | quartiles | over plain | peak memory |", "|---|---|---|---|---|"]
    for row in rows:
        low, high = row["quartiles_s"]
        over = "" if row["over_plain"] is None else f"{row['over_plain']:.2f}x"
        lines.append(
            f"| {row['name']} | {row['median_s']:.3f} | {low:.3f} - {high:.3f} | {over} | "
            f"{row['peak_memory_mib']:.0f} MiB |"
        )
    beside(out, ".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
