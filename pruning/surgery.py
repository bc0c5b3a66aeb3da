"""Surgery: layers rebuilt physically smaller from the directions that are kept."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from models import ResNet, build_network, low_rank, replace_layer
from pruning.eigenbasis import Eigenbasis
from pruning.layers import ConvWeights
from utils.modes import copied


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

    So a layer has at most three convolutions, however often it is pruned.
    """
    rotate_in, rotate_out = weights.rotate_in, weights.rotate_out
    if reduced.rotate_in is not None:
        rotate_in = reduced.rotate_in if rotate_in is None else reduced.rotate_in @ rotate_in.double()
    if reduced.rotate_out is not None:
        rotate_out = reduced.rotate_out if rotate_out is None else rotate_out.double() @ reduced.rotate_out
    return ConvWeights(reduced.core, rotate_in, rotate_out).to(weights.core.dtype)


def rebuild(network: nn.Module, replaced: Mapping[str, ConvWeights], with_bias: Collection[str] = ()) -> nn.Module:
    """A copy of the network with the given layers replaced.

    Args:
        replaced: new weights by layer name.
        with_bias: layers that get a bias, of zeros, where they have none.
    """
    smaller = copied(network)
    for name, weights in replaced.items():
        old = smaller.get_submodule(name)
        layer = low_rank(old, weights.ranks, weights.depthwise, old.bias is not None or name in with_bias)
        parts = {"rotate_in": weights.rotate_in, "core": weights.core, "rotate_out": weights.rotate_out}
        with torch.no_grad():
            for part, matrix in parts.items():
                if matrix is not None:
                    weight = getattr(layer, part).weight
                    weight.copy_(matrix.reshape(weight.shape))
            if layer.bias is not None:
                layer.bias.copy_(torch.zeros_like(layer.bias) if old.bias is None else old.bias)
        layer.requires_grad_(next(old.parameters()).requires_grad)
        if old.bias is not None:
            layer.bias.requires_grad_(old.bias.requires_grad)
        replace_layer(smaller, old, layer)
    return smaller


def rebuild_channels(network: ResNet, kept: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> ResNet:
    """A new network whose blocks keep only the given channels between their two convolutions.

    Channel j of a block is row j of conv1, entry j of bn1 and column j of conv2; the residual stream keeps its width.

    Args:
        kept: ascending indices of the channels that stay, by name of the block.
        weights: conv2's new kernel [out, kept, kh, kw], by name of the block.
    """
    architecture, state, parameter = network.architecture, network.state_dict(), next(network.parameters())
    for block, index in kept.items():
        architecture["inner"][block] = len(index)
        for name in ("conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"):
            state[f"{block}.{name}"] = state[f"{block}.{name}"][index.to(state[f"{block}.{name}"].device)]
        state[f"{block}.conv2.weight"] = weights[block]
    smaller = build_network(**architecture).to(parameter.device, parameter.dtype)
    smaller.load_state_dict(state)
    return smaller.train(network.training)
