"""How an iteration of pruning measures, chooses and rebuilds."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pruning.costs import Seconds

EIGENBASIS_CRITERIA = ("eigendamage",)
CHANNEL_CRITERIA = ("c_obd", "c_obs", "kron_obd", "kron_obs", "magnitude", "random")
CRITERIA = EIGENBASIS_CRITERIA + CHANNEL_CRITERIA
DECOMPOSITIONS = ("truncate", "tucker", "depthwise")
ACCUMULATORS = ("float64", "float32")

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]  # makes a new pass over the same images


@dataclass(frozen=True)
class Method:
    """The keys of ``config.json`` of the same names (``utils.config.PruneSettings``)."""

    criterion: str = "eigendamage"
    decomposition: str = "tucker"  # of the eigenbasis criteria only: removed channels leave nothing to decompose
    objective: str = "flops"
    round_to: int = 16
    prune_ratio_limit: float = 0.9
    normalize: bool = False
    regularization: float = 0.0
    correct_eigenvalues: bool = True
    fisher_type: str = "true"
    fisher_draws: int = 1
    accumulate: str = "float64"
    # Not a key: what measures the time of a layer's form, for the objective "latency" only.
    seconds: Seconds | None = None

    def fisher(self, draws: torch.Generator) -> dict[str, Any]:
        """The arguments of a pass that measures the Fisher, with labels from the generator ``draws``."""
        return {
            "fisher_type": self.fisher_type,
            "draws": draws,
            "fisher_draws": self.fisher_draws,
            "accumulate": getattr(torch, self.accumulate),
        }
