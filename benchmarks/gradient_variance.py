"""Variance of the gates' policy gradient with each baseline, at one network, over batches of training images.

Method: the gates' logits are rescaled as stage 3 does it, batch norms are frozen, nothing is trained.  Given are the
variance of the gradient, summed over the gates' parameters, and the norm of its mean, which is the same for all
baselines but for the noise.

    python -m benchmarks.gradient_variance --checkpoint best.pt --data_dir data/cifar_10
"""

import argparse

import torch
from torch.nn import functional as F

from benchmarks.common import add_trained_arguments, load_trained
from gating.baselines import BASELINES, baseline, thresholded_returns
from gating.objectives import policy_loss, returns, skip_rewards
from gating.temperature import rescale_gate_logits
from models import sampled
from utils.data.batches import TrainingBatches
from utils.errors import run_command
from utils.flops import network_cost


def main() -> None:
    parser = argparse.ArgumentParser(description="Variance of the policy gradient.", allow_abbrev=False)
    add_trained_arguments(parser)
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--bs", type=int, default=128)
    parser.add_argument("--alpha", type=float, default=0.1)
    args = parser.parse_args()
    trained = load_trained(args)
    network, splits = trained.network().eval(), trained.splits
    rescale_gate_logits(network, trained.normalisation.apply(splits.train[:512].pixels))
    shares = network_cost(network, trained.image_size).shares.to(trained.device)
    gates = list(network.gate.parameters())
    order, draws = torch.Generator().manual_seed(0), torch.Generator(trained.device).manual_seed(0)
    gradients = {kind: [] for kind in BASELINES}
    batch = 0
    while batch < args.batches:
        for x, y in TrainingBatches(
            splits.train, args.bs, order, trained.normalisation, trained.checkpoint.data["flip"]
        ):
            logits, p, z = network(x, decide=sampled(draws), skip=False)
            gained = returns(
                skip_rewards(z, shares, args.alpha), F.cross_entropy(logits, y, reduction="none").detach(), 1.0
            )
            for kind in BASELINES:
                compared = baseline(
                    kind,
                    gained,
                    lambda x=x, y=y: thresholded_returns(network, x, y, shares, args.alpha, 1.0, skip=False),
                )
                loss = policy_loss(p, z, gained - compared)
                gradient = torch.autograd.grad(loss, gates, retain_graph=True, allow_unused=True)
                gradients[kind].append(torch.cat([g.flatten() for g in gradient if g is not None]))
            batch += 1
            if batch == args.batches:
                break
    print("| baseline | variance of the gradient | norm of its mean |\n|---|---|---|")
    for kind, values in gradients.items():
        stacked = torch.stack(values)
        print(f"| {kind} | {stacked.var(dim=0).sum():.4g} | {stacked.mean(dim=0).norm():.4g} |")


if __name__ == "__main__":
    run_command(main, goes_on=None)
