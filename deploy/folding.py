"""The same function in fewer layers: batch norms folded into their neighbours, successive convolutions multiplied out.

Every function returns new modules and leaves its arguments as they are.  Products are taken in float64 and rounded
once, to the dtype that the weights had.

What is merged: each batch norm into the convolution before it (the last of a low-rank layer's), or into the linear
projection of a gate, and that into the gate's LSTM; the convolutions of one low-rank layer with each other, in the
grouping with the fewest FLOPs; the stride of a 1x1 core into the rotation before it; the scale of the normalisation
into the stem.  What cannot be merged: two layers of a block (a relu stands between), a block's last rotation and the
next block's first (the residual sum and a relu), the mean of the normalisation (the stem pads with zeros after it was
subtracted).
"""

import copy

import torch
from torch import Tensor, nn

from models import ResNet
from models.gates import RecurrentGate
from models.resnet import BasicBlock
from utils.data.augment import Normalisation


def deployable(network: ResNet, normalisation: Normalisation) -> ResNet:
    """The network as it is exported: folded, and taking uint8 images [N, 3, H, W]."""
    return taking_pixels(folded(network), normalisation)


def folded(network: ResNet) -> ResNet:
    """The network in evaluation mode without batch norms and with every chain of convolutions in its cheapest form."""
    smaller = copy.deepcopy(network).eval()
    pairs = [(smaller, "stem")]
    for block in smaller.blocks:
        if block.shortcut is not None:
            pairs.append((block, "shortcut"))
        for conv, norm in (("conv1", "bn1"), ("conv2", "bn2")) if isinstance(block, BasicBlock) else ():
            setattr(block, conv, _condensed([getattr(block, conv), getattr(block, norm)]))
            setattr(block, norm, nn.Identity())
    for owner, name in pairs:
        setattr(owner, name, _condensed(list(getattr(owner, name))))
    if smaller.gate is not None:
        _fold_sequences(smaller.gate)
        if isinstance(smaller.gate, RecurrentGate):
            smaller.gate = FoldedRecurrentGate(smaller.gate)
    return smaller


def taking_pixels(network: ResNet, normalisation: Normalisation) -> ResNet:
    """A folded network that takes uint8 images [N, 3, H, W]: the scale in the stem's weights, the mean subtracted."""
    changed = copy.deepcopy(network)
    convs = linear_chain(changed.stem)
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (normalisation.mean, normalisation.std))
    weight = convs[0].weight
    weight.data = (weight.data.double() / (255 * std.to(weight.device)).view(1, 3, 1, 1)).to(weight.dtype)
    changed.stem = nn.Sequential(Centred((255 * mean).to(weight.dtype)), *convs)
    return changed


def without_switches(network: ResNet) -> ResNet:
    """The network that runs every block on every image, its gate left out."""
    plain = copy.deepcopy(network)
    plain.gate = None
    return plain


class Centred(nn.Module):
    """uint8 pixels [N, 3, H, W] minus the mean pixel [3], as floating-point numbers."""

    def __init__(self, mean: Tensor):
        super().__init__()
        self.register_buffer("mean", mean.view(1, 3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.mean.dtype) - self.mean


class FoldedRecurrentGate(nn.Module):
    """A ``RecurrentGate`` whose projections, without batch norms, are multiplied into the LSTM's input weights.

    Each switch has an LSTM cell of its own, whose recurrent weights all share.
    """

    recurrent = True

    def __init__(self, gate: RecurrentGate):
        super().__init__()
        self.cells = nn.ModuleList(_merged(projection, gate.lstm) for projection in gate.projections)
        self.decision = gate.decision

    def forward(self, switch: int, features: Tensor, state: tuple | None) -> tuple[Tensor, tuple]:
        """As ``RecurrentGate.forward``."""
        h, c = self.cells[switch](features.mean(dim=(2, 3)), state)
        return torch.sigmoid(self.decision(h)).squeeze(1), (h, c)


def _merged(projection: nn.Module, lstm: nn.LSTMCell) -> nn.Module:
    """The LSTM cell that does what ``projection``, a linear layer in a sequence, and then ``lstm`` do."""
    if isinstance(projection, nn.Identity):  # of a switch that is never computed
        return projection
    (w1, b1), w2 = _double(projection[0]), lstm.weight_ih.detach().double()
    cell = copy.deepcopy(lstm)
    cell.input_size = w1.shape[1]
    cell.weight_hh, cell.bias_hh = lstm.weight_hh, lstm.bias_hh
    cell.weight_ih = nn.Parameter((w2 @ w1).to(lstm.weight_ih.dtype))
    cell.bias_ih = nn.Parameter((w2 @ b1 + lstm.bias_ih.detach().double()).to(lstm.bias_ih.dtype))
    return cell


def linear_chain(layer: nn.Module) -> list[nn.Conv2d]:
    """The convolutions of a layer in the order in which they are applied, which is the order of registration.

    Raises:
        TypeError: if the layer holds anything else, which might not be linear.
    """
    if isinstance(layer, nn.Conv2d):
        return [layer]
    children = list(layer.children())
    if not children and not isinstance(layer, nn.Identity):
        raise TypeError(f"{type(layer).__name__} is no chain of convolutions")
    return [conv for child in children for conv in linear_chain(child)]


def with_batch_norm(layer: nn.Conv2d | nn.Linear, norm: nn.BatchNorm2d | nn.BatchNorm1d) -> nn.Conv2d | nn.Linear:
    """The convolution or linear layer that does what ``layer`` and then ``norm``, in evaluation mode, do."""
    weight, bias = _double(layer)
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double() * scale
    if norm.affine:
        scale, shift = scale * norm.weight.double(), shift * norm.weight.double() + norm.bias.double()
    return _rebuilt(layer, weight * scale.view(-1, *[1] * (weight.dim() - 1)), bias * scale + shift)


def multiplied_out(first: nn.Conv2d, second: nn.Conv2d) -> nn.Conv2d | None:
    """One convolution for two in a row; None if none of the larger one's size equals them.

    One of the two must be 1x1, unpadded and ungrouped.  A 1x1 before a larger core must have stride 1 and, since the
    core pads its input with zeros, no bias.
    """
    if first.groups != 1 or second.groups != 1:
        return None
    (w1, b1), (w2, b2) = _double(first), _double(second)
    if _pointwise(second):
        weight = torch.einsum("om,mihw->oihw", w2[:, :, 0, 0], w1)
        shape, stride = first, tuple(a * b for a, b in zip(first.stride, second.stride, strict=True))
    elif _pointwise(first) and first.stride == (1, 1) and (first.bias is None or second.padding == (0, 0)):
        weight = torch.einsum("omhw,mi->oihw", w2, w1[:, :, 0, 0])
        shape, stride = second, second.stride
    else:
        return None
    product = nn.Conv2d(
        first.in_channels, second.out_channels, shape.kernel_size, stride, shape.padding, shape.dilation,
        bias=first.bias is not None or second.bias is not None,
        device=first.weight.device, dtype=first.weight.dtype,
    )  # fmt: skip
    return _filled(product, weight, torch.einsum("omhw,m->o", w2, b1) + b2)


def cheapest_grouping(chain: list[nn.Conv2d]) -> list[nn.Conv2d]:
    """The chain with neighbours multiplied out if that gives fewer FLOPs, or as many in fewer layers."""
    chain = _strided_early(chain)
    forms = [chain]
    for i in range(len(chain) - 1):
        product = multiplied_out(chain[i], chain[i + 1])
        if product is not None:
            forms.append(cheapest_grouping([*chain[:i], product, *chain[i + 2 :]]))
    return min(forms, key=lambda form: (_relative_cost(form), len(form)))


def _condensed(layers: list[nn.Module]) -> nn.Module:
    """A layer and the batch norm behind it as one convolution or a sequence of them."""
    layer, norm = layers
    chain = linear_chain(layer)
    chain = cheapest_grouping([*chain[:-1], with_batch_norm(chain[-1], norm)])
    return chain[0] if len(chain) == 1 else nn.Sequential(*chain)


def _fold_sequences(module: nn.Module) -> None:
    """Fold, in place, each batch norm that follows a convolution or linear layer in a sequence below ``module``."""
    for sequence in [m for m in module.modules() if isinstance(m, nn.Sequential)]:
        for i in range(1, len(sequence)):
            layer, norm = sequence[i - 1], sequence[i]
            if isinstance(layer, nn.Conv2d | nn.Linear) and isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
                sequence[i - 1], sequence[i] = with_batch_norm(layer, norm), nn.Identity()


def _strided_early(chain: list[nn.Conv2d]) -> list[nn.Conv2d]:
    """The stride of a 1x1 convolution moved to the 1x1 before it, which then skips the dropped positions."""
    moved = list(chain)
    for i in range(len(moved) - 1, 0, -1):
        first, second = moved[i - 1], moved[i]
        if _pointwise(first) and _pointwise(second) and second.stride != (1, 1):
            moved[i - 1], moved[i] = copy.copy(first), copy.copy(second)
            moved[i - 1].stride = tuple(a * b for a, b in zip(first.stride, second.stride, strict=True))
            moved[i].stride = (1, 1)
    return moved


def _pointwise(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == (1, 1) and conv.padding == (0, 0) and conv.groups == 1


def _relative_cost(chain: list[nn.Conv2d]) -> float:
    """Multiply-adds of a chain for each position of its input."""
    cost, positions = 0.0, 1.0
    for conv in chain:
        positions /= conv.stride[0] * conv.stride[1]
        cost += conv.weight.numel() * positions
    return cost


def _double(layer: nn.Conv2d | nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias (zeros where there is none) in float64, detached."""
    weight = layer.weight.detach().double()
    return weight, weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().double()


def _rebuilt(layer: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor) -> nn.Conv2d | nn.Linear:
    changed = copy.deepcopy(layer)
    changed.bias = nn.Parameter(layer.weight.detach().new_zeros(len(weight)))
    return _filled(changed, weight, bias)


def _filled(layer: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor) -> nn.Conv2d | nn.Linear:
    with torch.no_grad():
        layer.weight.copy_(weight)
        if layer.bias is not None:
            layer.bias.copy_(bias)
    return layer.eval()
