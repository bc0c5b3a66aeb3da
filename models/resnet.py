"""The CIFAR ResNet with a switch before every residual block but the first."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.convolution import SafeConv2d
from models.decisions import DecisionRule, all_on, thresholded
from models.edits import Edit, apply_edits, edits_of
from models.gates import FeedForwardGate, RecurrentGate

NETWORKS = ("resnet",)
GATES = ("rnn", "ff1", "ff2", "none")

DEEPEST = 1202  # of the networks that were published


def check_depth(depth: int) -> None:
    """Refuse an impossible depth.

    Raises:
        ValueError: unless it is 6n + 2, n >= 1, and ``DEEPEST`` at most.
    """
    if not 8 <= depth <= DEEPEST or (depth - 2) % 6 != 0:
        raise ValueError(
            f"depth {depth} is not of the form 6n+2, or it is above {DEEPEST}: use 8, 14, 20, 26, 32, 38, 44, 50, 56 "
            f"or 110"
        )


class RoutedOutput(NamedTuple):
    """The output of the network for N images and K switches (K = 0 without gates)."""

    logits: Tensor  # [N, classes]
    probabilities: Tensor  # [N, K], that each switched block runs
    decisions: Tensor  # [N, K], what was decided: 0 or 1


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm beside a shortcut; the shortcut is a 1x1 projection where shapes change.

    Source: ResNet (arXiv:1512.03385), section 4.2.

    Args:
        inner: channels between the two convolutions; ``out_channels`` unless channels were pruned there.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, inner: int | None = None):
        super().__init__()
        inner = out_channels if inner is None else inner
        self.conv1 = nn.Conv2d(in_channels, inner, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                SafeConv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def residual(self, x: Tensor) -> Tensor:
        """The residual branch, not computed in a skipped block."""
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))

    def carried(self, x: Tensor) -> Tensor:
        """The shortcut branch, computed in any case."""
        return x if self.shortcut is None else self.shortcut(x)

    def forward(self, x: Tensor, decisions: Tensor | None = None) -> Tensor:
        """relu(shortcut(x) + z * residual(x)), computed on all images, z = 1 where no ``decisions`` [N] are given."""
        carried, residual = self.carried(x), self.residual(x)
        if decisions is None:
            return F.relu(carried + residual)
        return F.relu(carried + decisions.to(residual.dtype).view(-1, 1, 1, 1) * residual)

    def skipping(self, x: Tensor, decisions: Tensor) -> Tensor:
        """The same output, with the residual computed only on the images whose decision is 1."""
        selected = decisions.nonzero().squeeze(1)
        if len(selected) == len(x):
            return self(x)
        carried = self.carried(x)
        if len(selected) == 0:
            # The input of an identity shortcut is the output of a relu; a second relu would not change it.
            return x if self.shortcut is None else F.relu(carried)
        residual = self.residual(x.index_select(0, selected)).to(carried.dtype)
        if carried.is_contiguous():
            return carried.index_add(0, selected, residual).relu_()
        # In channels-last layout on a contiguous view, which is several times faster.
        added = carried.permute(0, 2, 3, 1).index_add(0, selected, residual.permute(0, 2, 3, 1)).relu_()
        return added.permute(0, 3, 1, 2)


class ShortcutBlock(nn.Module):
    """The shortcut of a ``BasicBlock`` whose switch is fixed closed."""

    def __init__(self, block: BasicBlock):
        super().__init__()
        self.shortcut = block.shortcut

    def forward(self, x: Tensor) -> Tensor:
        """relu(shortcut(x)), for x that comes out of a relu."""
        return x if self.shortcut is None else F.relu(self.shortcut(x))


class ResNet(nn.Module):
    """ResNet of depth 6n + 2 for small images: a stem, three groups of n basic blocks, a linear classifier.

    The groups have widths (w, 2w, 4w); the second and third halve the resolution.  Without gates, at depth 32, width
    64 and 100 classes it has 7,451,044 parameters and takes 2,201,405,440 FLOPs for a 32x32 image.

    Args:
        depth: 6n + 2, n >= 1.
        num_classes: number of classes.
        width: channels of the first group.
        gate: kind of switch, one of ``GATES``.
        edits: of the layers that static pruning has rebuilt, see ``models.edits.apply_edits``.
        inner: for every block whose inner channels were pruned, its name and the channels left between its two
            convolutions.
        fixed_switches: for every block whose switch no longer decides, its name and what was decided for all images: 0
            leaves its residual out, 1 runs it always.  ``edits`` and ``inner`` still say what the residual was.

    Raises:
        ValueError: for a depth, gate, edit, inner width or fixed switch that does not exist.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int,
        width: int = 64,
        gate: str = "rnn",
        edits: Sequence[Edit] = (),
        inner: Mapping[str, int] | None = None,
        fixed_switches: Mapping[str, int] | None = None,
    ):
        super().__init__()
        check_depth(depth)
        if gate not in GATES:
            raise ValueError(f"gate {gate!r} is unknown: use one of {', '.join(GATES)}")
        self._built_as = {
            "network": "resnet",
            "depth": depth,
            "num_classes": num_classes,
            "width": width,
            "gate": gate,
            "edits": [dict(edit) for edit in edits],
            "inner": dict(inner or {}),
            "fixed_switches": dict(fixed_switches or {}),
        }
        widths = [width * 2**group for group in range(3) for _ in range((depth - 2) // 6)]
        inputs = [width, *widths[:-1]]
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        names = [f"blocks.{block}" for block in range(len(widths))]
        for name, channels in self._built_as["inner"].items():
            if name not in names or channels < 1:
                raise ValueError(f"inner gives {name!r} {channels} channels: it takes names of blocks and 1 or more")
        self.blocks = nn.ModuleList(
            BasicBlock(i, o, 1 if i == o else 2, self._built_as["inner"].get(name))
            for name, i, o in zip(names, inputs, widths, strict=True)
        )
        self.gate = _build_gate(gate, inputs[1:])
        self.classifier = nn.Linear(widths[-1], num_classes)
        self._initialise()
        apply_edits(self, self._built_as["edits"])
        for name, on in self._built_as["fixed_switches"].items():
            if gate == "none" or name not in names[1:] or on not in (0, 1):
                raise ValueError(
                    f"fixed_switches gives {name!r} the decision {on!r}: it takes names of switched blocks, 0 and 1"
                )
        # Decisions that are fixed for all images, by the index of the switch.
        self.fixed_switches = {names.index(name) - 1: on for name, on in self._built_as["fixed_switches"].items()}
        self._remove_what_is_fixed()

    @property
    def architecture(self) -> dict[str, Any]:
        """The arguments of ``build_network`` that make this network, plain data.

        Edits are those of the present layers; a removed block keeps the ones it had.
        """
        removed = tuple(f"{block}.conv" for block in self.removed_blocks)
        kept = [edit for edit in self._built_as["edits"] if edit["name"].startswith(removed)]
        return copy.deepcopy({**self._built_as, "edits": [*edits_of(self), *kept]})

    @property
    def switches(self) -> int:
        """K, the number of switches, fixed ones among them."""
        return 0 if self.gate is None else len(self.blocks) - 1

    @property
    def removed_blocks(self) -> list[str]:
        """Names of the blocks that no image runs and whose residuals are gone."""
        return [f"blocks.{switch + 1}" for switch, on in self.fixed_switches.items() if not on]

    @property
    def plain_blocks(self) -> dict[str, BasicBlock]:
        """The blocks, by name, whose residuals are two plain convolutions."""
        named = ((f"blocks.{i}", block) for i, block in enumerate(self.blocks) if isinstance(block, BasicBlock))
        return {name: b for name, b in named if type(b.conv1) is type(b.conv2) is nn.Conv2d}

    @property
    def free_switches(self) -> list[int]:
        """Indices of the switches that decide image by image."""
        return [switch for switch in range(self.switches) if switch not in self.fixed_switches]

    def asks(self, switch: int) -> bool:
        """Whether the gate runs at a switch: if it decides, or if a later switch needs the state."""
        later = any(free > switch for free in self.free_switches)
        return switch not in self.fixed_switches or (self.gate.recurrent and later)

    def _remove_what_is_fixed(self) -> None:
        for switch, on in self.fixed_switches.items():
            if not on:
                self.blocks[switch + 1] = ShortcutBlock(self.blocks[switch + 1])
            if not self.asks(switch):
                self.gate.remove(switch)

    def _initialise(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d) and not name.startswith("gate."):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor, decide: DecisionRule = thresholded, skip: bool | None = None) -> RoutedOutput:
        """Classify normalised images.

        Args:
            images: [N, 3, H, W], normalised as the checkpoint says.
            decide: how probabilities become decisions, see ``models.decisions``.
            skip: true runs a block only on the images whose decision is 1; false runs it on all images and multiplies
                by the decisions, as gradients through the decisions need.  Default: true in evaluation mode.
        """
        skip = not self.training if skip is None else skip
        x = F.relu(self.stem(images))
        x = self.blocks[0](x)
        probabilities, decisions, state = [], [], None
        for switch, block in enumerate(self.blocks[1:]):
            if self.gate is None:
                x = block(x)
                continue
            if self.asks(switch):
                probability, state = self.gate(switch, x, state)
            if switch in self.fixed_switches:
                probability = next(self.classifier.parameters()).new_full((len(x),), self.fixed_switches[switch])
                decide(probability)  # a rule may hold a column for every switch
                decision, x = probability, block(x)
            else:
                decision = decide(probability)
                if skip and decide is not all_on:
                    x = block.skipping(x, decision)
                else:
                    x = block(x, None if decide is all_on else decision)
            probabilities.append(probability)
            decisions.append(decision)
        with torch.autocast(x.device.type, enabled=False):  # logits of 8 bits would tie
            logits = self.classifier(x.mean(dim=(2, 3), dtype=next(self.classifier.parameters()).dtype))
        if self.gate is None:
            none = torch.empty(len(images), 0, device=logits.device)
            return RoutedOutput(logits, none, none)
        return RoutedOutput(logits, torch.stack(probabilities, dim=1), torch.stack(decisions, dim=1))


def _build_gate(kind: str, channels: list[int]) -> nn.Module | None:
    if kind == "none":
        return None
    return RecurrentGate(channels) if kind == "rnn" else FeedForwardGate(channels, kind)
