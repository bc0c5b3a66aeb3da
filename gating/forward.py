"""The training forward pass, as it is or compiled."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models import RoutedOutput
from models.decisions import DecisionRule

# Of images [N, 3, H, W], what makes a decision rule from random numbers, these numbers [N, ...], and whether blocks are
# skipped, see ``models.resnet.ResNet.forward``.
Forward = Callable[[Tensor, Callable[..., DecisionRule], tuple[Tensor, ...], bool], RoutedOutput]


def training_forward(network: nn.Module, compiled: bool = False) -> Forward:
    """The forward pass of ``network`` for training, with decisions made from random numbers drawn before.

    A compiler can follow tensors into a decision rule, but no random generator.  The network itself is left as it is:
    its modules and the keys of its weights keep their names, and evaluation, where blocks are skipped, runs it as ever.

    Args:
        compiled: compile it when it first runs, for each size of batch.  What was compiled for other networks is
            forgotten.
    """

    def forward(
        images: Tensor, rule: Callable[..., DecisionRule], drawn: tuple[Tensor, ...], skip: bool
    ) -> RoutedOutput:
        return network(images, decide=rule(*drawn), skip=skip)

    if not compiled:
        return forward
    torch.compiler.reset()  # stage 2 compiles a new network each iteration, and a compiler gives up after some
    return torch.compile(forward, dynamic=False)
