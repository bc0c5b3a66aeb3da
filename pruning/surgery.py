"""Surgery: layers rebuilt physically smaller from the directions that are kept."""

from collections.abc import Mapping

import torch
from torch import Tensor

from models import ResNet, build_network
from pruning.eigenbasis import Eigenbasis
from pruning.layers import ConvWeights


def truncated(core: Tensor, basis: Eigenbasis, keep_in: Tensor | None, keep_out: Tensor | None) -> ConvWeights:
    """A convolution projected onto kept eigendirections: rotation by Q^T, smaller core, rotation back by Q.

    Args:
        core: kernel [r, c, kh, kw], in the channels that ``basis`` belongs to.
        keep_in: indices of the input directions to keep; None leaves the input side alone, unrotated.
        keep_out: the same for the output side.

    Source: EigenDamage (arXiv:1905.05934), section 4.  Everything in float64.
    """
    core, rotate_in, rotate_out = core.double(), None, None
    if keep_in is not None:
        rotate_in = basis.Q_a[:, keep_in.to(basis.Q_a.device)].t()
        core = torch.einsum("oihw,ji->ojhw", core, rotate_in)
    if keep_out is not None:
        rotate_out = basis.Q_g[:, keep_out.to(basis.Q_g.device)]
        core = torch.einsum("oihw,op->pihw", core, rotate_out)
    return ConvWeights(core, rotate_in, rotate_out)


def merged(weights: ConvWeights, reduced: ConvWeights) -> ConvWeights:
    """A layer with its core replaced by a reduced form of it, and rotations of one side multiplied into one.

    So a layer never has more than three convolutions, however often it is pruned.
    """
    rotate_in, rotate_out = weights.rotate_in, weights.rotate_out
    if reduced.rotate_in is not None:
        rotate_in = reduced.rotate_in if rotate_in is None else reduced.rotate_in @ rotate_in.double()
    if reduced.rotate_out is not None:
        rotate_out = reduced.rotate_out if rotate_out is None else rotate_out.double() @ reduced.rotate_out
    return ConvWeights(reduced.core, rotate_in, rotate_out).to(weights.core.dtype)


def composed(weights: ConvWeights) -> Tensor:
    """The kernel [out, in, kh, kw] that rotations and core multiply out to, in float64."""
    kernel = weights.core.double()
    if weights.depthwise:
        kernel = torch.diag_embed(kernel[:, 0].movedim(0, -1)).movedim((-2, -1), (0, 1))
    if weights.rotate_in is not None:
        kernel = torch.einsum("rchw,ci->rihw", kernel, weights.rotate_in.double())
    if weights.rotate_out is not None:
        kernel = torch.einsum("or,rihw->oihw", weights.rotate_out.double(), kernel)
    return kernel


def rebuild(network: ResNet, replaced: Mapping[str, ConvWeights]) -> ResNet:
    """A new network of the same kind with the given layers replaced; everything else is copied.

    Args:
        replaced: new weights by layer name (as in ``pruning.layers.prunable_layers``).
    """
    architecture = {**network.architecture, "ranks": dict(network.architecture["ranks"])}
    separable = set(architecture["depthwise"]) - set(replaced)
    architecture["depthwise"] = sorted(separable | {name for name, layer in replaced.items() if layer.depthwise})
    weights = network.state_dict()
    for name, layer in replaced.items():
        rank_in, rank_out = layer.ranks
        architecture["ranks"][name] = [rank_in, rank_out]
        weights = {key: value for key, value in weights.items() if not key.startswith(f"{name}.")}
        weights[f"{name}.core.weight"] = layer.core
        if layer.rotate_in is not None:
            weights[f"{name}.rotate_in.weight"] = layer.rotate_in[:, :, None, None]
        if layer.rotate_out is not None:
            weights[f"{name}.rotate_out.weight"] = layer.rotate_out[:, :, None, None]
    return _built(architecture, weights, network)


def rebuild_channels(network: ResNet, kept: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> ResNet:
    """A new network whose blocks keep only the given channels between their two convolutions.

    Channel j of a block is row j of conv1, entry j of bn1 and column j of conv2; the residual stream keeps its width.

    Args:
        kept: ascending indices of the channels that stay, by name of the block.
        weights: conv2's new kernel [out, kept, kh, kw], by name of the block.
    """
    architecture = {**network.architecture, "inner": dict(network.architecture["inner"])}
    state = network.state_dict()
    for block, index in kept.items():
        architecture["inner"][block] = len(index)
        for name in ("conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"):
            state[f"{block}.{name}"] = state[f"{block}.{name}"][index.to(state[f"{block}.{name}"].device)]
        state[f"{block}.conv2.weight"] = weights[block]
    return _built(architecture, state, network)


def _built(architecture: dict, weights: dict[str, Tensor], like: ResNet) -> ResNet:
    network = build_network(**architecture)
    parameter = next(like.parameters())
    network = network.to(parameter.device, parameter.dtype)
    network.load_state_dict(weights)
    return network.train(like.training)
