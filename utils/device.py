"""Where a run computes, how precisely, and its random numbers."""

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from utils.errors import UserError

PRECISIONS = ("auto", "float32", "bf16")
BF16_CAPABILITY = (8, 0)  # Ampere: GPUs before it emulate bf16, slower than float32


def pick_device() -> torch.device:
    """The first visible GPU, or with several processes this process's own; else the CPU.

    On GPUs float32 is made full float32: by default PyTorch rounds convolutions to TF32's 10 bits, those of the Fisher
    as well.  For speed there is bf16.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_precision(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of convolutions and matrix products in training and between epochs, see ``mixed_precision``.

    Args:
        wanted: one of ``PRECISIONS``; "auto" is bf16 on GPUs that have it and float32 anywhere else.

    Raises:
        UserError: for bf16 on a GPU that has none.
    """
    if wanted == "bf16" and _lacks_bf16(device):
        raise UserError(f"the GPU {torch.cuda.get_device_name(device)} has no bf16: choose precision float32 or auto")
    if wanted == "auto":
        wanted = "bf16" if device.type == "cuda" and not _lacks_bf16(device) else "float32"
    return torch.bfloat16 if wanted == "bf16" else torch.float32


def _lacks_bf16(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < BF16_CAPABILITY


def device_text(device: torch.device, precision: torch.dtype) -> str:
    """Device and precision as a run's first line says them."""
    name = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
    if precision == torch.bfloat16:
        return f"{name} in bf16 (Fisher and report in full float32)"
    return f"{name} in full float32{' (it has no bf16)' if _lacks_bf16(device) else ''}"


def mixed_precision(device: torch.device, precision: torch.dtype) -> AbstractContextManager:
    """Autocast: convolutions and matrix products in bf16, weights and sums in float32; nothing where that is asked."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == torch.bfloat16)


@contextmanager
def fixed_shapes() -> Iterator[None]:
    """Let cuDNN time its kernels for each new shape and keep the fastest.

    For training, whose batches have one or two sizes; with skipped blocks every batch would be timed.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class Randomness:
    """A run's random numbers: ``data`` (order, crops, flips) on the CPU, ``draws`` (labels, decisions) on ``device``.

    Its state goes into every checkpoint, so that a resumed run draws what an uninterrupted one would have drawn.  GPUs
    and CPUs draw differently, though: on another kind of device ``draws`` starts again from a seed that the saved
    state gives, and draws other numbers from then on.
    """

    def __init__(self, seed: int, device: torch.device):
        self.data = torch.Generator().manual_seed(seed)
        self.draws = torch.Generator(device).manual_seed(seed + 1)

    def state_dict(self) -> dict[str, Any]:
        return {"data": self.data.get_state(), "draws": self.draws.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.data.set_state(state["data"])
        if state["draws"].shape == self.draws.get_state().shape:
            self.draws.set_state(state["draws"])
        else:
            digest = hashlib.sha256(bytes(state["draws"].tolist())).digest()
            self.draws.manual_seed(int.from_bytes(digest[:4], "big"))
