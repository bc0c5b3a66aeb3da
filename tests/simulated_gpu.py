"""A GPU that is not there: tensors that say they are on ``cuda:0`` and compute on the CPU.

``SimulatedTensor`` holds its values in a CPU tensor.  PyTorch's C++ sees a CPU tensor, Python sees one on ``cuda:0``,
and every operation on it comes by ``dispatch``, which

* raises what CUDA raises where operands are on different devices, a generator is of the other kind of device, or
  memory that is no main memory is to be pinned,
* notes every operation for which a GPU is waited for (``item``, ``nonzero``, masks, copies that are not pinned and
  asynchronous, decompositions that check for failure), with the line of the program that caused it.

    with simulated() as waits:  # Counter of (operation, "file:line")
        ...                     # a program that uses torch.cuda.is_available(), torch.device("cuda"), ...

What it does not show: speed, memory, the errors of cuDNN and cuBLAS, races between streams, inductor, NCCL.
(``torch._subclasses.FakeTensorMode`` has no values, and its backward pass on CUDA tensors needs a GPU.)
"""

import copy
import importlib
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = str(Path(__file__).resolve().parents[1])
CUDA = torch.device("cuda", 0)
aten = torch.ops.aten

# The answer decides a shape or is read by the host, or a library reports failure through it.
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2", "bincount",
    "_linalg_eigh", "_linalg_svd", "linalg_inv_ex", "_linalg_solve_ex", "_linalg_check_errors", "histc",
    "repeat_interleave",
}  # fmt: skip
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


WAITS: Counter[tuple[str, str]] = Counter()


def _wait(what: str) -> None:
    WAITS[what, _line_of_the_program()] += 1


def _line_of_the_program() -> str:
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(ROOT) and file != __file__:
            return f"{file[len(ROOT) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


class SimulatedTensor(torch.Tensor):
    """A tensor on the simulated GPU; ``inner`` holds the values."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "SimulatedTensor":
        assert type(inner) is torch.Tensor, type(inner)
        inner = inner.detach()
        self = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device="cpu",
        )  # fmt: skip
        self.inner = inner
        return self

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})

    def cpu(self, *_, **__) -> Tensor:
        return self.to("cpu")

    def tolist(self) -> list:
        _wait("tolist")
        return self.inner.tolist()

    def pin_memory(self, *_, **__):
        raise RuntimeError("cannot pin 'torch.cuda.ByteTensor' only dense CPU tensors can be pinned")

    def __reduce_ex__(self, protocol):
        # A file holds what torch.load(map_location="cpu") makes of a tensor on a GPU.
        _wait("save")
        if getattr(self, "_is_param", False):
            return torch._utils._rebuild_parameter, (self.inner, self.requires_grad, {})
        return self.inner.__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        new = SimulatedTensor(copy.deepcopy(self.inner, memo))
        is_parameter = getattr(self, "_is_param", False)
        new = nn.Parameter(new, self.requires_grad) if is_parameter else new.requires_grad_(self.requires_grad)
        memo[id(self)] = new
        return new


def dispatch(func, args, kwargs):
    """One operation with a tensor on the simulated GPU among its arguments."""
    name = func.overloadpacket.__name__
    if func.namespace == "c10d":
        return _collective(func, args, kwargs)
    if func is aten.copy_.default and not (isinstance(args[0], SimulatedTensor) and isinstance(args[1], type(args[0]))):
        return _copy_(*args, **kwargs)
    leaves = tree_leaves((args, kwargs))
    indices = [i for i in args[1] if i is not None] if func in INDEXING else []
    for t in leaves:
        if isinstance(t, Tensor) and not isinstance(t, SimulatedTensor):
            if any(t is i for i in indices):
                _wait(f"{name} by an index in main memory")
            elif t.dim() > 0 or name.startswith(("_fused", "_foreach")):
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                    f"({func}: {tuple(t.shape)} {t.dtype} is on the CPU)"
                )
        if isinstance(t, REAL_GENERATOR):
            _on_gpu(t, func).advance()
    without_replacement = name == "multinomial" and not (args[2] if len(args) > 2 else kwargs.get("replacement"))
    if name in WAITING or without_replacement or (name == "multinomial" and args[1] == 1):
        _wait(name)
    if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
        _wait(f"{name} by a mask")
    with _safe(name, args):
        return return_and_correct_aliasing(func, args, kwargs, _on_values(func, args, kwargs))


def _on_values(function, args, kwargs):
    """What the function makes of the values, on the GPU."""
    args, kwargs = tree_map_only(SimulatedTensor, lambda t: t.inner, (args, kwargs))
    return tree_map_only(Tensor, SimulatedTensor, function(*args, **kwargs))


@contextmanager
def _safe(name: str, args: tuple) -> Iterator[None]:
    """Without oneDNN, whose fault ``models.convolution.SafeConv2d`` avoids on the CPU only, where these are not."""
    weight = {"convolution": 1, "convolution_backward": 2}.get(name)
    unsafe = weight is not None and tuple(args[weight].shape[2:]) == (1, 1)
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(before and not unsafe)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def _copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Between main memory and the GPU."""
    if isinstance(target, SimulatedTensor):
        if source.dim() > 0 and not (non_blocking and _is_pinned(source)):
            _wait("copy to the GPU")
        target.inner.copy_(source)
    else:
        _wait("copy from the GPU")
        target.copy_(source.inner)
    return target


REAL_TO = torch.Tensor.to


def _moved(self: Tensor, *args, **kwargs):
    """``Tensor.to`` of tensors in main memory and on the GPU."""
    if args and isinstance(args[0], Tensor):
        args, kwargs = args[1:], {"device": args[0].device, "dtype": args[0].dtype, **kwargs}
    given = {k: v for k, v in kwargs.items() if k != "copy"}
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **given)
    here = isinstance(self, SimulatedTensor)
    there = here if device is None else torch.device(device).type == "cuda"
    layout = {} if memory_format is None else {"memory_format": memory_format}
    if here == there:
        elsewhere = {} if here or device is None else {"device": device}
        return REAL_TO(self, dtype=dtype or self.dtype, copy=kwargs.get("copy", False), **elsewhere, **layout)
    if self.requires_grad and torch.is_grad_enabled() and not isinstance(self, nn.Parameter):
        raise NotImplementedError("a gradient through a copy between main memory and the GPU")
    if here:
        _wait("copy from the GPU")
        return REAL_TO(self.inner.clone(), dtype or self.dtype)
    if not (non_blocking and _is_pinned(self)):
        _wait("copy to the GPU")
    plain = self.detach() if type(self) is Tensor else torch.Tensor(self.detach())
    return SimulatedTensor(aten._to_copy.default(plain, dtype=dtype, **layout))


def _pinned(self: Tensor, *_, **__) -> Tensor:
    pinned = self.clone()
    pinned.in_pinned_memory = True
    return pinned


def _is_pinned(tensor: Tensor) -> bool:
    return getattr(tensor, "in_pinned_memory", False)


REAL_GENERATOR = torch.Generator
ON_GPU: "WeakValueDictionary[int, SimulatedGenerator]" = WeakValueDictionary()


class SimulatedGenerator(torch.Generator):
    """A CUDA generator: its state is seed and offset in 16 bytes, and no CPU generator's state fits it."""

    def __init__(self, device=None):
        super().__init__()
        self._seed, self._offset = 67280421310721, 0
        ON_GPU[self._cdata] = self  # what comes out of C++ is another Python object for the same generator

    device = property(lambda self: CUDA)

    def manual_seed(self, seed: int) -> "SimulatedGenerator":
        self._seed, self._offset = seed, 0
        return self

    def get_state(self) -> Tensor:
        return torch.tensor([self._seed, self._offset]).view(torch.uint8).clone()

    def set_state(self, state: Tensor) -> "SimulatedGenerator":
        if isinstance(state, SimulatedTensor) or state.dtype != torch.uint8:
            raise TypeError("RNG state must be a torch.ByteTensor")
        if state.numel() not in (16, 8):
            raise RuntimeError("RNG state is wrong size")
        self._seed, self._offset = state.clone().view(torch.int64).tolist()
        return self

    def advance(self) -> None:
        """Make ready for the next operation, which draws from the CPU generator that this is for C++."""
        REAL_GENERATOR.manual_seed(self, hash((self._seed, self._offset)) % 2**63)
        self._offset += 4


class _GeneratorOfDevice(torch.Generator):
    """What ``torch.Generator`` is meanwhile."""

    def __new__(cls, device="cpu"):
        return SimulatedGenerator() if torch.device(device).type == "cuda" else REAL_GENERATOR(device)


def _on_gpu(generator: torch.Generator, func) -> SimulatedGenerator:
    if generator._cdata not in ON_GPU:
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' ({func})")
    return ON_GPU[generator._cdata]


def _made_on_gpu(factory):
    """A function that makes tensors, with ``device``."""

    def make(*args, **kwargs):
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "cuda":
            return factory(*args, **kwargs)
        kwargs["device"] = torch.device("cpu")
        if factory.__name__ in ("tensor", "as_tensor"):
            _wait("copy to the GPU")
        if kwargs.get("generator") is not None:
            _on_gpu(kwargs["generator"], factory.__name__).advance()
        needs_gradient = kwargs.pop("requires_grad", False)
        args = tree_map_only(SimulatedTensor, lambda t: t.inner, args)
        return SimulatedTensor(factory(*args, **kwargs)).requires_grad_(needs_gradient)

    return make


FACTORIES = (
    "tensor", "as_tensor", "zeros", "ones", "empty", "full", "rand", "randn", "randint", "randperm", "arange", "eye",
    "linspace", "zeros_like", "ones_like", "empty_like", "full_like",
)  # fmt: skip
METHODS = ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor")


class _Autocast(torch.autocast):
    def __init__(self, device_type, *args, **kwargs):
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def _collective(func, args, kwargs):
    """What NCCL would do, done by gloo; NCCL's conditions are checked."""
    for t in tree_leaves((args, kwargs)):
        if isinstance(t, Tensor) and not isinstance(t, SimulatedTensor):
            raise RuntimeError(f"No backend type associated with device type cpu ({func})")
        if isinstance(t, Tensor) and not t.is_contiguous():
            raise ValueError("Tensors must be contiguous")
    inner_args, inner_kwargs = tree_map_only(SimulatedTensor, lambda t: t.inner, (args, kwargs))
    out = func(*inner_args, **inner_kwargs)
    return (args[0], out[1]) if isinstance(out, tuple) and len(out) == 2 else out


@contextmanager
def simulated(free_memory: int = 100 * 2**30, capability: tuple[int, int] = (9, 0)) -> Iterator[Counter]:
    """A GPU that is not there, for the time being; what is waited for on it.

    Args:
        free_memory: bytes that are free on it.
        capability: of its generation; bf16 came with (8, 0).
    """
    importlib.import_module("torch._dynamo")  # which notes torch's functions as they are when it is first imported
    WAITS.clear()
    cuda = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "mem_get_info": lambda *_: (free_memory, free_memory), "_lazy_init": lambda: None,
        "is_bf16_supported": lambda *_, **__: True, "synchronize": lambda *_: None, "set_device": lambda *_: None,
        "get_device_name": lambda *_: "simulated", "manual_seed_all": lambda *_: None, "manual_seed": lambda *_: None,
        "get_device_capability": lambda *_: capability, "is_current_stream_capturing": lambda: False,
    }  # fmt: skip
    replaced = [(torch.cuda, name, value) for name, value in cuda.items()]
    replaced += [(torch, name, _made_on_gpu(getattr(torch, name))) for name in FACTORIES]
    replaced += [(Tensor, name, _made_on_gpu(getattr(Tensor, name))) for name in METHODS]
    replaced += [(torch, "Generator", _GeneratorOfDevice), (torch, "autocast", _Autocast)]
    replaced += [(Tensor, "to", _moved), (Tensor, "pin_memory", _pinned)]
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    with ExitStack() as stack:
        for target, name, value in replaced:
            stack.enter_context(mock.patch.object(target, name, value))
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        yield WAITS
