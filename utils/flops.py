"""What a network costs: its parameters, and its FLOPs layer by layer and image by image.

FLOPs are two per multiply-add of convolutions and linear layers (the LSTM's among them), for one image, and equal what
``torch.utils.flop_counter.FlopCounterMode`` counts.  Batch norms, activations and pooling are free by that convention.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends import cudnn, mkldnn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models import Cascade, OwnNetwork, ResNet, all_on, build_network
from utils.modes import evaluation_mode, frozen, hooked, layer_input
from utils.sizes import Size, height_width


@dataclass(frozen=True)
class LayerCost:
    """Cost of one convolution, linear layer or LSTM cell for one image; of several runs, the last one's positions."""

    flops: int
    positions_in: int  # H * W of the input, or tokens
    positions_out: int  # H' * W' of the output


@dataclass(frozen=True)
class NetworkCost:
    """Cost of a network for one image."""

    parameters: int  # all of them, batch norms and gates included
    flops: int  # with every block run, blocks and gates included that fixed switches have removed
    blocks: tuple[int, ...]  # FLOPs that each of the K switches saves when it closes; 0 if it is fixed open
    layers: dict[str, LayerCost]
    removed_gates: int = 0  # FLOPs of the gates that fixed switches have removed

    @property
    def shares(self) -> Tensor:
        """[K], share of each switched block in the FLOPs that can be skipped; they sum to 1."""
        blocks = torch.tensor(self.blocks, dtype=torch.float64)
        return (blocks / blocks.sum()).float() if len(blocks) else blocks.float()

    @property
    def skippable(self) -> float:
        """Share of all FLOPs that closing every switch saves."""
        return sum(self.blocks) / self.flops

    @property
    def least(self) -> float:
        """Share of all FLOPs that is left with every switch closed."""
        return 1 - (sum(self.blocks) + self.removed_gates) / self.flops

    def executed(self, decisions: Tensor) -> Tensor:
        """FLOPs spent on each image, [N] in float64, under decisions [N, K]."""
        saved = (1 - decisions.double()) @ torch.tensor(self.blocks, dtype=torch.float64, device=decisions.device)
        return self.flops - self.removed_gates - saved


def network_cost(network: ResNet | OwnNetwork | Cascade, image_size: Size) -> NetworkCost:
    """Measure the cost of ``network`` for images of three channels and ``image_size`` pixels, on a blank image.

    Blocks and gates that fixed switches have removed count with their FLOPs, but not with their parameters: so the
    computation stays comparable whether switches are fixed or not.

    Args:
        image_size: see ``utils.sizes``.
    """
    if isinstance(network, Cascade):
        return _cascade_cost([network_cost(member, image_size) for member in network.members])
    height, width = height_width(image_size)
    parameter = next(network.parameters())
    blank = torch.zeros(1, 3, height, width, device=parameter.device, dtype=parameter.dtype)
    return _switched_cost(network, blank) if network.switches else cost_on(network, blank, every_block)


def cost_on(
    network: nn.Module, x: Tensor, forward: Callable[[nn.Module, Tensor], Any] = nn.Module.__call__
) -> NetworkCost:
    """The cost of any network for one image of the shape of ``x`` [1, ...], without switches.

    Its FLOPs are those of ``FlopCounterMode``: products in attention and layers that are no modules are among them.
    """
    # Attention as matrix products, which are counted: on the CPU its fused kernel is not.
    plain_attention = sdpa_kernel(SDPBackend.MATH)
    with frozen(network), plain_attention, _plain_lstm(network), FlopCounterMode(display=False) as counter:
        layers = _layer_costs(network, x.clone(), forward)  # a network may change its input in place
    return NetworkCost(sum(p.numel() for p in network.parameters()), counter.get_total_flops(), (), layers)


@contextmanager
def _plain_lstm(network: nn.Module) -> Iterator[None]:
    """Without oneDNN and cuDNN, whose LSTMs are not counted."""
    if not any(isinstance(module, nn.RNNBase) for module in network.modules()):
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that only Intel's GPUs have TF32
        with mkldnn.flags(enabled=False), cudnn.flags(enabled=False):
            yield


@torch.no_grad()
def _switched_cost(network: ResNet, blank: Tensor) -> NetworkCost:
    layers = whole = _layer_costs(network, blank, every_block)
    if network.fixed_switches:
        before = build_network(**{**network.architecture, "fixed_switches": {}})
        whole = _layer_costs(before, blank.cpu().float(), every_block)

    def below(layers: dict[str, LayerCost], *names: str) -> int:
        return sum(cost.flops for name, cost in layers.items() if name.startswith(names))

    blocks = [
        0
        if network.fixed_switches.get(switch) == 1
        else below(whole, f"blocks.{switch + 1}.conv1", f"blocks.{switch + 1}.conv2")
        for switch in range(network.switches)
    ]
    return NetworkCost(
        parameters=sum(p.numel() for p in network.parameters()),
        flops=below(whole, ""),
        blocks=tuple(blocks),
        layers=layers,
        removed_gates=below(whole, "gate.") - below(layers, "gate."),
    )


def every_block(network: ResNet | OwnNetwork, x: Tensor) -> Tensor:
    """The logits with every block run, whatever switches say."""
    return network(x, decide=all_on, skip=False).logits


def _cascade_cost(members: list[NetworkCost]) -> NetworkCost:
    """All members together; a switch between two saves the second one's FLOPs outside of its own switched blocks."""
    between = [member.flops - member.removed_gates - sum(member.blocks) for member in members[1:]]
    return NetworkCost(
        parameters=sum(member.parameters for member in members),
        flops=sum(member.flops for member in members),
        removed_gates=sum(member.removed_gates for member in members),
        blocks=(*between, *(block for member in members for block in member.blocks)),
        layers={
            f"members.{i}.{name}": cost for i, member in enumerate(members) for name, cost in member.layers.items()
        },
    )


def _layer_costs(network: nn.Module, x: Tensor, forward: Callable[[nn.Module, Tensor], Any]) -> dict[str, LayerCost]:
    """The cost of every layer that runs, by its name."""
    layers: dict[str, LayerCost] = {}
    counted = {n: m for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.LSTMCell)}
    recorders = (m.register_forward_hook(_recorder(n, layers), with_kwargs=True) for n, m in counted.items())
    with hooked(recorders), evaluation_mode(network):
        forward(network, x)
    return layers


def _recorder(name: str, layers: dict[str, LayerCost]):
    def record(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        positions_in = positions_out = 1
        if isinstance(module, nn.Conv2d):
            positions_in, positions_out = layer_input(args, kwargs).shape[2:].numel(), output.shape[2:].numel()
            weights = [module.weight]
        elif isinstance(module, nn.Linear):
            positions_in = positions_out = output.numel() // module.out_features
            weights = [module.weight]
        else:
            weights = [module.weight_ih, module.weight_hh]
        flops = 2 * sum(weight.numel() for weight in weights) * positions_out
        before = layers.get(name)  # the LSTM runs once per switch: its FLOPs add up
        layers[name] = LayerCost(flops + (before.flops if before else 0), positions_in, positions_out)

    return record
