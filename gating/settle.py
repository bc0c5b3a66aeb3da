"""Switches that are fixed to what they mostly decide: blocks that then nobody takes leave the network."""

from typing import NamedTuple

import torch
from torch import Tensor

from gating.steering import Budget
from models import ResNet, build_network
from training.evaluate import Evaluation, evaluate
from utils.data.augment import Normalisation
from utils.data.images import Images
from utils.flops import network_cost

UNSETTLED = "unsettled.pt"  # file of stage 3's chosen network before switches were fixed
# What a switch costs, as a share of the executed FLOPs: its step of the gate; its test, gathering and scattering.
# Measured are 1 to 4 % of the time for both together (docs/measurements.md): the cheaper the blocks, the more.
STEP_COST = TEST_COST = 0.005
TOLERATED = 0.001  # accuracy that fixing may cost, within the budget: five of CIFAR-10's validation images


class Settled(NamedTuple):
    """A network with fixed switches, and what was measured with and without them."""

    network: ResNet
    before: Evaluation
    after: Evaluation


def settle(
    network: ResNet,
    images: Images,
    image_size: int,
    normalisation: Normalisation,
    budget: Budget,
    share: float,
    precision: torch.dtype = torch.float32,
) -> Settled | None:
    """Fix the switches whose tests cost more than they save; None where there is none.

    They are fixed to what they mostly decide, the most settled first: one after the other, and a second time without
    those that break the budget or cost accuracy.  Of the networks on both ways that keep them the cheapest is chosen,
    by its executed FLOPs and what the steps and tests of its gate cost beside them.

    Args:
        images: validation images, of ``image_size`` pixels in height and width.
        share: of the images that a switch has to decide alike for, to be fixed at all.
        precision: that networks are judged in, see ``utils.device.pick_precision``.
    """

    def measured(network: ResNet) -> Evaluation:
        return evaluate(network, images, normalisation, network_cost(network, image_size), precision=precision)

    def price(network: ResNet, executed: float) -> float:
        steps = sum(network.steps(switch) for switch in range(network.switches))
        return executed + (STEP_COST * steps + TEST_COST * len(network.deciding)) * before.flops_executed

    before = measured(network)
    every, kept = {}, {}
    best, lowest = None, price(network, before.flops_executed)
    for switch, on in settled_decisions(before.decisions, share).items():
        if switch in network.settled:
            continue
        every, grown = {**every, switch: on}, {**kept, switch: on}
        for fixed in (grown,) if every == grown else (every, grown):
            smaller = with_settled(network, fixed)
            after = measured(smaller)
            if after.accuracy < before.accuracy - TOLERATED or not budget.met(after.accuracy, after.computation):
                continue
            if fixed is grown:
                kept = grown
            if price(smaller, after.flops_executed) < lowest:
                best, lowest = Settled(smaller, before, after), price(smaller, after.flops_executed)
    return best


def settled_decisions(decisions: Tensor, share: float) -> dict[int, int]:
    """The switches that decide alike for at least ``share`` of the images, by index, and what they decide, 0 or 1.

    Those that decide alike for the most images come first.

    Args:
        decisions: [N, K].
    """
    passing = decisions.double().mean(dim=0).tolist()
    alike = {switch: max(p, 1 - p) for switch, p in enumerate(passing)}
    settled = sorted((switch for switch in alike if alike[switch] >= share), key=lambda switch: -alike[switch])
    return {switch: int(passing[switch] > 0.5) for switch in settled}


def with_settled(network: ResNet, decisions: dict[int, int]) -> ResNet:
    """The same network with switches fixed: closed, the block's residual is gone; open, it is always run.

    Where a fixed switch agrees with what would have been decided, logits and later decisions stay as they were.

    Args:
        decisions: 0 or 1 by the index of the switch.
    """
    fixed = {f"blocks.{switch + 1}": on for switch, on in decisions.items()}
    settled = dict(sorted({**network.architecture["settled"], **fixed}.items()))
    parameter = next(network.parameters())
    smaller = build_network(**{**network.architecture, "settled": settled}).to(parameter.device, parameter.dtype)
    weights = network.state_dict()
    smaller.load_state_dict({name: weights[name] for name in smaller.state_dict()})
    return smaller.train(network.training)


def description(network: ResNet) -> str:
    """Which blocks have left and which are always run, counted from 1 as the network runs them; empty for none."""
    parts = []
    for on, said in ((0, "left out"), (1, "always run")):
        blocks = [str(switch + 2) for switch, decision in sorted(network.settled.items()) if decision == on]
        if blocks:
            parts.append(f"block{'s' if len(blocks) > 1 else ''} {', '.join(blocks)} {said}")
    return "; ".join(parts)
