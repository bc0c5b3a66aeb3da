"""The folder of one run: arguments, log, metrics, TensorBoard events and checkpoints."""

import json
import logging
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils import parallel
from utils.checkpoint import Checkpoint, load_checkpoint
from utils.errors import UserError
from utils.files import written_whole

LAST, BEST = "last.pt", "best.pt"
COMMANDS = {"sp": "main_sp.py", "pruned": "main_prune.py", "rl_pruned": "main_rl_prune.py"}


def stage_folder(result_dir: str | Path, stage: str, data: str, network: str, depth: int) -> Path:
    """``result_dir/{sp,pruned,rl_pruned}/<data set>/<network><depth>``."""
    return Path(result_dir).expanduser() / stage / data / f"{network}{depth}"


class Run:
    """One run's folder, open for writing.

    ``arguments.json`` what the run was asked for; ``log.txt`` what it said; ``metrics.jsonl`` one line a step;
    TensorBoard events; ``last.pt`` to resume from; ``best.pt`` the network it chose.

    Of several processes one writes; in the others nothing that is said or recorded goes anywhere.
    """

    def __init__(self, path: Path, purge_after: int | None = None):
        self.path, self._log, self._handlers, self._writer = path, None, [], None
        if not parallel.is_writer():
            return
        self._trim_metrics(purge_after)
        self._log = logging.getLogger(f"run.{path}")
        self._log.setLevel(logging.INFO)
        self._log.propagate = False
        to_file = logging.FileHandler(path / "log.txt")
        to_file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self._handlers = [to_file, _AboveTheBar()]
        for handler in self._handlers:
            self._log.addHandler(handler)
        self._writer = SummaryWriter(str(path), purge_step=None if purge_after is None else purge_after + 1)

    @classmethod
    def new(cls, parent: Path, arguments: Mapping[str, Any], name: str = "") -> "Run":
        """Make a folder of its own for a new run.

        Raises:
            UserError: if the folder cannot be written.
        """
        made = cls._made(parent, arguments, name) if parallel.is_writer() else None
        path = parallel.from_writer(made and made.path)
        return made or cls(path)

    @classmethod
    def _made(cls, parent: Path, arguments: Mapping[str, Any], name: str) -> "Run":
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S") + (f"-{name}" if name else "")
        try:
            parent.mkdir(parents=True, exist_ok=True)
            path, attempt = parent / stamp, 1
            while path.exists():
                attempt += 1
                path = parent / f"{stamp}-{attempt}"
            path.mkdir()
            write_json(path / "arguments.json", dict(arguments))
            return cls(path)
        except OSError as error:
            raise UserError(
                f"result folder {parent} cannot be written ({error}): choose another --result_dir"
            ) from None

    @classmethod
    def resume(cls, parent: Path, arguments: Mapping[str, Any], may_differ: Iterable[str]) -> tuple["Run", Checkpoint]:
        """Open the newest run below ``parent`` and the checkpoint to go on from; what came after it is forgotten.

        Raises:
            UserError: if there is none, or if it was started with other settings than ``arguments``.
        """
        runs = sorted(path for path in parent.glob("*") if (path / LAST).is_file())
        if not runs:
            raise UserError(f"--resume found no run with a {LAST} in {parent}: start one without --resume")
        try:
            before = dict(json.loads((runs[-1] / "arguments.json").read_text()))
        except (OSError, TypeError, ValueError) as error:
            raise UserError(f"{runs[-1]} has no readable arguments.json ({error}): start a new run") from None
        for key in sorted((set(before) | set(arguments)) - set(may_differ)):
            if before.get(key) != arguments.get(key):
                raise UserError(
                    f"{runs[-1]} was started with {key}={before.get(key)!r}, not {arguments.get(key)!r}: "
                    f"resume with the same settings or start a new run"
                )
        checkpoint = load_checkpoint(runs[-1] / LAST)
        if parallel.is_writer():
            for leftover in runs[-1].glob(f".{LAST}.*"):  # of a save that was killed
                leftover.unlink()
        return cls(runs[-1], purge_after=checkpoint.progress["step"]), checkpoint

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
        if self._writer is None:
            return
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **notes, **values}) + "\n")
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def histogram(self, tag: str, values: Tensor, step: int) -> None:
        if self._writer is not None:
            self._writer.add_histogram(tag, values.detach().float().cpu(), step)

    def picture(self, name: str, figure: Figure, step: int) -> None:
        """Keep a figure as ``name``.png in the folder and under Pictures in TensorBoard."""
        if self._writer is None:
            return
        figure.savefig(self.path / f"{name}.png", dpi=110)
        self._writer.add_figure(f"Pictures/{name}", figure, step)  # closes the figure

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        for handler in self._handlers:
            self._log.removeHandler(handler)
            handler.close()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _AboveTheBar(logging.Handler):
    """Prints to standard output without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON through a temporary file, so that a reader never sees half of it."""
    with written_whole(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def saved_checkpoints(
    result_dir: str | Path, stage: str, data: str, network: str, depth: int, name: str
) -> list[tuple[Path, Checkpoint]]:
    """Every checkpoint of a stage for this data set and network whose file is called ``name``, oldest run first."""
    folder = stage_folder(result_dir, stage, data, network, depth)
    return [(path, load_checkpoint(path)) for path in sorted(folder.glob(f"*/{name}"))]


def finished_checkpoints(
    result_dir: str | Path, stage: str, data: str, network: str, depth: int
) -> list[tuple[Path, Checkpoint]]:
    """Every ``best.pt`` of a stage, as ``saved_checkpoints``.

    Raises:
        UserError: if there is none; the message says which command makes one.
    """
    found = saved_checkpoints(result_dir, stage, data, network, depth, BEST)
    if not found:
        folder = stage_folder(result_dir, stage, data, network, depth)
        raise UserError(f"no checkpoint {folder}/*/{BEST}: run {COMMANDS[stage]} with the same data and network first")
    return found


def epochs_missing(path: Path) -> int:
    """Epochs that the run which wrote a checkpoint of stage 1 or 3 has yet to train; 0 where nothing tells."""
    try:
        wanted = json.loads((path.parent / "arguments.json").read_text())["epochs"]
        return max(0, wanted - load_checkpoint(path.parent / LAST).progress["step"])
    except (OSError, KeyError, TypeError, ValueError, UserError):
        return 0


def relative_to_results(path: Path, result_dir: str | Path) -> str:
    """``path`` below ``result_dir``, so that the folder can be moved; as it is where it lies elsewhere."""
    path, root = Path(path).resolve(), Path(result_dir).expanduser().resolve()
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def source_path(source: str, result_dir: str | Path) -> Path:
    """The file that a checkpoint's ``source`` names."""
    return Path(result_dir).expanduser() / source  # an absolute source stays as it is
