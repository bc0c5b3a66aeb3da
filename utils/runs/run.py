"""The folder of one run: arguments, log, metrics, TensorBoard events and checkpoints."""

import itertools
import json
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from tqdm import tqdm

from utils import parallel
from utils.errors import UserError
from utils.files import write_json
from utils.runs.checkpoint import Checkpoint, load_checkpoint
from utils.runs.tensorboard import Charts, TensorBoard
from utils.settings import NOT_COMPARED, as_dictionary

LAST, BEST, LOCK = "last.pt", "best.pt", ".lock"


@dataclass(frozen=True)
class LastRun:
    """A run that can go on, and the checkpoint to go on from."""

    path: Path
    checkpoint: Checkpoint


def stage_folder(result_dir: str | Path, stage: str, data: str, network: str, depth: int) -> Path:
    """``result_dir/{sp,pruned,rl_pruned}/<data set>/<network><depth>``."""
    return Path(result_dir).expanduser() / stage / data / f"{network}{depth}"


class Run:
    """One run's folder, open for writing.

    ``arguments.json`` what the run was asked for; ``log.txt`` what it said; ``metrics.jsonl`` one line a step;
    TensorBoard events; ``last.pt`` to resume from; ``best.pt`` the network it chose; ``record.json`` its results.

    Of several processes one writes; in the others nothing that is said or recorded goes anywhere.
    """

    def __init__(self, path: Path, purge_after: int | None = None):
        self.path, self._log, self._handlers, self._board = path, None, [], None
        self._lock = None
        if not parallel.is_main_process():
            return
        self._lock = _reserved(path)
        for leftover in path.glob(".*.pt.*"):  # of saves that were killed
            leftover.unlink()
        self._trim_metrics(purge_after)
        self._log = logging.getLogger(f"run.{path}")
        self._log.setLevel(logging.INFO)
        self._log.propagate = False
        to_file = logging.FileHandler(path / "log.txt")
        to_file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self._handlers = [to_file, _AboveTheBar()]
        for handler in self._handlers:
            self._log.addHandler(handler)
        self._board = TensorBoard(path, purge_after)

    @classmethod
    def new(cls, parent: Path, arguments: Mapping[str, Any], charts: Charts, name: str = "") -> "Run":
        """Make a folder of its own for a new run.

        Args:
            charts: that TensorBoard shows several curves in.

        Raises:
            UserError: if the folder cannot be written.
        """
        path = _new_folder(parent, arguments, name) if parallel.is_main_process() else None
        run = cls(parallel.broadcast_object(path))
        if run._board is not None:
            run._board.describe(arguments, charts)
        return run

    @classmethod
    def reopened(cls, last: "LastRun") -> "Run":
        """A run to go on with; what it wrote after its last checkpoint is forgotten."""
        return cls(last.path, purge_after=last.checkpoint.progress["step"])

    def _trim_metrics(self, purge_after: int | None) -> None:
        metrics = self.path / "metrics.jsonl"
        if purge_after is not None and metrics.exists():
            lines = metrics.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= purge_after]
            metrics.write_text("".join(kept))

    def say(self, message: str) -> None:
        """Print a line and keep it in ``log.txt``."""
        if self._log is not None:
            self._log.info(message)

    def record(self, step: int, values: Mapping[str, float], **notes: Any) -> None:
        """Append one line to ``metrics.jsonl``; ``values`` go to TensorBoard too, under their names."""
        if self._board is None:
            return
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **notes, **values}) + "\n")
        self._board.scalars(values, step)

    def picture(self, name: str, figure: Figure, step: int | None = None, number: int | None = None) -> None:
        """Keep a figure as ``name``.png in the folder and under Pictures in TensorBoard.

        Args:
            step: that it shows; None for a picture of the whole run.
            number: of several pictures in turn, a part of the file's name.
        """
        if self._board is None:
            return
        suffix = "" if number is None else f"_{number:02d}"
        figure.savefig(self.path / f"{name}{suffix}.png", dpi=110)
        self._board.figure(name, figure, step)

    def results(self, table: str, values: Mapping[str, float]) -> None:
        """Show the run's results in TensorBoard: a table in Markdown, and ``values`` beside the hyperparameters."""
        if self._board is not None:
            self._board.results(table, values)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        for handler in self._handlers:
            self._log.removeHandler(handler)
            handler.close()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _reserved(path: Path) -> FileLock | None:
    """A lock on a run's folder, which goes with the process, however that ends; None on a file system without locks.

    Raises:
        UserError: if another process has it.
    """
    lock = FileLock(path / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{path} is being written by another process: wait for that, or start a run of its own without --resume"
        ) from None
    except (OSError, NotImplementedError):
        return None
    return lock


def find_last_run(parent: Path, settings: Any) -> LastRun | None:
    """The newest run below ``parent`` that was started with these settings, None where there is none.

    Raises:
        UserError: if its checkpoint cannot be read.
    """
    wanted = as_dictionary(settings)
    for path in sorted(parent.glob("*"), reverse=True):
        if (path / LAST).is_file() and not _differing(path, wanted):
            return LastRun(path, load_checkpoint(path / LAST))
    return None


def open_run(parent: Path, settings: Any, last: LastRun | None, resume: bool, charts: Charts) -> Run:
    """The run to go on with, or a new one below ``parent`` where there is none.

    Args:
        resume: whether the user asked to go on; a new run then says why it is one.
        charts: that TensorBoard shows several curves of a new run in.
    """
    if last is not None:
        return Run.reopened(last)
    arguments = as_dictionary(settings)
    earlier = sorted(path for path in parent.glob("*") if (path / LAST).is_file())
    run = Run.new(parent, arguments, charts, arguments.get("exp_name", ""))
    if resume and not earlier:
        run.say(f"there is no run to go on with in {parent}: this is a new one")
    elif resume:
        run.say(
            f"no run in {parent} has these settings ({earlier[-1].name}: {_differing(earlier[-1], arguments)}): "
            f"this is a new one"
        )
    return run


def _differing(path: Path, wanted: Mapping[str, Any]) -> str:
    """The first setting that a run was started with another value of, empty where there is none."""
    try:
        before = dict(json.loads((path / "arguments.json").read_text()))
    except (OSError, TypeError, ValueError) as error:
        return f"arguments.json cannot be read, {error}"
    for key in wanted:
        if key not in NOT_COMPARED and before.get(key) != wanted[key]:
            return f"{key}={before.get(key)!r}, not {wanted[key]!r}"
    return ""


def _new_folder(parent: Path, arguments: Mapping[str, Any], name: str) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S") + (f"-{name}" if name else "")
    for attempt in itertools.count(1):
        path = parent / (stamp if attempt == 1 else f"{stamp}-{attempt}")
        try:
            path.mkdir(parents=True)
            write_json(path / "arguments.json", dict(arguments))
            return path
        except FileExistsError:  # of a run that started in the same second
            if parent.is_dir():
                continue
            error = f"{parent} is no folder"
        except OSError as other:
            error = str(other)
        raise UserError(f"result folder {parent} cannot be written ({error}): choose another --result_dir")


class _AboveTheBar(logging.Handler):
    """Prints to standard output without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:  # whoever read it has gone: the log goes on in the file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
