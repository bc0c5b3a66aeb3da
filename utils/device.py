"""Where a run computes, and its random numbers."""

from contextlib import AbstractContextManager
from typing import Any

import torch

from models import ResNet
from utils import parallel
from utils.norms import with_shared_norms


def pick_device() -> torch.device:
    """The first GPU that CUDA_VISIBLE_DEVICES leaves visible, or this process's own among several; else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def placed(network: ResNet, device: torch.device) -> ResNet:
    """The network on ``device`` with channels last: tensor cores read that layout, and CPUs train 1.2x faster in it.

    Where several processes train it, its batch norms share their statistics.
    """
    network = network.to(device, memory_format=torch.channels_last)
    return network if parallel.world_size() == 1 else with_shared_norms(network)


def mixed_precision(device: torch.device) -> AbstractContextManager:
    """bf16 autocast on CUDA; on the CPU everything stays in float32."""
    return torch.autocast("cuda", dtype=torch.bfloat16, enabled=device.type == "cuda")


class Randomness:
    """A run's random numbers: ``data`` (order, crops, flips) on the CPU, ``draws`` (labels, decisions) on ``device``.

    Its state goes into every checkpoint, so that a resumed run draws what an uninterrupted one would have drawn.
    """

    def __init__(self, seed: int, device: torch.device):
        self.data = torch.Generator().manual_seed(seed)
        self.draws = torch.Generator(device).manual_seed(seed + 1)

    def state_dict(self) -> dict[str, Any]:
        return {"data": self.data.get_state(), "draws": self.draws.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.data.set_state(state["data"])
        self.draws.set_state(state["draws"])
