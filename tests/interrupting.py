"""Run a stage and send a signal to it at a chosen place: ``python interrupting.py SCRIPT PLACE STEP SIGNAL FLAGS...``.

Signals from outside land anywhere; these land where it hurts, and always there.  PYTHONPATH has the repository's root.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

from utils.runs.run import Run

ROOT = Path(__file__).parents[1]


def main() -> None:
    script, place, step, name, *flags = sys.argv[1:]
    record, replace = Run.record, os.replace
    reached = 0

    def recording(self: Run, at: int, *args, **kwargs) -> None:
        nonlocal reached
        record(self, at, *args, **kwargs)
        reached = at
        if place == "recorded" and at == int(step):  # the line is written, the checkpoint not yet
            os.kill(os.getpid(), signal.Signals[name])

    def replacing(source, target) -> None:
        if place == "saving" and reached == int(step) and Path(target).name == "last.pt":
            os.kill(os.getpid(), signal.Signals[name])  # last.pt is complete under its temporary name only
        replace(source, target)

    Run.record, os.replace = recording, replacing
    sys.argv = [script, *flags]
    runpy.run_path(str(ROOT / script), run_name="__main__")


if __name__ == "__main__":
    main()
