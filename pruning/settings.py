"""The settings of stage 2: ``Method`` has those of one iteration of pruning, ``PruneSettings`` all of them."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pruning.capture import FISHER_TYPES, Batches, Forward, Passes
from pruning.goals import OBJECTIVES
from utils.errors import UserError
from utils.settings import (
    MOST_CHANNELS,
    MOST_EPOCHS,
    MOST_IMAGES,
    NETWORK_HELP,
    SCHEDULES,
    StageSettings,
    check_network,
    path_setting,
    setting,
)

EIGENBASIS_CRITERIA = ("eigendamage",)
CHANNEL_CRITERIA = ("c_obd", "c_obs", "kron_obd", "kron_obs", "magnitude", "random")
CRITERIA = EIGENBASIS_CRITERIA + CHANNEL_CRITERIA
DECOMPOSITIONS = ("best", "tucker", "depthwise", "truncate")


def _check_names(names: list) -> None:
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(f'ignored_layers is {reprlib.repr(names)}: it takes a list of names, such as ["classifier"]')


@dataclass(frozen=True, kw_only=True)
class Method:
    """How an iteration of pruning measures, chooses and rebuilds."""

    criterion: str = setting(
        "eigendamage",
        "pruning criterion: directions of the eigenbasis (eigendamage), or whole channels inside blocks (the others)",
        choices=CRITERIA,
    )
    decomposition: str = setting(
        "best",
        "forms that eigendamage can give a layer: 1x1 - core - 1x1 with the smallest loss (tucker), a depthwise "
        "separable layer (depthwise), the better of both (best), or single directions one by one, as published "
        "(truncate)",
        choices=DECOMPOSITIONS,
    )
    objective: str = setting(
        "flops",
        "what prune_ratio is a share of: FLOPs or parameters; saliency (only with truncate or channels): directions or "
        "channels, ranked under one threshold as published, also with a target",
        choices=OBJECTIVES,
    )
    round_to: int = setting(
        16,
        "kept ranks and channels are multiples of this; of its half, and so on, in smaller layers and where the goal "
        "cannot be reached otherwise",
        low=1,
        high=MOST_CHANNELS,
    )
    prune_ratio_limit: float = setting(
        0.9, "largest share of a layer's input or output directions that may be removed in total", low=0, below=1
    )
    ignored_layers: list = setting(
        [], "names of layers that stay as they are, or of modules that hold them", check=_check_names
    )
    normalize: bool = setting(
        False, "rank single directions or channels by their share of the layer's saliency, not by the saliency"
    )
    fisher_type: str = setting(
        "true",
        "gradients of the network's own prediction (true), or of the data's labels (empirical)",
        choices=FISHER_TYPES,
    )
    fisher_draws: int = setting(1, "random gradients of each image for the true Fisher", low=1, high=10**4)
    correct_eigenvalues: bool = setting(
        True, "with truncate, measure the curvature in the eigenbasis (EK-FAC), with one more pass"
    )
    refit: bool = setting(
        True, "refit rebuilt layers to their earlier outputs, from input to output, in two passes over some images"
    )
    regularization: float = setting(
        0.0, "curvature added to every weight or direction (eigendamage, c_obd and kron_obd)", low=0
    )

    def __post_init__(self) -> None:
        if self.normalize and self.forms_compete:
            raise UserError(
                f"normalize ranks single directions, but decomposition {self.decomposition} compares whole forms of "
                "a layer: use decomposition truncate, or normalize false"
            )

        if self.ignored_layers and not self.forms_compete:
            raise UserError(
                "ignored_layers needs forms of layers that compete: use criterion eigendamage with decomposition best, "
                "tucker or depthwise"
            )

    @property
    def forms_compete(self) -> bool:
        """Whether whole forms of layers compete, or directions or channels one by one."""
        return self.criterion in EIGENBASIS_CRITERIA and self.decomposition != "truncate"

    def passes(self, batches: Batches, draws: torch.Generator, forward: Forward, **more: Any) -> Passes:
        """The passes that measure the Fisher, see ``pruning.capture.Passes``."""
        return Passes(batches, draws, self.fisher_type, self.fisher_draws, forward, **more)


@dataclass(frozen=True, kw_only=True)
class PruneSettings(Method, StageSettings):
    """Every key of ``config.json``.

    Raises:
        UserError: for an unknown schedule or name, or for settings that exclude each other.
    """

    network: str = setting("resnet", NETWORK_HELP, check=check_network)
    width: int = setting(64, "width of the network of stage 1", low=1, high=MOST_CHANNELS)
    checkpoint: str = path_setting(
        "", "checkpoint to prune; empty: the newest run of stage 1 that fits; for a network of your own its state_dict"
    )
    mean: list = setting([], "for a network of your own: mean of each channel that it expects; empty: measured")
    std: list = setting([], "for a network of your own: standard deviation of each channel that it expects")
    val_fraction: float = setting(
        0.1, "for a network of your own: share of the training images set aside, if there is no val/", low=0, below=1
    )
    no_flip: bool = setting(False, "for a network of your own: do not mirror images in fine-tuning")
    batch_size: int = setting(128, "images in a batch", low=2, high=MOST_IMAGES)
    lr: float = setting(0.02, "initial learning rate of each fine-tuning", low=0)
    scheduler_params: dict = setting(
        {"name": "cosine"}, 'schedule of each fine-tuning: {"name": "cosine"}, or "step" with milestones and gamma'
    )
    epochs_start: int = setting(10, "epochs of fine-tuning when little has been removed", low=0, high=MOST_EPOCHS)
    epochs_end: int = setting(
        40, "epochs of fine-tuning when nearly everything has been removed", low=0, high=MOST_EPOCHS
    )
    prune_ratio: float = setting(
        0.3,
        "without a target: share of the FLOPs (or of what objective names) that one iteration removes",
        low=0,
        below=1,
    )
    target_flops: float = setting(
        0.0, "FLOPs after the last iteration: up to 1, a share of stage 1's; above 1, their number; 0: no target", low=0
    )
    target_parameters: float = setting(
        0.0,
        "parameters after the last iteration: up to 1, a share of stage 1's; above 1, their number; 0: no target",
        low=0,
    )
    fisher_images: int = setting(3000, "training images for the Fisher (all, if there are fewer)", low=1, high=10**9)
    reestimate_batch_norm: bool = setting(
        True, "measure the batch norms' statistics again after surgery, on the images of the Fisher (without refit)"
    )
    distill: float = setting(
        0.5,
        "weight of distillation from stage 1's network in fine-tuning; the labels have the remaining weight",
        low=0,
        high=1,
    )
    max_iter: int = setting(8, "iterations of prune, fine-tune, measure", low=1, high=10**4)
    max_accuracy_drop: float = setting(
        0.01, "accuracy that may be lost against stage 1; 0.01 is one percentage point", low=0, high=1
    )
    log_interval: int = setting(1, "epochs of fine-tuning between two lines of the log", low=1, high=MOST_EPOCHS)
    exp_name: str = setting("", "name added to the folder of the run")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_schedule(self.scheduler_params)
        for key in ("mean", "std"):
            values = getattr(self, key)
            if values and not (len(values) == 3 and all(type(v) in (int, float) and 0 <= v <= 10 for v in values)):
                raise UserError(f"{key} is {reprlib.repr(values)}: it takes three numbers, of pixels in [0, 1]")
        if len(self.mean) != len(self.std) or 0 in self.std:
            raise UserError(f"mean is {self.mean} and std is {self.std}: give both, deviations above 0, or neither")
        if Path(self.exp_name).name != self.exp_name:
            raise UserError(f"exp_name is {self.exp_name!r}: it becomes part of a folder's name, so use no separators")

    def schedule(self) -> dict[str, Any]:
        """Arguments of ``training.optimisers.scheduled`` from ``scheduler_params``."""
        given = dict(self.scheduler_params)
        name = given.pop("name", "cosine")
        if "gamma" in given:
            given["factor"] = given.pop("gamma")
        return {"schedule": name, **given}


def _check_schedule(given: Mapping[str, Any]) -> None:
    unknown = set(given) - {"name", "milestones", "gamma"}
    if unknown:
        raise UserError(f"unknown key {sorted(unknown)[0]!r} in scheduler_params: it takes name, milestones and gamma")
    if given.get("name", "cosine") not in SCHEDULES:
        raise UserError(
            f"scheduler_params.name is {reprlib.repr(given['name'])}: it takes one of {', '.join(SCHEDULES)}"
        )
    milestones, gamma = given.get("milestones", []), given.get("gamma", 0.1)
    if not isinstance(milestones, list) or not all(isinstance(m, int | float) and 0 < m < 1 for m in milestones):
        raise UserError(
            f"scheduler_params.milestones is {reprlib.repr(milestones)}: it takes a list of shares between 0 and 1"
        )
    if isinstance(gamma, bool) or not isinstance(gamma, int | float) or not 0 < gamma <= 1:
        raise UserError(f"scheduler_params.gamma is {reprlib.repr(gamma)}: it takes a number above 0, at most 1")
