"""The keys of static pruning: defaults in config.json, ranges, and what does not go together."""

import pytest

from pruning.settings import CRITERIA, PruneSettings
from utils.errors import UserError
from utils.settings import checked_settings


def checked(given: dict) -> PruneSettings:
    """The settings with what has no default."""
    return checked_settings(PruneSettings, {"data_dir": "data", **given})


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
    ],
)
def test_a_value_out_of_range_is_refused_by_name(key, value):
    with pytest.raises(UserError, match=key):
        checked({key: value})


def test_every_criterion_is_accepted():
    for criterion in CRITERIA:
        assert checked({"criterion": criterion}).criterion == criterion
