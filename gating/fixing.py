"""Switches that are fixed to their usual decision: blocks that then never run leave the network."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from gating.steering import Budget
from models import ResNet, build_network
from training.evaluate import Evaluation

BEFORE_FIXING = "before_fixing.pt"  # file of stage 3's chosen network before switches were fixed
# What a switch costs, as a share of the executed FLOPs: its step of the gate; its test, gathering and scattering.
# Measured are 1 to 4% of the time for both together (docs/notebook.md): the cheaper the blocks, the more.
STEP_COST = TEST_COST = 0.005
TOLERATED = 0.001  # accuracy that fixing may cost, within the budget: five of CIFAR-10's validation images


class FixedSwitches(NamedTuple):
    """A network with fixed switches, and what was measured with and without them."""

    network: ResNet
    before: Evaluation
    after: Evaluation


def fix_switches(
    network: ResNet, evaluated: Callable[[ResNet], Evaluation], budget: Budget, share: float
) -> FixedSwitches | None:
    """Fix the switches whose tests cost more than they save; None where there is none.

    They are fixed to their usual decision, the most uniform first: one after the other, and a second time without those
    that break the budget or cost accuracy.  Of all networks on the way that keep the budget the cheapest is chosen, by
    its executed FLOPs plus the cost of its gate's steps and tests.

    Args:
        evaluated: measures a network on the validation images.
        share: a switch may be fixed if it decides the same for at least this share of the images.
    """

    def price(network: ResNet, executed: float) -> float:
        steps = sum(network.asks(switch) for switch in range(network.switches))
        return executed + (STEP_COST * steps + TEST_COST * len(network.free_switches)) * before.flops_executed

    before = evaluated(network)
    every, kept = {}, {}
    best, lowest = None, price(network, before.flops_executed)
    for switch, on in uniform_decisions(before.decisions, share).items():
        if switch in network.fixed_switches:
            continue
        every, grown = {**every, switch: on}, {**kept, switch: on}
        for fixed in (grown,) if every == grown else (every, grown):
            smaller = with_fixed_switches(network, fixed)
            after = evaluated(smaller)
            if after.accuracy < before.accuracy - TOLERATED or not budget.met(**after.metrics):
                continue
            if fixed is grown:
                kept = grown
            if price(smaller, after.flops_executed) < lowest:
                best, lowest = FixedSwitches(smaller, before, after), price(smaller, after.flops_executed)
    return best


def uniform_decisions(decisions: Tensor, share: float) -> dict[int, int]:
    """The switches that decide the same for at least ``share`` of the images, by index, with that decision, 0 or 1.

    The most uniform ones come first.

    Args:
        decisions: [N, K].
    """
    shares = decisions.double().mean(dim=0).tolist()
    same = {switch: max(p, 1 - p) for switch, p in enumerate(shares)}
    uniform = sorted((switch for switch in same if same[switch] >= share), key=lambda switch: -same[switch])
    return {switch: int(shares[switch] > 0.5) for switch in uniform}


def with_fixed_switches(network: ResNet, decisions: dict[int, int]) -> ResNet:
    """The same network with switches fixed: closed removes the block's residual, open runs it always.

    For images whose decision equals the fixed one, logits and later decisions do not change.

    Args:
        decisions: 0 or 1 by the index of the switch.
    """
    fixed = {f"blocks.{switch + 1}": on for switch, on in decisions.items()}
    fixed = dict(sorted({**network.architecture["fixed_switches"], **fixed}.items()))
    parameter = next(network.parameters())
    smaller = build_network(**{**network.architecture, "fixed_switches": fixed}).to(parameter.device, parameter.dtype)
    weights = network.state_dict()
    smaller.load_state_dict({name: weights[name] for name in smaller.state_dict()})
    return smaller.train(network.training)


def fixed_blocks_text(network: ResNet) -> str:
    """Which blocks were removed and which always run, counted from 1 as the network runs them; empty for none."""
    parts = []
    for on, said in ((0, "removed"), (1, "fixed to run")):
        blocks = [str(switch + 2) for switch, decision in sorted(network.fixed_switches.items()) if decision == on]
        if blocks:
            parts.append(f"block{'s' if len(blocks) > 1 else ''} {', '.join(blocks)} {said}")
    return "; ".join(parts)
