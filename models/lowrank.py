"""The layers that static pruning builds: a small core between two rotations, or two factors."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from models.convolution import SafeConv2d

Ranks = Sequence[int | None]  # channels that enter and leave the core; None where the core has no rotation on that side


class ComposedKernel(Tensor):
    """The kernel that a layer multiplies out to, for code that reads ``weight`` instead of calling the layer.

    Shape, type and device cost nothing; for all else the kernel is multiplied out, and results are plain tensors.
    PyTorch's fused transformer layer, which would compute with the whole kernel, calls the smaller layers instead, as
    it does for every tensor with a ``__torch_function__``.
    """

    compose: Callable[[], Tensor]

    @classmethod
    def of(cls, shape: Sequence[int], like: Tensor, compose: Callable[[], Tensor]) -> Tensor:
        """The kernel of ``shape`` that ``compose`` returns, of the type and on the device of ``like``."""
        if torch.compiler.is_compiling():  # compilers and exporters drop what is not used
            return compose()
        # Not a number, if ever something came past the function below.
        kernel = like.detach().new_full((), math.nan).expand(*shape).as_subclass(cls)
        kernel.compose = compose
        with torch._C.DisableTorchFunctionSubclass():
            return kernel.requires_grad_(like.requires_grad)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = args, kwargs or {}
        name, written = getattr(func, "__name__", ""), [*args[:1], *(given[1].get(key) for key in ("out", "tensor"))]
        changes = name in _CHANGES or (name.endswith("_") and not name.endswith("__")) or "out" in given[1]
        if changes and any(isinstance(tensor, cls) for tensor in written):
            raise RuntimeError("a layer that was replaced has no weight to write to: change its core and rotate_out")
        with torch._C.DisableTorchFunctionSubclass():
            if func == Tensor.data.__get__:  # which may be written to as well
                kernel = args[0]
                return cls.of(kernel.shape, kernel.detach(), lambda: kernel.compose().detach())
            like_it = func in (Tensor.to, Tensor.type_as) and not isinstance(args[0], cls)
            if func not in _FREE and not like_it:
                given = tree_map_only(cls, lambda kernel: kernel.compose(), given)
            return func(*given[0], **given[1])


_CHANGES = (
    "__set__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__",
    "__ipow__",
)  # fmt: skip
_FREE = {
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "is_cuda", "is_meta", "layout", "requires_grad")
    ),
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.get_device,
    Tensor.__len__, torch.zeros_like, torch.ones_like, torch.empty_like, Tensor.new_zeros, Tensor.new_ones,
    Tensor.new_empty, Tensor.new_full,
}  # fmt: skip


class LowRankConv2d(nn.Module):
    """Convolution in a reduced basis: 1x1 (in -> c), the core k x k (c -> r), 1x1 (r -> out).

    Source: EigenDamage (arXiv:1905.05934), section 4 and figure 1.  A side that keeps all its directions may go
    without its rotation, since an orthogonal rotation that drops nothing can be merged into the core.  Of a 1x1
    convolution the core is the first of two factors.

    Args:
        layer: the convolution that it replaces, plain or of low rank.  The core has its kernel size, stride, padding
            and dilation; the rotations are 1x1 with stride 1.
        ranks: c, or None for a core that reads the input as it is; r, or None for one that writes the output as it is.
        depthwise: whether every channel of the core is filtered on its own, c = r: the depthwise separable form.
        bias: whether there is one, in the last convolution.
    """

    def __init__(self, layer: nn.Module, ranks: Ranks, depthwise: bool = False, bias: bool = False):
        super().__init__()
        # These describe the whole layer, as those of the plain convolution that it replaces.
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.stride = layer.kernel_size, layer.stride
        self.padding, self.dilation = layer.padding, layer.dilation
        self.groups, self.padding_mode, self.transposed, self.output_padding = 1, "zeros", False, (0, 0)
        rank_in, rank_out = ranks
        core_in = layer.in_channels if rank_in is None else rank_in
        core_out = layer.out_channels if rank_out is None else rank_out
        self.rotate_in = None if rank_in is None else nn.Conv2d(layer.in_channels, core_in, 1, bias=False)
        self.core = SafeConv2d(
            core_in, core_out, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
            groups=core_in if depthwise else 1, bias=bias and rank_out is None,
        )  # fmt: skip
        self.rotate_out = None if rank_out is None else nn.Conv2d(core_out, layer.out_channels, 1, bias=bias)

    @property
    def weight(self) -> Tensor:
        """[out, in, kh, kw]"""
        shape = (self.out_channels, self.in_channels, *self.kernel_size)
        return ComposedKernel.of(shape, self.core.weight, self._composed)

    def _composed(self) -> Tensor:
        sides = (None if side is None else side.weight.flatten(1) for side in (self.rotate_in, self.rotate_out))
        return multiplied_out(self.core.weight, *sides, self.depthwise)

    @property
    def bias(self) -> nn.Parameter | None:
        return (self.rotate_out or self.core).bias

    @property
    def depthwise(self) -> bool:
        return self.core.groups > 1

    @property
    def ranks(self) -> list[int | None]:
        """[rank_in, rank_out] as they were given."""
        return [
            None if self.rotate_in is None else self.core.in_channels,
            None if self.rotate_out is None else self.core.out_channels,
        ]

    def forward(self, input: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, H', W']."""
        x = self.core(input if self.rotate_in is None else self.rotate_in(input))
        return x if self.rotate_out is None else self.rotate_out(x)


def multiplied_out(core: Tensor, rotate_in: Tensor | None, rotate_out: Tensor | None, depthwise: bool) -> Tensor:
    """The kernel [out, in, kh, kw] of a core between rotations [c, in] and [out, r]; None is the identity."""
    if depthwise:
        return torch.einsum("or,rhw,ri->oihw", rotate_out, core[:, 0], rotate_in)
    if rotate_in is not None:
        core = torch.einsum("rchw,ci->rihw", core, rotate_in)
    return core if rotate_out is None else torch.einsum("or,rihw->oihw", rotate_out, core)


class LowRankLinear(nn.Module):
    """Linear layer in two factors: in -> rank -> out.

    Args:
        bias: whether there is one, in the second factor.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.core = nn.Linear(in_features, rank, bias=False)
        self.rotate_out = nn.Linear(rank, out_features, bias=bias)

    @property
    def weight(self) -> Tensor:
        """[out, in]"""
        shape = (self.out_features, self.in_features)
        return ComposedKernel.of(shape, self.core.weight, lambda: self.rotate_out.weight @ self.core.weight)

    @property
    def bias(self) -> nn.Parameter | None:
        return self.rotate_out.bias

    @property
    def ranks(self) -> list[int | None]:
        """[None, rank], as those of a 1x1 convolution."""
        return [None, self.core.out_features]

    @property
    def depthwise(self) -> bool:
        return False

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.rotate_out(self.core(input))


LOW_RANK = (LowRankConv2d, LowRankLinear)
# Attributes that PyTorch gives its layers.
_OWN = {*vars(nn.Conv2d(1, 1, 1, device="meta")), *vars(nn.Linear(1, 1, device="meta"))}


def low_rank(layer: nn.Module, ranks: Ranks, depthwise: bool, bias: bool) -> nn.Module:
    """A layer of low rank with the inputs, outputs, device, dtype and mode of ``layer``, and fresh weights.

    Args:
        layer: a convolution or linear layer, or what has replaced one.

    Raises:
        ValueError: for ranks that the layer cannot have.
    """
    rank_in, rank_out = ranks
    if any(rank is not None and rank < 1 for rank in ranks) or (rank_in, rank_out) == (None, None):
        raise ValueError(f"ranks are {rank_in} and {rank_out}: they take numbers from 1 on, or None on one side")
    if depthwise and (rank_in is None or rank_in != rank_out):
        raise ValueError(f"ranks are {rank_in} and {rank_out}, but a depthwise layer has two equal ranks")
    weight = next(layer.parameters())
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        smaller = _made(layer, ranks, depthwise, bias)
    for name, value in vars(layer).items():  # what the user has set on it
        if name not in _OWN and not hasattr(smaller, name):
            setattr(smaller, name, value)
    return smaller.to(weight.device, weight.dtype).train(layer.training)


def _made(layer: nn.Module, ranks: Ranks, depthwise: bool, bias: bool) -> nn.Module:
    if not isinstance(layer, nn.Linear | LowRankLinear):
        return LowRankConv2d(layer, ranks, depthwise, bias)
    rank_in, rank_out = ranks
    if rank_in is not None or rank_out is None:
        raise ValueError(f"ranks are {rank_in} and {rank_out}, but a linear layer takes None and a number")
    return LowRankLinear(layer.in_features, layer.out_features, rank_out, bias)


def replace_layer(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` in every place of ``old``: a layer may have two names, or be in a list or dictionary, too."""
    for module in list(network.modules()):
        for held in vars(module).values():
            places = held.items() if isinstance(held, dict) else enumerate(held) if isinstance(held, list) else ()
            for place in [place for place, child in places if child is old]:
                held[place] = new
