"""Gates: small networks that read the features so far and give the probability that the next block runs."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEATURES = 10
OPENING = 2.0  # initial logit, positive so that training starts from the whole network


class RecurrentGate(nn.Module):
    """One LSTM for all switches, with one step per block.

    Global average pool -> projection of the block's input channels to 10 -> LSTM with 10 units -> linear -> sigmoid.
    About 0.003% of the FLOPs of the blocks at width 64.

    Source: SkipNet (arXiv:1711.09485), section 3.1 and figure 3 (RNNGate).  The batch norm behind each projection is
    an addition: pooled features of different images differ by little against their mean, and a gate that sees them
    unscaled learns to decide the same for all images.

    Args:
        channels: input channels of each switched block, in order.
    """

    recurrent = True  # a later switch depends on the state that the earlier ones left

    def __init__(self, channels: list[int]):
        super().__init__()
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Linear(c, FEATURES, bias=False), nn.BatchNorm1d(FEATURES)) for c in channels
        )
        self.lstm = nn.LSTMCell(FEATURES, FEATURES)
        self.decision = nn.Linear(FEATURES, 1)
        nn.init.constant_(self.decision.bias, OPENING)

    @property
    def last_layers(self) -> list[nn.Linear]:
        """The layers whose outputs are the switches' logits: one for all of them, or one for each."""
        return [self.decision]

    def remove(self, switch: int) -> None:
        """Remove the layers of a switch that is never computed; with the last one, those of all switches."""
        self.projections[switch] = nn.Identity()
        if all(isinstance(projection, nn.Identity) for projection in self.projections):
            self.lstm = self.decision = nn.Identity()

    def forward(self, switch: int, features: Tensor, state: tuple | None) -> tuple[Tensor, tuple]:
        """Probability that the block behind ``switch`` runs.

        Args:
            switch: index of the switch, 0 for the first switched block.
            features: [N, C, H, W], the input of that block.
            state: what the previous switch returned, None at the first.

        Returns:
            probabilities [N] in float32 and the state for the next switch.
        """
        # Float32, so that a probability near one half decides the same in every precision of the network.
        with torch.autocast(features.device.type, enabled=False):
            pooled = features.mean(dim=(2, 3), dtype=self.decision.weight.dtype)
            state = self.lstm(self.projections[switch](pooled), state)
            return torch.sigmoid(self.decision(state[0])).squeeze(1), state


class FeedForwardGate(nn.Module):
    """A separate small convolutional network for every switch.

    ``ff1``: max pool, 3x3 convolution, 3x3 convolution with stride 2, each with batch norm and relu; then global
    average pool, linear, sigmoid.  5/32 (16%) of the FLOPs of an identity block.
    ``ff2``: one 3x3 convolution with stride 2, batch norm, relu; pool, linear, sigmoid.  1/8 of such a block.

    Source: SkipNet (arXiv:1711.09485), section 3.1 and figure 3 (FFGate-I and FFGate-II).

    Args:
        channels: input channels of each switched block, in order.
        kind: "ff1" or "ff2".
    """

    recurrent = False

    def __init__(self, channels: list[int], kind: str):
        super().__init__()
        self.pools = kind == "ff1"
        strides = (1, 2) if kind == "ff1" else (2,)
        self.features = nn.ModuleList(nn.Sequential(*(_convolution(c, stride) for stride in strides)) for c in channels)
        self.decisions = nn.ModuleList(nn.Linear(c, 1) for c in channels)
        for decision in self.decisions:
            nn.init.constant_(decision.bias, OPENING)

    @property
    def last_layers(self) -> list[nn.Linear]:
        """As ``RecurrentGate.last_layers``, of the switches that are computed."""
        return [layer for layer in self.decisions if isinstance(layer, nn.Linear)]

    def remove(self, switch: int) -> None:
        """As ``RecurrentGate.remove``."""
        self.features[switch] = self.decisions[switch] = nn.Identity()

    def forward(self, switch: int, features: Tensor, state: None) -> tuple[Tensor, None]:
        """As ``RecurrentGate.forward``; there is no state to hand on."""
        if self.pools:
            features = F.max_pool2d(features, 2, ceil_mode=True)
        decision = self.decisions[switch]
        pooled = self.features[switch](features).mean(dim=(2, 3), dtype=decision.weight.dtype)
        with torch.autocast(features.device.type, enabled=False):
            return torch.sigmoid(decision(pooled)).squeeze(1), None


def _convolution(channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
