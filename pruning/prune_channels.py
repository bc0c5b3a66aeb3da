"""An iteration on whole channels: every block loses channels between its two convolutions, which stay plain.

The channels of the residual stream are shared by all blocks of a group and stay.  Those between conv1 and conv2 belong
to one block.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from models import ResNet
from models.resnet import BasicBlock
from pruning import channels
from pruning.capture import Passes
from pruning.changes import LayerChange, Pruned
from pruning.eigenbasis import gradient_squares
from pruning.factors import Factors, collect_factors
from pruning.goals import Goal, outside
from pruning.prediction import predicted_rise
from pruning.selection import Group, counts_kept, group_costs, select
from pruning.settings import Method
from pruning.surgery import rebuild_channels
from utils.errors import UserError
from utils.flops import NetworkCost

COMPENSATED = ("c_obs", "kron_obs")
KRONECKER = (*COMPENSATED, "kron_obd")


def prune_channels(network: ResNet, passes: Passes, cost: NetworkCost, goal: Goal, method: Method) -> Pruned:
    """Measure, choose and rebuild, see ``pruning.compress.prune_once``."""
    blocks = _blocks(network, method)
    seconds = {name: block.conv2 for name, block in blocks.items()}
    factors = collect_factors(network, seconds, passes) if method.criterion in KRONECKER else {}
    diagonals = gradient_squares(network, seconds, {}, passes) if method.criterion == "c_obd" else {}
    saliencies = {}
    for name, block in blocks.items():
        saliencies[name] = _saliency(block, factors.get(name), diagonals.get(name), passes.draws, method)
    groups = channel_groups(network, cost, method, saliencies)
    kept = {
        name: side
        for name, (side,) in select(groups, goal, outside(cost, group_costs(groups)), method.objective).items()
        if len(side) < blocks[name].conv1.out_channels
    }
    weights, changes = {}, {}
    for name, side in kept.items():
        whole = seconds[name].weight.detach()
        side = side.to(whole.device)
        if method.criterion in COMPENSATED:
            weights[name] = channels.compensated(whole, factors[name].A, side).to(whole.dtype)
        else:
            weights[name] = whole[:, side]
        changes[name] = whole.double().neg()
        changes[name][:, side] += weights[name].double()
    predicted = predicted_rise(network, seconds, changes, passes)
    table = []
    for name, block in blocks.items():
        before = block.conv1.out_channels
        after = len(kept.get(name, range(before)))
        positions = cost.layers[f"{name}.conv2"].positions_out
        for layer, other in (("conv1", block.conv1.in_channels), ("conv2", block.conv2.out_channels)):
            ranks = [(other, n) if layer == "conv1" else (n, other) for n in (before, after)]
            parameters = [other * n * 9 for n in (before, after)]
            flops = [2 * p * positions for p in parameters]
            rise = predicted.layers.get(name, 0.0) if layer == "conv2" else 0.0
            table.append(LayerChange(f"{name}.{layer}", *ranks, *parameters, *flops, rise))
    return Pruned(rebuild_channels(network, kept, weights), {}, table, predicted.together)


def channel_groups(
    network: ResNet, cost: NetworkCost, method: Method, saliencies: Mapping[str, Tensor] | None
) -> dict[str, Group]:
    """The inner channels of every block.

    Args:
        saliencies: of each channel, by block; None counts them all as zero.

    Raises:
        UserError: for a network with low-rank layers.
    """
    groups = {}
    for name, block in _blocks(network, method).items():
        now = block.conv1.out_channels
        positions = cost.layers[f"{name}.conv2"].positions_out
        block_cost = partial(_block_cost, block.conv1.in_channels + block.conv2.out_channels, positions)
        counts = counts_kept(now, block.conv2.out_channels, method.prune_ratio_limit, method.round_to)
        values = torch.zeros(now) if saliencies is None else saliencies[name]
        groups[name] = Group(values, (counts,), block_cost)
    return groups


def _blocks(network: ResNet, method: Method) -> dict[str, BasicBlock]:
    """The blocks, by name, if all of them are two plain convolutions: channels cannot be removed elsewhere."""
    blocks = getattr(network, "plain_blocks", None)
    if blocks is None:
        raise UserError(
            f"criterion {method.criterion} removes channels inside the blocks of this program's ResNet: for a network "
            "of your own use criterion eigendamage"
        )
    if len(blocks) < len(network.blocks):
        found = "some blocks were removed" if network.removed_blocks else "the network has low-rank layers"
        raise UserError(
            f"criterion {method.criterion} removes channels from whole blocks, but {found}: prune a network of stage "
            "1, or use criterion eigendamage"
        )
    return blocks


def _block_cost(outside: int, positions: int, inner):
    """FLOPs and parameters of two 3x3 convolutions and the batch norm between them, with ``inner`` channels there."""
    weights = 9 * inner * outside
    return 2 * weights * positions, weights + 2 * inner


def _saliency(
    block, factors: Factors | None, diagonal: Tensor | None, draws: torch.Generator, method: Method
) -> Tensor:
    weight = block.conv2.weight.detach()
    match method.criterion:
        case "c_obd":
            return channels.c_obd(weight, diagonal)
        case "c_obs":
            return channels.c_obs(weight, factors.A, factors.G)
        case "kron_obd":
            return channels.kron_obd(weight, factors.A, factors.G)
        case "kron_obs":
            return channels.removed_in_turn(weight, factors.A, factors.G)
        case "magnitude":
            return channels.magnitude(block.conv1.weight.detach(), weight)
        case _:  # random
            return torch.rand(weight.shape[1], generator=draws, device=weight.device)
