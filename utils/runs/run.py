"""The folder of one run: arguments, log, metrics, TensorBoard events and checkpoints."""

import io
import itertools
import json
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from tqdm import tqdm

from models import is_own
from utils import parallel
from utils.errors import UserError
from utils.files import atomic_write, write_json
from utils.runs.checkpoint import Checkpoint, load_checkpoint
from utils.runs.tensorboard import Charts, TensorBoard
from utils.settings import NOT_COMPARED

LAST, BEST, LOCK, METRICS = "last.pt", "best.pt", ".lock", "metrics.jsonl"
ARGUMENTS, LOG = "arguments.json", "log.txt"
RECORD = "record.json"
FINISHED = (RECORD, "results.png")  # what a run writes at its very end
STARTED = "started"  # beside the settings in arguments.json: when, an absolute time


@dataclass(frozen=True)
class LastRun:
    """An unfinished run, and the checkpoint to continue from."""

    path: Path
    checkpoint: Checkpoint


def stage_folder(result_dir: str | Path, stage: str, data: str, network: str, depth: int) -> Path:
    """``result_dir/<stage>/<data set>/<network><depth>``; a user's network is called as its function."""
    name = network.rpartition(":")[2] if is_own(network) else f"{network}{depth}"
    return Path(result_dir).expanduser() / stage / data / name


class Run(AbstractContextManager):
    """One run's folder, open for writing.

    Files: ``arguments.json`` (the settings), ``log.txt``, ``metrics.jsonl`` (one line per step), TensorBoard events,
    ``last.pt`` (to resume from), ``best.pt`` (the chosen network) and ``record.json`` (the results).

    Of several processes only the first one writes.
    """

    def __init__(self, path: Path, purge_after: int | None = None):
        self.path, self._board, self._lock = path, None, None
        if not parallel.is_main_process():
            return
        self._lock = _reserved(path)
        try:
            if purge_after is not None:
                _trim(path / METRICS, purge_after)
            self._board = TensorBoard(path, purge_after)
        except OSError as error:
            self.close()
            raise UserError(
                f"run folder {path} cannot be written ({error}): free disk space, fix permissions or choose another "
                f"--result_dir"
            ) from error

    @classmethod
    def new(cls, parent: Path, arguments: Mapping[str, Any], charts: Charts) -> "Run":
        """Make a folder of its own for a new run.

        Args:
            charts: that TensorBoard shows several curves in.

        Raises:
            UserError: if the folder cannot be written.
        """
        path = _new_folder(parent, arguments) if parallel.is_main_process() else None
        run = cls(parallel.broadcast_object(path))
        if run._board is not None:
            run._board.show_settings(arguments, charts)
        return run

    def say(self, message: str) -> None:
        """Print a line and keep it in ``log.txt``."""
        if self._board is None:
            return
        tqdm.write(message, file=sys.stdout)  # above a progress bar
        sys.stdout.flush()
        _append(self.path / LOG, f"{datetime.now():%Y-%m-%d %H:%M:%S} {message}\n")

    def record(self, step: int, values: Mapping[str, float], **notes: Any) -> None:
        """Append one line to ``metrics.jsonl``; ``values`` go to TensorBoard too, under their names."""
        if self._board is None:
            return
        _append(self.path / METRICS, json.dumps({"step": step, **notes, **values}) + "\n")
        self._board.scalars(values, step)

    def recorded(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``."""
        return [json.loads(line) for line in _lines(self.path / METRICS)]

    def picture(self, name: str, figure: Figure, step: int | None = None, number: int | None = None) -> None:
        """Keep a figure as ``name``.png in the folder and under Pictures in TensorBoard.

        Args:
            step: that it shows; None for a picture of the whole run.
            number: of several pictures in turn, a part of the file's name.
        """
        if self._board is None:
            return
        suffix = "" if number is None else f"_{number:02d}"
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=110)
        self._board.picture(name, png.getvalue(), step)
        with atomic_write(self.path / f"{name}{suffix}.png") as file:
            file.write(png.getvalue())

    def results(self, table: str, values: Mapping[str, float]) -> None:
        """Show the run's results in TensorBoard: a table in Markdown, and ``values`` beside the hyperparameters."""
        if self._board is not None:
            self._board.results(table, values)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._lock is not None:
            self._lock.release()

    def __exit__(self, *exception: object) -> None:
        self.close()


def _reserved(path: Path) -> FileLock | None:
    """A lock on a run's folder, released when the process ends; None on a file system without locks.

    Raises:
        UserError: if another process has it.
    """
    lock = FileLock(path / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{path} is being written by another process: wait until it ends, or start a separate run without --resume"
        ) from None
    except (OSError, NotImplementedError):
        return None
    return lock


def started_runs(parent: Path) -> list[Path]:
    """The runs below ``parent`` that can be continued, oldest first."""
    return sorted((path.parent for path in parent.glob(f"*/{LAST}") if (path.parent / ARGUMENTS).exists()), key=age)


def age(path: Path) -> tuple[float, str]:
    """Sort key for run folders: the time of their start in seconds since 1970, 0 where it cannot be read; the name."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        return datetime.fromisoformat(json.loads((path / ARGUMENTS).read_text())[STARTED]).timestamp(), path.name
    return 0.0, path.name


def choose_run(parent: Path, settings: Any) -> Path | None:
    """The newest run below ``parent`` with these settings that has not ended, else the newest that has; else None."""
    fitting = [path for path in started_runs(parent) if not _differing(path, settings)]
    unfinished = [path for path in fitting if not all((path / name).exists() for name in FINISHED)]
    return (unfinished or fitting or [None])[-1]


def find_last_run(parent: Path, settings: Any) -> LastRun | None:
    """The run that --resume continues, None if there is none.  One process chooses for all.

    Raises:
        UserError: if its checkpoint cannot be read.
    """
    path = parallel.from_main_process(lambda: choose_run(parent, settings))
    try:
        return None if path is None else LastRun(path, load_checkpoint(path / LAST))
    except UserError as error:
        raise UserError(f"{error}; move {path} away, or start a new run without --resume") from error


def open_run(parent: Path, settings: Any, last: LastRun | None, resume: bool, charts: Charts) -> Run:
    """The run to continue, or a new one below ``parent`` if there is none.

    Args:
        resume: whether the user gave --resume; a new run then says why it is new.
        charts: that TensorBoard shows several curves of a new run in.
    """
    if last is not None:
        return Run(last.path, last.checkpoint.progress["step"])
    earlier = started_runs(parent)
    run = Run.new(parent, asdict(settings), charts)
    if resume and not earlier:
        run.say(f"there is no run to continue in {parent}: starting a new one")
    elif resume:
        run.say(
            f"no run in {parent} has these settings ({earlier[-1].name}: {_differing(earlier[-1], settings)}): "
            "starting a new one"
        )
    return run


def _differing(path: Path, settings: Any) -> str:
    """The first setting whose value differs from that of the run; empty if there is none."""
    before = json.loads((path / ARGUMENTS).read_text())
    for key, wanted in asdict(settings).items():
        if key not in NOT_COMPARED and before.get(key) != wanted:
            return f"{key}={before.get(key)!r}, not {wanted!r}"
    return ""


def _new_folder(parent: Path, arguments: Mapping[str, Any]) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for attempt in itertools.count(1):
            path = parent / (stamp if attempt == 1 else f"{stamp}-{attempt}")
            with suppress(FileExistsError):  # of a run that started in the same second
                path.mkdir()
                write_json(path / ARGUMENTS, {**arguments, STARTED: datetime.now(timezone.utc).isoformat()})
                return path
    except OSError as error:
        raise UserError(f"result folder {parent} cannot be written ({error}): choose another --result_dir") from error


def _append(path: Path, line: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(line)


def _lines(metrics: Path) -> list[str]:
    """The lines of ``metrics.jsonl``; a last one that was cut short is left out."""
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return [line for line in lines if line.endswith("\n")]


def _trim(metrics: Path, step: int) -> None:
    """Forget what was recorded after ``step``."""
    kept = [line for line in _lines(metrics) if json.loads(line)["step"] <= step]
    with atomic_write(metrics) as file:
        file.write("".join(kept).encode())
