"""ResNets for CIFAR-10 as they are usually published, the example of a network in a file of your own.

Source: arXiv:1512.03385, section 4.2: three groups of n basic blocks with 16, 32 and 64 channels and shortcuts without
parameters.  The names of the weights are those of github.com/akamaster/pytorch_resnet_cifar10, whose trained networks
fit; they take RGB in [0, 1], minus (0.485, 0.456, 0.406), over (0.229, 0.224, 0.225).

    from examples.cifar_resnet import resnet56
    from pruning import compress

    smaller = compress(network, batches, flops=0.5)
"""

from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut that takes every second pixel and adds channels of zeros where needed."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.stride = 1 if in_channels == channels else 2
        self.added = (channels - in_channels) // 2  # channels of zeros, before and behind
        self.conv1 = nn.Conv2d(in_channels, channels, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, channels, H / stride, W / stride]."""
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added, self.added))
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(shortcut + residual)


class CifarResNet(nn.Module):
    """Depth 6n + 2.

    Args:
        n: blocks in each group.
        classes: of the images.
    """

    def __init__(self, n: int, classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(Block(before if i == 0 else channels, channels) for i in range(n)))
            for before, channels in ((16, 16), (16, 32), (32, 64))
        )
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> scores [N, classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3)))


def resnet20() -> CifarResNet:
    return CifarResNet(3)


def resnet32() -> CifarResNet:
    return CifarResNet(5)


def resnet44() -> CifarResNet:
    return CifarResNet(7)


def resnet56() -> CifarResNet:
    return CifarResNet(9)
