"""The settings of stage 2: config.json, --set, and what is refused."""

import json
from dataclasses import MISSING, asdict, fields
from pathlib import Path

import pytest
from commands import ROOT

from pruning.settings import PruneSettings
from training.optimisers import scheduled
from utils.errors import UserError
from utils.settings import checked_settings, load_settings

CONFIG = ROOT / "config.json"


def checked(given: dict) -> PruneSettings:
    """The settings with what has no default."""
    return checked_settings(PruneSettings, {"data_dir": "data", **given})


def test_config_json_holds_every_key_and_no_other_with_its_default_but_for_folders():
    content, defaults = json.loads(CONFIG.read_text()), asdict(PruneSettings(data_dir=""))
    assert set(content) == {field.name for field in fields(PruneSettings)}
    assert asdict(load_settings(PruneSettings, CONFIG, [])) == content
    assert {key for key in content if content[key] != defaults[key]} == {"data_dir", "result_dir"}


def test_keys_that_are_not_given_have_their_defaults(tmp_path: Path):
    path = tmp_path / "small.json"
    path.write_text('{"depth": 14, "lr": 1, "data_dir": "data"}')
    settings = load_settings(PruneSettings, path, [])
    assert (settings.depth, settings.lr, settings.width) == (14, 1.0, 64)
    assert isinstance(settings.lr, float)
    settings.ignored_layers.append("classifier")
    assert PruneSettings(data_dir="").ignored_layers == [], "defaults are not shared"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("depth=14", "depth", 14),
        ("lr=1e-3", "lr", 0.001),
        ("refit=false", "refit", False),
        ("data_dir=a=b", "data_dir", "a=b"),
        ("checkpoint=1", "checkpoint", "1"),
        ("checkpoint=", "checkpoint", ""),
        ("img_type=PNG", "img_type", "png"),
        ('ignored_layers=["classifier"]', "ignored_layers", ["classifier"]),
    ],
)  # fmt: skip
def test_overrides(override: str, key: str, value: object):
    settings = load_settings(PruneSettings, CONFIG, ["seed=4", "seed=3", override])
    assert getattr(settings, key) == value and type(getattr(settings, key)) is type(value)
    expected = {**json.loads(CONFIG.read_text()), "seed": 3, key: value}
    assert asdict(settings) == expected, "no other key changes"


def test_a_key_that_has_no_default_has_to_be_given():
    with pytest.raises(UserError, match=r"^data_dir is not among the settings: add it"):
        checked_settings(PruneSettings, {"depth": 14})


TYPES = {
    "int": [("depth", 14.0), ("depth", "14"), ("depth", True), ("depth", None)],
    "float": [("lr", "0.1"), ("lr", True), ("lr", [0.1]), ("target_parameters", "half")],
    "bool": [("refit", 1), ("refit", "false")],
    "str": [("data_dir", 3), ("data_dir", None), ("schedule", {"name": "step"}), ("schedule", ["step"])],
    "list": [("ignored_layers", "classifier")],
}
NAMES = {"prune_ration": "prune_ratio", "LR": "lr", "batchsize": "batch_size", "scheduler_params": "schedule"}
CHOICES = [("criterion", "eigendamge", "eigendamage"), ("img_type", "jpgg", "jpg"), ("schedule", "linear", "cosine")]
OUT_OF_RANGE = [
    ("width", 0), ("resize", 7), ("batch_size", 1), ("lr", -0.1), ("lr", float("inf")), ("lr", float("nan")),
    ("momentum", 1.0), ("weight_decay", -1e-9), ("prune_ratio", -0.1), ("max_accuracy_drop", 1.1), ("seed", 2**64),
]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        *(({k: 1}, f"^unknown key '{k}' in the settings: did you mean '{near}'\\?$") for k, near in NAMES.items()),
        *(({k: v}, f"^{k} is .*it takes a value of type {kind}$") for kind, own in TYPES.items() for k, v in own),
        *(({k: v}, f"^{k} is .*out of range") for k, v in OUT_OF_RANGE),
        *(({k: v}, f"^{k} is '{v}', but takes one of .*{choice}") for k, v, choice in CHOICES),
    ],
    ids=str,
)
def test_a_wrong_key_or_value_is_refused(given: dict, message: str):
    with pytest.raises(UserError, match=message):
        checked({"depth": 14, **given})


def test_every_key_refuses_a_wrong_type():
    for field in fields(PruneSettings):
        with pytest.raises(UserError, match=f"^{field.name} is "):
            checked({field.name: None})


def test_the_ends_of_the_ranges_are_accepted():
    for field in fields(PruneSettings):
        for end in ("low", "high"):
            if (value := field.metadata.get(end)) is not None:
                assert getattr(checked({field.name: value}), field.name) == value
        given = field.default is not MISSING or field.default_factory is not MISSING
        assert given or field.name == "data_dir"


def test_the_schedule_that_is_set_is_the_one_used():
    step = checked({"schedule": "step"}).schedule
    rates = [scheduled(step, 0.8, p) for p in (0.0, 0.49, 0.5, 0.74, 0.75, 1.0)]
    assert rates == pytest.approx([0.8, 0.8, 0.08, 0.08, 0.008, 0.008], rel=1e-12)
    cosine = PruneSettings(data_dir="").schedule
    rates = [scheduled(cosine, 0.8, p) for p in (0.0, 1 / 3, 0.5, 1.0)]
    assert rates == pytest.approx([0.8, 0.6, 0.4, 0.0], abs=1e-12)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"batch_size={2**70}", "batch_size is 1180591620717411303424, out of range: it takes 2 to"),
        ("depth", r"--set 'depth' has no '=': write --set key=value"),
        ("depth=9", r"^depth 9 is not of the form 6n\+2"),
        ("resize=20000", "resize is 20000, out of range: it takes 8 to 2048"),
        (f"lr={500 * '['}{500 * ']'}", r"lr is \[\[.*, a list: it takes a value of type float"),
    ],
    ids=lambda text: str(text)[:40],
)
def test_a_wrong_override_is_refused_in_one_sentence(override: str, message: str):
    with pytest.raises(UserError, match=message) as found:
        load_settings(PruneSettings, CONFIG, [override])
    assert len(str(found.value)) < 600


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"depth": 14,}', "is not valid JSON"),
        ("", "is not valid JSON"),
        ("[1, 2]", "holds a list, not an object"),
        (b"\xff\xfe{", "is not valid JSON"),
    ],
    ids=lambda text: str(text)[:40],
)
def test_a_file_that_is_no_settings_is_refused_in_one_sentence(tmp_path: Path, text: str | bytes, message: str):
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        load_settings(PruneSettings, path, [])
