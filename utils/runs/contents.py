"""What a checkpoint may hold: types and ranges of its plain values, and weights that fit the architecture it names.

No memory for a network is allocated before its shapes are known to be those of the weights in the file.
"""

import math
import reprlib
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from models import CASCADE, Cascade, ResNet, build_network, is_own
from utils.settings import MOST_SEED
from utils.sizes import MOST_PIXELS, parse_size

LARGEST = sys.float_info.max

Rule = tuple[Callable[[Any], bool], str]  # whether a value is accepted, and what belongs there


def whole(low: int, high: int | None = None) -> Rule:
    upper = "" if high is None else f" and {high} at most"
    return lambda v: type(v) is int and low <= v and (high is None or v <= high), f"an integer of {low} or more{upper}"


def real(low: float = -math.inf, high: float = math.inf, above: float = -math.inf) -> Rule:
    limits = [f"{word} {limit}" for word, limit in (("of at least", low), ("above", above)) if limit > -math.inf]
    limits += [f"of at most {high}"] if high < math.inf else []
    return (
        lambda v: type(v) in (int, float) and abs(v) <= LARGEST and v > above and low <= v <= high,
        " ".join(["a finite number", *limits]),
    )


def one_of(*values: Any) -> Rule:
    choices = " or ".join(map(repr, values))
    return lambda v: any(type(v) is type(value) and v == value for value in values), choices


def either(*rules: Rule) -> Rule:
    return lambda v: any(accepts(v) for accepts, _ in rules), " or ".join(text for _, text in rules)


def list_of(rule: Rule, count: int | None = None) -> Rule:
    length = "" if count is None else f"{count} items, "
    return (
        lambda v: type(v) in (list, tuple) and (count is None or len(v) == count) and all(map(rule[0], v)),
        f"a list of {length}each {rule[1]}",
    )


def by_name(rule: Rule) -> Rule:
    return (
        lambda v: isinstance(v, dict) and all(TEXT[0](key) and rule[0](item) for key, item in v.items()),
        f"a dictionary with names as keys and as values {rule[1]}",
    )


TEXT: Rule = (lambda v: type(v) is str, "text")
YES_OR_NO: Rule = (lambda v: type(v) is bool, "true or false")
NOTHING = one_of(None)
FINGERPRINTS: Rule = (
    lambda v: isinstance(v, Tensor) and _is_dense(v) and v.dtype == torch.int64 and v.dim() == 1 and _own(v),
    "a tensor of 64-bit integers",
)
SHARE = real(0, 1)
RECTANGLE: Rule = (lambda v: type(v) is str and _is_rectangle(v), "a height and a width as in '224x160'")

NORMALISATION = {"mean": list_of(real(), count=3), "std": list_of(real(above=0), count=3)}
RESNET = {
    "depth": whole(8),
    "num_classes": whole(1),
    "width": whole(1),
    "ranks?": by_name(list_of(either(NOTHING, whole(1)), count=2)),
    "inner?": by_name(whole(1)),
    "depthwise?": list_of(TEXT),
    "fixed_switches?": by_name(one_of(0, 1)),
}
OWN = {"num_classes": whole(1), "layers?": by_name((lambda v: isinstance(v, dict), "a dictionary"))}
CASCADED = {"members": list_of((lambda v: isinstance(v, dict), "a dictionary")), "thresholds": list_of(SHARE)}

# By the fields of ``checkpoint.Checkpoint``: required keys, and optional ones with a question mark; other keys are
# allowed.
RULES = {
    "stage": one_of("sp", "pruned", "rl_pruned", "cascade"),
    "normalisation": NORMALISATION,
    "classes": list_of(TEXT),
    "data": {
        "name": TEXT,
        "image_size": either(whole(1, MOST_PIXELS), RECTANGLE),
        "flip": YES_OR_NO,
        "val_fraction": SHARE,
        "split_seed": whole(0, MOST_SEED),
    },
    "metrics": {"accuracy": SHARE, "computation": real(0)},
    "original": {"accuracy": SHARE, "parameters": whole(1), "flops": whole(1)},
    "seed": whole(0, MOST_SEED),
    "progress": {"step?": whole(0), "iteration?": whole(0)},
    "source": either(NOTHING, TEXT),
}

# In ``data``, where a version that keeps track of the images has saved it.
IDENTITY = {"set_aside": FINGERPRINTS, "train": TEXT, "val": TEXT, "test": TEXT}


def check_archive(path: str | Path) -> None:
    """Refuse a file that is damaged, or that would grow when it is read.

    ``torch.save`` keeps a checksum of every part, which ``torch.load`` does not check.

    Raises:
        ValueError, OSError, zipfile.BadZipFile: if it is damaged or no such file.
    """
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise ValueError("it is compressed")
        if sum(part.file_size for part in parts) > Path(path).stat().st_size:
            raise ValueError("its parts overlap")
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")


def check_contents(content: Mapping[str, Any]) -> None:
    """Refuse values and weights that no stage saves, without building the network.

    Raises:
        ValueError: for the first that is found; the message names it and says what belongs there.
    """
    _check_values("", content, RULES)
    outputs = _checked_outputs("architecture.", content["architecture"])
    if "set_aside" in content["data"]:
        _check_values("data.", content["data"], IDENTITY)
    classes = content["classes"]
    if not len(set(classes)) == len(classes) == outputs:
        raise ValueError(f"classes has {len(set(classes))} different names for {outputs} outputs")
    _check_weights(content["weights"], content["architecture"])


def _checked_outputs(prefix: str, architecture: Mapping[str, Any]) -> int:
    """The number of classes of an architecture whose values have been checked; a cascade's members have one number."""
    if isinstance(architecture.get("network"), str) and is_own(architecture["network"]):
        _check_values(prefix, architecture, OWN)
        return architecture["num_classes"]
    if architecture.get("network") != CASCADE:
        _check_values(prefix, architecture, RESNET)
        return architecture["num_classes"]
    _check_values(prefix, architecture, CASCADED)
    outputs = set()
    for i, member in enumerate(architecture["members"]):
        _check_values(f"{prefix}members.{i}.", member, NORMALISATION)
        if member.get("network") == CASCADE:
            raise ValueError(f"{prefix}members.{i} is a cascade, which no member can be")
        outputs.add(_checked_outputs(f"{prefix}members.{i}.", member))
    if len(outputs) != 1:
        raise ValueError(f"{prefix}members must have the same number of classes, and they have {sorted(outputs)}")
    return outputs.pop()


def _check_values(prefix: str, content: Any, rules: Mapping[str, Any]) -> None:
    for key, rule in rules.items():
        name = key.removesuffix("?")
        if name not in content:
            if name == key:
                raise ValueError(f"{prefix}{name} is missing")
        elif isinstance(rule, dict):
            _check_values(f"{prefix}{name}.", content[name], rule)
        elif not rule[0](content[name]):
            raise ValueError(f"{prefix}{name} is {reprlib.repr(content[name])}, but must be {rule[1]}")


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.device.type == "cpu"


def _is_rectangle(text: str) -> bool:
    try:
        return parse_size(text) == text
    except ValueError:
        return False


def _own(tensor: Tensor) -> bool:
    """Whether it has as many values as it shows."""
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _check_weights(weights: Mapping[str, Any], architecture: Mapping[str, Any]) -> None:
    for name, weight in weights.items():
        if not isinstance(weight, Tensor) or not _is_dense(weight):
            raise ValueError(f"the weight {reprlib.repr(name)} is no dense tensor")
    storages = {w.untyped_storage().data_ptr(): w.untyped_storage().nbytes() for w in weights.values()}
    if sum(w.numel() * w.element_size() for w in weights.values()) > sum(storages.values()):
        raise ValueError("the weights show more values than the file holds")
    for name, weight in weights.items():
        if weight.is_floating_point() and not torch.isfinite(weight).all():
            raise ValueError(f"the weight {name!r} is not finite (its training diverged)")
    if _needs_code(architecture):
        return
    try:
        expected = skeleton(architecture).state_dict()
    except Exception as error:  # whatever a made-up architecture leads to
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"weights cannot fit the architecture, which names no network ({reason})") from error
    if weights.keys() != expected.keys():
        name = min(map(str, weights.keys() ^ expected.keys()))
        raise ValueError(f"weights do not fit the architecture: {name!r} is in one of them only")
    for name, weight in weights.items():
        found, wanted = ((tuple(w.shape), in_full(w.dtype)) for w in (weight, expected[name]))
        if found != wanted:
            raise ValueError(f"weights do not fit the architecture: {name!r} is {found} where {wanted} belongs")


def in_full(dtype: torch.dtype) -> torch.dtype:
    """The type that weights of a file have in the network: bf16, which halves a file, becomes float32."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def _needs_code(architecture: Mapping[str, Any]) -> bool:
    """Whether a network of one's own is in it, whose function is not called before it is allowed."""
    members = architecture.get("members", [architecture])
    return any(isinstance(name := member.get("network"), str) and is_own(name) for member in members)


def skeleton(architecture: Mapping[str, Any]) -> ResNet | Cascade:
    """The network that an architecture describes, on the ``meta`` device: shapes without values."""
    with torch.device("meta"), _Uninitialised():
        return build_network(**architecture)


class _Uninitialised(TorchFunctionMode):
    """Leaves out random numbers, for which the ``meta`` device would import PyTorch's compiler: three seconds."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return args[0] if func in (Tensor.normal_, Tensor.uniform_) else func(*args, **(kwargs or {}))
