"""The settings of stage 2: a typed key each, read from ``config.json`` and from ``--set key=value``."""

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from models import NETWORKS
from pruning.capture import FISHER_TYPES
from pruning.method import ACCUMULATORS, CRITERIA, DECOMPOSITIONS
from pruning.selection import OBJECTIVES
from utils.data import IMAGE_TYPES
from utils.errors import UserError
from utils.schedule import SCHEDULES


def _key(default: Any, help: str, **rule: Any) -> Any:
    """A setting: its default, its meaning in a sentence, and what values it takes (low, high, below, choices)."""
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"help": help, **rule})
    return field(default=default, metadata={"help": help, **rule})


@dataclass
class PruneSettings:
    """Every key of ``config.json``."""

    network: str = _key("resnet", "kind of network of stage 1", choices=NETWORKS)
    depth: int = _key(32, "depth of that network, 6n+2", low=8)
    width: int = _key(64, "width of that network", low=1)
    data_dir: str = _key("data/cifar_100", "data folder, the one stage 1 was trained on")
    result_dir: str = _key("results", "folder that all stages write to")
    checkpoint: str = _key("", "checkpoint to prune; empty: the best of stage 1 in result_dir")
    img_type: str = _key("png", "image files to read", choices=tuple(IMAGE_TYPES))
    resize: int = _key(32, "height and width images are brought to", low=8)
    batch_size: int = _key(128, "images in a batch", low=2)
    num_workers: int = _key(16, "threads that decode images", low=0)
    lr: float = _key(0.02, "learning rate at the start of each fine-tuning", low=0)
    momentum: float = _key(0.9, "momentum of SGD, Nesterov's form", low=0, below=1)
    weight_decay: float = _key(0.0005, "L2 penalty on every weight but the gates'", low=0)
    scheduler_params: dict = _key(
        {"name": "cosine"}, 'schedule of each fine-tuning: {"name": "cosine"}, or "step" with milestones and gamma'
    )
    epochs_start: int = _key(10, "epochs of fine-tuning while nothing is removed yet", low=0)
    epochs_end: int = _key(40, "epochs of fine-tuning when everything is removed; interpolated by compression", low=0)
    criterion: str = _key(
        "eigendamage",
        "what decides: directions of the eigenbasis (eigendamage), or whole channels inside of blocks (the others)",
        choices=CRITERIA,
    )
    decomposition: str = _key(
        "tucker",
        "what eigendamage makes of a layer: 1x1 - core - 1x1 of the kept directions (truncate) or of the best "
        "subspaces of their number (tucker), or a depthwise separable layer (depthwise)",
        choices=DECOMPOSITIONS,
    )
    prune_ratio: float = _key(
        0.3, "share of all directions that one iteration drops, where there is no target", low=0, below=1
    )
    target_flops: float = _key(
        0.0, "FLOPs after the last iteration, a share of stage 1's up to 1, else their number; 0: no target", low=0
    )
    target_parameters: float = _key(
        0.0, "parameters after the last iteration, a share of stage 1's up to 1, else their number; 0: no target", low=0
    )
    objective: str = _key(
        "flops",
        "rank by saliency, or by saliency per FLOP, per parameter or (latency) per second really saved, the last "
        "measured layer by layer with ONNX Runtime on this machine",
        choices=OBJECTIVES,
    )
    round_to: int = _key(
        16, "kept ranks and channels are raised to multiples of this; of less where a layer has few channels", low=1
    )
    prune_ratio_limit: float = _key(0.9, "largest share of its directions that a layer may lose in all", low=0, below=1)
    normalize: bool = _key(False, "rank directions by their share of the layer's saliency, not by the saliency")
    fisher_type: str = _key("true", "labels drawn from the prediction, or taken from the data", choices=FISHER_TYPES)
    fisher_draws: int = _key(1, "labels drawn for each image of the true Fisher", low=1)
    fisher_images: int = _key(10000, "training images that the Fisher is measured on (all, if there are fewer)", low=1)
    accumulate: str = _key("float64", "type that the Fisher's sums are kept in", choices=ACCUMULATORS)
    correct_eigenvalues: bool = _key(True, "measure the curvature in the eigenbasis (EK-FAC), at one pass more")
    regularization: float = _key(
        0.0, "curvature added to every direction (eigendamage) or weight (c_obd, kron_obd)", low=0
    )
    reestimate_batch_norm: bool = _key(
        True, "measure the batch norms' statistics anew after surgery, on the images of the Fisher"
    )
    distill: float = _key(
        0.5, "weight of following stage 1's predictions in fine-tuning, the rest being the labels'", low=0, high=1
    )
    max_iter: int = _key(8, "iterations of prune, fine-tune, measure", low=1)
    max_accuracy_drop: float = _key(
        0.01, "accuracy that may be lost against stage 1, 0.01 being a point", low=0, high=1
    )
    compile: bool = _key(False, "compile the fine-tuning step, for long runs on a GPU")
    log_interval: int = _key(1, "fine-tuning epochs between lines of the log", low=1)
    exp_name: str = _key("", "name added to the folder of the run")
    seed: int = _key(0, "seed of order, augmentation and drawn labels", low=0, high=2**32 - 1)

    def schedule(self) -> dict[str, Any]:
        """Arguments of ``utils.schedule.scheduled`` from ``scheduler_params``."""
        given = dict(self.scheduler_params)
        name = given.pop("name", "cosine")
        if "gamma" in given:
            given["factor"] = given.pop("gamma")
        return {"schedule": name, **given}


def load_settings(path: str | Path, overrides: Sequence[str]) -> PruneSettings:
    """Read ``config.json`` and apply overrides of the form ``key=value`` (the value in JSON, or a bare string).

    Raises:
        UserError: for a file that is no JSON object, an unknown key, or a value of the wrong type or range.
    """
    try:
        content = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"settings file {path} does not exist: give --config_path config.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"settings file {path} is no valid JSON ({error}): mend it there") from None
    if not isinstance(content, dict):
        raise UserError(f"settings file {path} holds a {type(content).__name__}, not an object with keys and values")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--set {override!r} has no '=': write --set key=value")
        content[key] = _parsed(key, text)
    return checked_settings(content)


def _parsed(key: str, text: str) -> Any:
    """The value of an override; a key that takes text takes what looks like a number as it stands, too."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    takes_text = any(f.name == key and f.type is str for f in fields(PruneSettings))
    return text if takes_text and not isinstance(value, str) else value


def checked_settings(content: Mapping[str, Any]) -> PruneSettings:
    """The settings, every value checked; keys that are not given have their defaults.

    Raises:
        UserError: for the first key or value that is wrong.
    """
    known = {f.name: f for f in fields(PruneSettings)}
    for key, value in content.items():
        if key not in known:
            near = difflib.get_close_matches(key.lower(), known, n=1, cutoff=0)
            raise UserError(f"unknown key {key!r} in the settings: did you mean {near[0]!r}?")
        _check(key, value, known[key].type, known[key].metadata)
    values = {k: float(v) if known[k].type is float else v for k, v in content.items()}
    if isinstance(values.get("img_type"), str):
        values["img_type"] = values["img_type"].lower()
    settings = PruneSettings(**values)
    _check_schedule(settings.scheduler_params)
    if Path(settings.exp_name).name != settings.exp_name:
        raise UserError(f"exp_name is {settings.exp_name!r}: it becomes part of a folder's name, so use no separators")
    return settings


def _check(key: str, value: Any, kind: type, rule: Mapping[str, Any]) -> None:
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{key} is {value!r}, a {type(value).__name__}: it takes a value of type {kind.__name__}")
    choices = rule.get("choices")
    if choices and (value.lower() if key == "img_type" else value) not in choices:
        near = difflib.get_close_matches(value, choices, n=1, cutoff=0)
        raise UserError(f"{key} is {value!r}, but takes one of {', '.join(choices)}: did you mean {near[0]!r}?")
    low, high, below = rule.get("low"), rule.get("high"), rule.get("below")
    outside = isinstance(value, float) and not math.isfinite(value)
    outside |= (low is not None and value < low) or (high is not None and value > high)
    outside |= below is not None and value >= below
    if outside:
        upper = f" to {high}" if high is not None else f" and below {below}" if below is not None else " or more"
        raise UserError(f"{key} is {value}, out of range: it takes {'any number' if low is None else low}{upper}")


def _check_schedule(given: Mapping[str, Any]) -> None:
    unknown = set(given) - {"name", "milestones", "gamma"}
    if unknown:
        raise UserError(f"unknown key {sorted(unknown)[0]!r} in scheduler_params: it takes name, milestones and gamma")
    if given.get("name", "cosine") not in SCHEDULES:
        raise UserError(f"scheduler_params.name is {given['name']!r}: it takes one of {', '.join(SCHEDULES)}")
    milestones, gamma = given.get("milestones", []), given.get("gamma", 0.1)
    if not isinstance(milestones, list) or not all(isinstance(m, int | float) and 0 < m < 1 for m in milestones):
        raise UserError(f"scheduler_params.milestones is {milestones!r}: it takes a list of shares between 0 and 1")
    if isinstance(gamma, bool) or not isinstance(gamma, int | float) or not 0 < gamma <= 1:
        raise UserError(f"scheduler_params.gamma is {gamma!r}: it takes a number above 0, at most 1")


def as_dictionary(settings: PruneSettings) -> dict[str, Any]:
    return asdict(settings)
