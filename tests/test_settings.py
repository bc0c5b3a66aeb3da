"""The keys of static pruning: defaults in config.json, ranges, and what does not go together."""

import json
from dataclasses import fields
from pathlib import Path

import pytest

from pruning.method import CRITERIA, Method
from utils.config import PruneSettings, checked_settings
from utils.errors import UserError


def test_config_json_holds_every_key_and_the_code_has_the_same_defaults_of_the_method():
    given = json.loads((Path(__file__).parents[1] / "config.json").read_text())
    assert list(given) == [f.name for f in fields(PruneSettings)]
    settings = checked_settings(given)
    keys = {field.name: field.default for field in fields(Method)}
    assert keys.pop("seconds") is None  # not a key: a function
    for name, default in keys.items():
        assert getattr(settings, name) == default, name


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("criterion", "kron"),
        ("decomposition", "svd"),
        ("objective", "speed"),
        ("round_to", 0),
        ("target_flops", -0.1),
        ("target_parameters", "half"),
        ("fisher_draws", 0),
        ("accumulate", "float16"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(key, value):
    with pytest.raises(UserError, match=key):
        checked_settings({key: value})


def test_every_criterion_is_accepted():
    for criterion in CRITERIA:
        assert checked_settings({"criterion": criterion}).criterion == criterion
