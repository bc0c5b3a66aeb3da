"""Switches that are fixed to what they mostly decide: blocks that then nobody takes leave the network."""

from torch import Tensor

from gating.steering import Budget
from models import ResNet, build_network
from utils.data.augment import Normalisation
from utils.data.images import Images
from utils.evaluate import Evaluation, evaluate
from utils.flops import network_cost

UNSETTLED = "unsettled.pt"  # file of stage 3's chosen network before switches were fixed
# What a switch costs, as a share of the executed FLOPs: fixed, it may let so much more be executed.  Measured are 1 to
# 5 % of the time (docs/measurements.md): the cheaper the blocks, the more.
SWITCH_COST = 0.01


def settle(
    network: ResNet, images: Images, image_size: int, normalisation: Normalisation, budget: Budget, share: float
) -> tuple[ResNet, Evaluation] | None:
    """The network with as many switches fixed as pay, and what was measured of it on ``images``.

    The most settled are fixed first.  Those that have settled least are left to decide where fixing them, too, would
    lead out of the budget or execute more FLOPs than their tests cost.  None where none is fixed.

    Args:
        images: validation images, of ``image_size`` pixels in height and width.
        share: of the images that a switch has to decide alike for, to be fixed at all.
    """
    before = evaluate(network, images, normalisation, network_cost(network, image_size))
    fixed = settled_decisions(before.decisions, share)
    fixed = {switch: on for switch, on in fixed.items() if switch not in network.settled}
    while fixed:
        smaller = with_settled(network, fixed)
        measured = evaluate(smaller, images, normalisation, network_cost(smaller, image_size))
        pays = measured.flops_executed <= before.flops_executed * (1 + SWITCH_COST * len(fixed))
        if pays and budget.met(measured.accuracy, measured.computation):
            return smaller, measured
        fixed.popitem()
    return None


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
