"""Settings of the stages, each declared once: type, default, meaning and range, read from flags or from a JSON file."""

import argparse
import difflib
import json
import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from models import NETWORKS, check_depth, is_own
from utils.data.listing import IMAGE_TYPES
from utils.device import PRECISIONS
from utils.errors import UserError
from utils.sizes import Size, parse_size

SCHEDULES = ("cosine", "step")  # of learning rates, see ``training.optimisers``

# Settings that may change when a run is resumed: its outcome stays the same, except for rounding.
NOT_COMPARED = ("download", "num_workers", "data_dir", "val_dir", "result_dir", "compile")

MOST_IMAGES = 2**24  # in a batch; all there are, if there are fewer
MOST_CHANNELS = 2**10
MOST_EPOCHS = 10**6
MOST_SEED = 2**32 - 1

RESUME = "continue the newest unfinished run of this stage with these settings, or start one"

Settings = TypeVar("Settings", bound="RunSettings")


NETWORK_HELP = "resnet, or the function that makes a network of your own: file.py:function or package.module:function"


def check_network(name: str) -> None:
    """Refuse a name that is neither a built-in network nor a function.

    Raises:
        ValueError: says what it takes.
    """
    if name not in NETWORKS and not is_own(name):
        raise ValueError(f"network is {name!r}: it takes {', '.join(NETWORKS)}, or file.py:function of your own")


def setting(
    default: Any,
    help: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
    below: float | None = None,
    choices: Sequence[str] | None = None,
    check: Callable[[Any], None] | None = None,
    parse: Callable[[Any], Any] | None = None,
) -> Any:
    """A field of a settings class.

    Args:
        default: MISSING for one that has to be given.
        help: its meaning in a sentence, where ``--help`` shows it.
        low, high, below: its range, low <= value <= high and value < below.
        choices: the values that it takes.
        check: raises ValueError for an invalid value.
        parse: makes the value from what is on the command line or in the file; raises ValueError.
    """
    rule = {"help": help, "low": low, "high": high, "below": below, "choices": choices, "check": check, "parse": parse}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=rule)
    return field(default=default, metadata=rule)


def with_default(cls: type, name: str, default: Any) -> Any:
    """The setting ``name`` of a base class with another default."""
    return field(default=default, metadata=_field(cls, name).metadata)


def _field(cls: type, name: str) -> Field:
    return next(f for f in fields(cls) if f.name == name)


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What every command that leaves a run takes."""

    network: str = setting("resnet", "kind of network", choices=NETWORKS)
    depth: int = setting(32, "depth of the network, 6n+2", check=check_depth)
    data_dir: str = setting(MISSING, "folder with train/ and test/, or with the CIFAR files of torchvision")
    val_dir: str = setting("", "folder of validation images, instead of val/ in data_dir")
    result_dir: str = setting("results", "folder that all stages write to")
    img_type: str = setting("any", "image files to read", choices=tuple(IMAGE_TYPES))
    resize: Size = setting(32, "size of the resized images, as 32, or height and width as 224x160", parse=parse_size)
    num_workers: int = setting(16, "threads that decode images", low=0, high=1024)
    seed: int = setting(
        0, "seed of all random draws, in stage 1 also of the choice of the validation images", low=0, high=MOST_SEED
    )

    def data(self) -> dict[str, Any]:
        """Arguments of ``utils.data.folder.load_data``."""
        return {
            "folder": self.data_dir,
            "image_type": self.img_type,
            "size": self.resize,
            "workers": self.num_workers,
            "val_dir": self.val_dir,
        }


@dataclass(frozen=True, kw_only=True)
class StageSettings(RunSettings):
    """What all three stages take."""

    momentum: float = setting(0.9, "Nesterov momentum of SGD", low=0, below=1)
    weight_decay: float = setting(
        0.0005, "L2 penalty on all weights except the gates' (with Muon: nor the filters)", low=0
    )
    schedule: str = setting("cosine", "cosine to 0, or step: x0.1 at 50% and 75% of the epochs", choices=SCHEDULES)
    precision: str = setting(
        "auto",
        "precision of convolutions and matrix products in training: bf16 or float32; auto is bf16 on GPUs that have "
        "it, else float32",
        choices=PRECISIONS,
    )
    compile: bool = setting(False, "compile the training step, for long runs on a GPU")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(StageSettings):
    """What stages 1 and 3 take, with the defaults of stage 1."""

    epochs: int = setting(200, "passes over the training images", low=1, high=MOST_EPOCHS)
    lr: float = setting(0.1, "initial learning rate", low=0)
    bs: int = setting(128, "images in a batch, over all processes", low=2, high=MOST_IMAGES)
    download: bool = setting(False, "download CIFAR-100 (CIFAR-10 if the folder's name says so) if missing")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names defaults, but no empty ones."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        empty = action.default in (None, "", (), []) or isinstance(action.default, bool)
        if isinstance(action.default, tuple) and not empty:
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return action.help if empty else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Reports a wrong flag in one sentence, as all other errors."""

    def __init__(self, description: str, hint: str = "--help lists the flags"):
        super().__init__(description=description, allow_abbrev=False, formatter_class=_Formatter)
        self.hint = hint

    def error(self, message: str) -> None:
        raise UserError(f"{message} ({self.hint})")


def settings_parser(cls: type, description: str, resumes: bool = True) -> Parser:
    """A parser with a flag for every setting of the class and, if runs can be resumed, ``--resume``."""
    parser = Parser(description)
    for f in fields(cls):
        given = {"help": f.metadata["help"].replace("%", "%%"), "default": f.default}
        if f.type is bool:
            given["action"] = "store_true"
        else:
            given |= {"type": _flag_type(_kind(f), f.name, f.metadata), "metavar": _metavar(f)}
        if get_origin(f.type) is tuple:
            given["nargs"] = "+"
        if f.default is MISSING:
            given |= {"required": True, "default": argparse.SUPPRESS}  # which --help would call "None"
        parser.add_argument(f"--{f.name}", **given)
    if resumes:
        parser.add_argument("--resume", action="store_true", help=RESUME)
    return parser


def parse_flags(cls: type[Settings], description: str, resumes: bool = True) -> tuple[Settings, bool]:
    """The settings on the command line, and whether ``--resume`` was given.

    Raises:
        UserError: for a flag or a value that is wrong.
    """
    given = vars(settings_parser(cls, description, resumes).parse_args())
    resume = given.pop("resume", False)
    return cls(**given), resume


def _metavar(f: Field) -> str:
    choices = f.metadata["choices"]
    if f.metadata["parse"]:
        return "SIZE"
    return "{" + ",".join(choices) + "}" if choices else _kind(f).__name__.upper()


def _kind(f: Field) -> type:
    """The type of a setting's values, None aside; of a tuple's items."""
    return next((kind for kind in get_args(f.type) if kind is not type(None)), f.type)


def _flag_type(kind: type, name: str, rule: Mapping[str, Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return checked_value(name, text if rule["parse"] else kind(text), rule)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def number(kind: type, low: float) -> Callable:
    """An argparse type: an int or float of at least ``low``."""
    return _flag_type(kind, "the value", setting(0, "", low=low).metadata)


def image_type(text: str) -> str:
    """An argparse type: an image type in lower case."""
    return _flag_type(str, "img_type", _field(StageSettings, "img_type").metadata)(text)


def checked_value(name: str, value: Any, rule: Mapping[str, Any]) -> Any:
    """The value of a setting, text that has choices in lower case.

    Raises:
        ValueError: if it is outside of the setting's range.
    """
    if rule["parse"]:
        return rule["parse"](value)
    if rule["choices"] and isinstance(value, str):
        if value.lower() not in rule["choices"]:
            raise ValueError(f"{name} is {value!r}, but takes one of {', '.join(rule['choices'])}")
        return value.lower()
    low, high, below = rule["low"], rule["high"], rule["below"]
    outside = isinstance(value, float) and not math.isfinite(value)
    outside |= (low is not None and value < low) or (high is not None and value > high)
    if outside or (below is not None and value >= below):
        upper = f" to {high}" if high is not None else f" or more, below {below}" if below is not None else " or more"
        raise ValueError(f"{name} is {value}, out of range: it takes {'any number' if low is None else low}{upper}")
    if rule["check"]:
        rule["check"](value)
    return value


def load_settings(cls: type[Settings], path: str | Path, overrides: Sequence[str]) -> Settings:
    """Read a JSON file and apply overrides of the form ``key=value`` (the value in JSON, or a bare string).

    Raises:
        UserError: for a file that is no JSON object, an unknown key, or a value of the wrong type or range.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"settings file {path} does not exist: give --config_path config.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"settings file {path} is not valid JSON ({error}): correct it there") from None
    if not isinstance(content, dict):
        raise UserError(f"settings file {path} holds a {type(content).__name__}, not an object with keys and values")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--set {override!r} has no '=': write --set key=value")
        content[key] = _override(cls, key, text)
    return checked_settings(cls, content)


def _override(cls: type, key: str, text: str) -> Any:
    """The value of an override; for a key that takes text, numbers stay text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    takes_text = any(f.name == key and f.type is str for f in fields(cls))
    return text if takes_text and not isinstance(value, str) else value


def checked_settings(cls: type[Settings], content: Mapping[str, Any]) -> Settings:
    """The settings, every value checked; keys that are not given have their defaults.

    Raises:
        UserError: for the first key or value that is wrong or missing.
    """
    known = {f.name: f for f in fields(cls)}
    values = {}
    for key, value in content.items():
        if key not in known:
            near = difflib.get_close_matches(key.lower(), known, n=1, cutoff=0)
            raise UserError(f"unknown key {key!r} in the settings: did you mean {near[0]!r}?")
        kind = known[key].type
        accepted = (int, float) if kind is float else kind
        fits = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
        if not fits and not known[key].metadata["parse"]:
            raise UserError(
                f"{key} is {reprlib.repr(value)}, a {type(value).__name__}: it takes a value of type {kind.__name__}"
            )
        try:
            values[key] = checked_value(key, float(value) if kind is float else value, known[key].metadata)
        except ValueError as error:
            raise UserError(str(error)) from None
    for f in known.values():
        if f.name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise UserError(f"{f.name} is not among the settings: add it ({f.metadata['help']})")
    return cls(**values)
