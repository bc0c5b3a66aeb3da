"""The layers of a network that can take another form, found by running it once."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_leaves

from models import LOW_RANK
from models.convolution import SafeConv2d, is_pointwise
from pruning.capture import Forward, as_images, differentiable, gradients, is_linear
from utils.errors import UserError
from utils.modes import evaluation_mode, gradients_for, hooked, layer_input

# The forwards that are known: a subclass may use its weight in another way.
_KNOWN = (nn.Conv2d.forward, nn.Linear.forward, SafeConv2d.forward)
_CONVOLUTION = nn.Conv2d._conv_forward
# Channels on a side: factors of more take gigabytes, and their eigenvectors minutes.
WIDEST = 4096


@dataclass(frozen=True)
class Survey:
    """The layers of a network."""

    norms: dict[str, str | None]  # of each layer that can be replaced: the batch norm that alone reads its output
    left_alone: dict[str, str] = field(default_factory=dict)  # why, of each other layer

    @property
    def names(self) -> list[str]:
        """The layers that can be replaced, in the order in which they run."""
        return list(self.norms)


@dataclass
class _Runs:
    """The record of one forward pass."""

    nodes: dict[str, Any] = field(default_factory=dict)  # that made a layer's output, in the order of execution
    outputs: dict[str, Tensor] = field(default_factory=dict)  # of layers
    times: Counter = field(default_factory=Counter)  # that a module has run
    read: dict[str, Any] = field(default_factory=dict)  # nodes that made the inputs of batch norms
    mixing: set[str] = field(default_factory=set)  # layers that combine images


def survey(
    network: nn.Module, x: Tensor, forward: Forward, plain: Forward | None = None, ignored: Sequence[str] = ()
) -> Survey:
    """Run ``network`` on the inputs ``x`` in evaluation mode and record how its layers are used.

    The readers of an output are found in autograd's graph, so functions count as well as modules.

    Args:
        forward: from network and inputs to what gradients start from.
        plain: the same without a loss, whose penalties on weights do not count; ``forward`` by default.
        ignored: names of layers, or of modules that hold some, that are to stay as they are.

    Raises:
        UserError: if the network has no layer of such a name.
    """
    layers = dict(outermost(network))
    norms = {name: m for name, m in network.named_modules() if isinstance(m, _BatchNorm) and m.running_var is not None}
    alone = {name: reason for name, m in layers.items() if (reason := unsuited(m))}
    alone |= {name: "weights are shared" for name in sharing(network, layers)}
    for module in ignored:
        # Stage 2 holds a network of the user's own as ``network``.
        inside = [name for name in layers if f"{name}.".startswith((f"{module}.", f"network.{module}."))]
        if not inside:
            some = ", ".join([*layers][:3])
            raise UserError(
                f"ignored_layers names {module}, which is neither a layer nor a module with layers: the network has "
                f"{some}, ..."
            )
        alone |= dict.fromkeys(inside, "ignored")
    runs, edges = _run(network, layers, norms, x, forward)
    read = _weights_read(network, layers, x, plain or forward)
    found = {}
    for name, node in runs.nodes.items():
        if name in alone:
            continue
        if runs.times[name] > 1:
            alone[name] = "used twice"
        elif name in read:
            alone[name] = "weights are read"
        elif name in runs.mixing:
            alone[name] = "mixes images"
        elif node not in edges:
            alone[name] = "reaches no output"
        else:
            readers = [n for n, read in runs.read.items() if read is node and runs.times[n] == 1]
            axes = 2 if is_linear(layers[name]) else 4  # where the layer's outputs are the norm's channels
            fits = readers and edges[node] == 1 and runs.outputs[name].dim() == axes
            found[name] = readers[0] if fits else None
    return Survey(found, {n: alone.get(n, "never run") for n in layers if n not in found})


def outermost(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Convolutions and linear layers by name; layers that pruning has built count as one."""
    inside: tuple[str, ...] = ()
    for name, module in network.named_modules():
        if name.startswith(inside) and inside:
            continue
        if isinstance(module, LOW_RANK):
            inside = (*inside, f"{name}.")
        if isinstance(module, (*LOW_RANK, nn.Linear, _ConvNd)):
            yield name, module


def unsuited(layer: nn.Module) -> str | None:
    """Why a layer cannot be replaced, in a few words."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    if is_parametrized(layer) or hooks:
        return "has hooks"
    if isinstance(layer, LOW_RANK):
        return None
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        return "transposed" if layer.transposed else "not two-dimensional"
    forward = "forward" not in vars(layer) and type(layer).forward in _KNOWN
    if not forward or getattr(type(layer), "_conv_forward", _CONVOLUTION) is not _CONVOLUTION:
        return "its own forward"
    if not layer.weight.is_floating_point():
        return "weights not real"
    parts = {*dict(layer.named_parameters()), *dict(layer.named_buffers())}
    if parts - {"weight", "bias"} or layer._modules:
        return "has further parts"
    if _too_wide(layer):
        return "too wide"
    if isinstance(layer, nn.Linear):
        return None
    if layer.groups > 1:
        return "grouped"
    if layer.padding_mode != "zeros":
        return f"padding mode {layer.padding_mode}"
    return None


def _too_wide(layer: nn.Module) -> bool:
    """Whether the factors would be too large, which in a pointwise layer are of the narrower side."""
    outputs, inputs = layer.weight.shape[:2]
    if is_pointwise(layer):
        return min(outputs, inputs) > WIDEST or outputs > 4 * WIDEST
    return max(outputs, inputs) > WIDEST


def sharing(network: nn.Module, layers: dict[str, nn.Module]) -> list[str]:
    """The layers whose weights another module of the network has, too: another layer, or an embedding."""
    owners = Counter(id(p) for module in network.modules() for p in module.parameters(recurse=False))
    return [name for name, layer in layers.items() if any(owners[id(p)] > 1 for p in layer.parameters())]


def _weights_read(network: nn.Module, layers: dict[str, nn.Module], x: Tensor, forward: Forward) -> set[str]:
    """The layers with whose weight something else computes than their own forward pass, as in a tied decoder.

    If such a layer took another form, that would compute with the kernel that it multiplies out to.  What only looks at
    a type or a device is not in autograd's graph.
    """
    owners = {p: name for name, layer in layers.items() for p in layer.parameters() if p.is_floating_point()}
    with gradients_for(owners, wanted=True), evaluation_mode(network), torch.enable_grad():
        edges = _edges(forward(network, x.clone()))
    return {owners[p] for p, readers in edges.items() if p in owners and p.dim() > 1 and readers > 1}


def _edges(outputs: Any) -> Counter:
    """How many nodes of a graph read each node's output, or each parameter."""
    waiting = [t.grad_fn for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.grad_fn is not None]
    edges, seen = Counter(waiting), set(waiting)
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is None:
                continue
            edges[getattr(node, "variable", node)] += 1
            if node not in seen:
                seen.add(node)
                waiting.append(node)
    return edges


def _run(network: nn.Module, layers: dict, norms: dict, x: Tensor, forward: Forward) -> tuple[_Runs, Counter]:
    """One forward pass, and how many nodes of its graph read each node's output."""
    runs = _Runs()

    def ran(name: str):
        def hook(layer: nn.Module, args: tuple, output: Tensor) -> None:
            runs.times[name] += 1
            runs.nodes[name], runs.outputs[name] = output.grad_fn, output

        return hook

    def reads(name: str):
        def hook(norm: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            runs.times[name] += 1
            runs.read[name] = layer_input(args, kwargs).grad_fn

        return hook

    handles = [layer.register_forward_hook(ran(name)) for name, layer in layers.items()]
    handles += [norm.register_forward_pre_hook(reads(name), with_kwargs=True) for name, norm in norms.items()]
    with differentiable(network, layers.values()):
        with hooked(handles):
            outputs = forward(network, x.clone())
        # Without these hooks, since networks with checkpoints run again for gradients.
        runs.mixing = _mixing(runs, layers, outputs, len(x))
    edges = _edges(outputs)
    if runs.nodes and not edges:
        raise UserError(
            "the network's outputs have no gradients: take @torch.no_grad() away from its forward pass, or "
            "torch.inference_mode() from around it"
        )
    return runs, edges


def _mixing(runs: _Runs, layers: dict[str, nn.Module], outputs: Any, images: int) -> set[str]:
    """The layers of which several images reach the first image's result, or whose first axis is not the images'."""
    mixing = {n for n, y in runs.outputs.items() if (len(y) % images if is_linear(layers[n]) else len(y) != images)}
    seen = {name: y for name, y in runs.outputs.items() if y.requires_grad and name not in mixing}
    if seen and isinstance(outputs, Tensor) and outputs.requires_grad:
        for name, g in zip(seen, gradients(outputs[0].sum(), seen.values()), strict=True):
            if g is not None and as_images(layers[name], g, images)[1:].any():
                mixing.add(name)
    return mixing
