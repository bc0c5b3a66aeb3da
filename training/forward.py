"""The training forward pass: as it is or compiled, in float32 or with products in bf16."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.func import functional_call

from models import RoutedOutput
from models.decisions import DecisionRule
from utils import parallel
from utils.device import mixed_precision

# Of images [N, 3, H, W], what makes a decision rule from random numbers and the dtype of features, these numbers
# [N, ...], and whether blocks are skipped, see ``models.resnet.ResNet.forward``.
Forward = Callable[[Tensor, Callable[..., DecisionRule], tuple[Tensor, ...], bool], RoutedOutput]


def training_forward(network: nn.Module, precision: torch.dtype = torch.float32, compiled: bool = False) -> Forward:
    """The forward pass of ``network`` for training, with decisions made from random numbers drawn before.

    A compiler can follow tensors into a decision rule, but no random generator.  The network itself is left as it is:
    its modules and the keys of its weights keep their names, and evaluation, where blocks are skipped, runs it as ever.

    Args:
        precision: of products, from ``utils.device.pick_precision``.
        compiled: compile it when it first runs, for each size of batch; on a GPU as CUDA graphs, unless several
            processes wait for each other within it.  What was compiled for other networks is forgotten.
    """
    convolutions = [f"{name}.weight" for name, m in network.named_modules() if isinstance(m, nn.Conv2d)]

    def forward(
        images: Tensor, rule: Callable[..., DecisionRule], drawn: tuple[Tensor, ...], skip: bool
    ) -> RoutedOutput:
        call = {"decide": rule(*drawn, dtype=precision), "skip": skip}
        if precision == torch.float32:
            return network(images, **call)
        if compiled:  # a compiler merges casts by itself, and the gradients of ``_Cast`` get lost in it
            with mixed_precision(images.device, precision):
                return network(images, **call)
        weights = _Cast.apply(precision, *(network.get_parameter(name) for name in convolutions))
        with mixed_precision(images.device, precision):
            return functional_call(network, dict(zip(convolutions, weights, strict=True)), images, call)

    if not compiled:
        return forward
    torch.compiler.reset()  # stage 2 compiles a new network each iteration, and a compiler gives up after some
    graphs = next(network.parameters()).is_cuda and parallel.world_size() == 1
    return torch.compile(forward, dynamic=False, mode="reduce-overhead" if graphs else None)


class _Cast(Function):
    """All weights in another precision by one launch, and their gradients by another.

    Autocast makes two for each weight: of ResNet-32 with reduced ranks 184 launches more in a training step.
    """

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return _cast(weights, dtype)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        # Gates whose decisions are thresholded, and blocks that nobody takes, have no gradient.
        cast = iter(_cast(tuple(g for g in gradients if g is not None), torch.float32))
        return None, *(None if g is None else next(cast) for g in gradients)


def _cast(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    new = [torch.empty_like(t, dtype=dtype) for t in tensors]
    torch._foreach_copy_(new, tensors)
    return tuple(new)
