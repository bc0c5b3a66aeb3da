"""The settings of stage 2: ``Method`` has those of one iteration of pruning, ``PruneSettings`` all of them."""

import reprlib
from dataclasses import dataclass
from typing import Any

import torch

from pruning.capture import FISHER_TYPES, Batches, Forward, Passes
from pruning.goals import OBJECTIVES
from utils.errors import UserError
from utils.settings import (
    MOST_CHANNELS,
    MOST_EPOCHS,
    MOST_IMAGES,
    StageSettings,
    check_network,
    setting,
)

CHANNEL_CRITERIA = ("c_obd", "c_obs", "kron_obd", "kron_obs", "magnitude", "random")
CRITERIA = ("eigendamage", *CHANNEL_CRITERIA)
DECOMPOSITIONS = ("best", "tucker", "depthwise", "truncate")


@dataclass(frozen=True, kw_only=True)
class Method:
    """How an iteration of pruning measures, chooses and rebuilds; docs/options.md says what each setting means."""

    criterion: str = setting("eigendamage", choices=CRITERIA)
    decomposition: str = setting("best", choices=DECOMPOSITIONS)
    objective: str = setting("flops", choices=OBJECTIVES)
    round_to: int = setting(16, low=1, high=MOST_CHANNELS)
    prune_ratio_limit: float = setting(0.9, low=0, below=1)
    ignored_layers: list = setting([])
    fisher_type: str = setting("true", choices=FISHER_TYPES)
    fisher_images: int = setting(3000, low=1, high=10**9)
    correct_eigenvalues: bool = setting(True)
    refit: bool = setting(True)
    reestimate_batch_norm: bool = setting(True)

    def __post_init__(self) -> None:
        if self.ignored_layers and not self.forms_compete:
            raise UserError(
                "ignored_layers needs forms of layers that compete: use criterion eigendamage with decomposition best, "
                "tucker or depthwise"
            )

    @property
    def forms_compete(self) -> bool:
        """Whether whole forms of layers compete, or directions or channels one by one."""
        return self.criterion == "eigendamage" and self.decomposition != "truncate"

    def passes(self, batches: Batches, draws: torch.Generator, forward: Forward, **more: Any) -> Passes:
        """The passes that measure the Fisher, see ``pruning.capture.Passes``."""
        return Passes(batches, draws, self.fisher_type, forward, **more)


@dataclass(frozen=True, kw_only=True)
class PruneSettings(Method, StageSettings):
    """Every key of ``config.json``, see docs/options.md.

    Raises:
        UserError: for settings that exclude each other.
    """

    network: str = setting("resnet", check=check_network)
    width: int = setting(64, low=1, high=MOST_CHANNELS)
    checkpoint: str = setting("")
    mean: list = setting([])
    std: list = setting([])
    val_fraction: float = setting(0.1, low=0, below=1)
    no_flip: bool = setting(False)
    batch_size: int = setting(128, low=2, high=MOST_IMAGES)
    lr: float = setting(0.02, low=0)
    epochs_start: int = setting(10, low=0, high=MOST_EPOCHS)
    epochs_end: int = setting(40, low=0, high=MOST_EPOCHS)
    prune_ratio: float = setting(0.3, low=0, below=1)
    target_flops: float = setting(0.0, low=0)
    target_parameters: float = setting(0.0, low=0)
    distill: float = setting(0.5, low=0, high=1)
    max_iter: int = setting(8, low=1, high=10**4)
    max_accuracy_drop: float = setting(0.01, low=0, high=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("mean", "std"):
            values = getattr(self, key)
            if values and not (len(values) == 3 and all(type(v) in (int, float) and 0 <= v <= 10 for v in values)):
                raise UserError(f"{key} is {reprlib.repr(values)}: it takes three numbers, of pixels in [0, 1]")
        if len(self.mean) != len(self.std) or 0 in self.std:
            raise UserError(f"mean is {self.mean} and std is {self.std}: give both, deviations above 0, or neither")
