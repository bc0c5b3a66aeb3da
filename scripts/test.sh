#!/usr/bin/env bash
# Install what the tests need into .venv and run them; arguments go to pytest.
source "$(dirname "$0")/environment.sh"
use_environment requirements-dev.txt
python -m pytest -q -n auto --dist loadfile "$@"
