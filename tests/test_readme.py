"""The README names every flag and key that there is, and none that there is not."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pruning.settings import PruneSettings
from utils.settings import keys

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TABLES = README[README.index("## Flags and keys") :]


@pytest.mark.parametrize("script", ["main_sp.py", "main_rl_prune.py"])
def test_every_flag_is_in_the_readme(script):
    shown = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    flags = set(re.findall(r"--[a-z_]+", shown.stdout)) - {"--help"}
    assert flags and all(f"`{flag}`" in TABLES for flag in flags), sorted(f for f in flags if f"`{f}`" not in TABLES)


def test_keys_of_the_readme_are_those_of_the_settings():
    stage2 = TABLES[TABLES.index("Stage 2, ") : TABLES.index("## How the stages")]
    assert sorted(re.findall(r"^\| `(\w+)`", stage2, re.M)) == sorted(f.name for f in keys(PruneSettings))


def test_no_placeholder_is_left():
    assert "@@" not in README
