"""Networks of a user's own, good and bad, for the tests of the commands."""

import torch
from torch import Tensor, nn


class Small(nn.Module):
    """Two convolutions, a batch norm behind the first, and a linear layer."""

    def __init__(self, classes: int = 3):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 32, (3, 1), padding="same")
        self.head = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.head(torch.relu(self.conv2(x)).mean(dim=(2, 3)))


def small() -> Small:
    return Small()


def again() -> Small:
    return Small()


def four_classes() -> Small:
    return Small(4)


def with_argument(width: int) -> nn.Module:
    return Small(width)


def not_a_module() -> int:
    return 3


def twice_named() -> Small:
    """A network of which one layer has a second name."""
    network = Small()
    network.last = network.head
    return network


class Named(nn.Module):
    """Returns a dictionary, has a part called ``module``, and is in float64."""

    def __init__(self):
        super().__init__()
        self.module = Small()
        self.double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.module(x), "pixels": x}


def named() -> Named:
    return Named()


def frozen() -> nn.Module:
    return Small().requires_grad_(False)


class Smoothed(Small):
    """Resizes in a way that ONNX lacks."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.interpolate(x, size=6, mode="bilinear", antialias=True))


def smoothed() -> Smoothed:
    return Smoothed()


class Pair(Small):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


def pair() -> Pair:
    return Pair()


class Large(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unfold(2, 64, 64)[..., 0])


def large() -> Large:
    return Large()
