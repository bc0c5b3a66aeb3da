"""Measurements that docs/measurements.md quotes, each with its command."""

import sys
from importlib import import_module
from types import ModuleType


def required(name: str) -> ModuleType:
    """A module of benchmarks/requirements.txt; if it is missing the command ends with one sentence."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        print(
            f"error: {error.name} is not installed: pip install -r benchmarks/requirements.txt",
            file=sys.stderr,
        )
        sys.exit(2)
