"""Interruptions from outside: signals that end a command, and outputs that have lost their reader.

This is imported before everything else, so nothing here may take long to import.
"""

import io
import os
import signal
import sys
from contextlib import suppress
from functools import partial
from types import FrameType

from utils.errors import WITH_RESUME, kept

ENDED_BY = {
    "SIGINT": "interrupted",
    "SIGTERM": "ended by SIGTERM",
    "SIGHUP": "ended by SIGHUP, its terminal was closed",
}


def prepare(goes_on: str | None = WITH_RESUME) -> None:
    """From now on signals end the command with one sentence, and text that cannot be printed is dropped.

    Signals that were ignored before, as under nohup, still are.

    Args:
        goes_on: the command that continues from there; None if there is none.
    """
    # Pictures are drawn without any window.  A notebook names a backend to the commands that it starts, too, and
    # Matplotlib ends their import where that is not installed beside it.
    os.environ.pop("MPLBACKEND", None)
    _keep_outputs()
    for name, what in ENDED_BY.items():
        number = signal.Signals[name]
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, partial(_end, what + kept(goes_on)))


def _end(sentence: str, number: int, frame: FrameType | None) -> None:
    """End at once, wherever the program is: all that is saved is written whole or not at all.

    An exception is of no use here.  Finalizers, callbacks and C++ code swallow it or turn it into another one, and a
    second signal would interrupt what the first has begun.
    """
    for name in ENDED_BY:
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    with suppress(OSError):  # not ``print``, which may have been interrupted
        os.write(2, ("\n" * os.isatty(2) + f"{sentence}\n").encode())  # below a progress bar, where there is one
    os._exit(128 + number)


class _Output(io.FileIO):
    """Standard output or error that drops its text once its reader, terminal or disk space is gone."""

    def write(self, content: bytes) -> int:
        try:
            return super().write(content)
        except OSError:
            return len(content)


def _keep_outputs() -> None:
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        encoding = getattr(getattr(sys, name), "encoding", "utf-8")
        output = io.BufferedWriter(_Output(descriptor, "wb", closefd=False))
        setattr(sys, name, io.TextIOWrapper(output, encoding, errors="backslashreplace", line_buffering=True))
