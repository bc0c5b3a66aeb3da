"""The training forward pass: as it is or compiled, in float32 or with products in bf16."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from models import RoutedOutput
from models.decisions import DecisionRule
from utils import parallel
from utils.device import mixed_precision
from utils.errors import UserError

RuleMaker = Callable[[Tensor], DecisionRule]  # from random numbers [N, ...] that were drawn before
# From images [N, 3, H, W], the maker of a decision rule, its random numbers, and whether blocks are skipped, to the
# outputs of ``models.resnet.ResNet.forward``.
Forward = Callable[[Tensor, RuleMaker, Tensor, bool], RoutedOutput]


def training_forward(network: nn.Module, precision: torch.dtype = torch.float32, compiled: bool = False) -> Forward:
    """The forward pass of ``network`` for training, with decisions made from random numbers drawn before.

    A compiler can follow tensors into a decision rule, but no random generator.  The network itself is left as it is:
    its modules and the keys of its weights keep their names, and evaluation, where blocks are skipped, runs it as ever.

    Args:
        precision: of products, from ``utils.device.pick_precision``.
        compiled: compile it when it first runs, for each size of batch; on a GPU as CUDA graphs.  What was compiled for
            other networks is forgotten.

    Raises:
        UserError: where several processes train, whose shared norms torch 2.11 compiles to wrong gradients.
    """

    def forward(images: Tensor, rule: RuleMaker, drawn: Tensor, skip: bool) -> RoutedOutput:
        with mixed_precision(images.device, precision):
            return network(images, decide=rule(drawn), skip=skip)

    if not compiled:
        return forward
    if parallel.world_size() > 1:
        raise UserError(f"compile works in one process and {parallel.world_size()} share this run: leave it out")
    _check_compiler(next(network.parameters()).device)
    torch.compiler.reset()  # stage 2 compiles a new network each iteration, and a compiler gives up after some
    on_gpu = next(network.parameters()).is_cuda
    return torch.compile(forward, dynamic=False, mode="reduce-overhead" if on_gpu else None)


@cache
def _check_compiler(device: torch.device) -> None:
    """Compile next to nothing, for what PyTorch says without a C++ compiler, or Triton on a GPU, fills a screen.

    Raises:
        UserError: if nothing can be compiled here.
    """
    try:
        torch.compile(lambda x: 2 * x)(torch.ones(2, device=device))
    except Exception as error:  # of many kinds, by version and by what is missing
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"PyTorch cannot compile here ({reason[:160]}): install a C++ compiler such as g++, or leave --compile out"
        ) from None
