"""The records of finished runs: each lies in the folder of its run, and the results are made from all of them.

Runs may end at the same moment.  A record is written by its own run, whole and where no other run writes, so that none
can be lost; what all runs share is written under a lock.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from utils.errors import UserError
from utils.files import write_json
from utils.runs.run import age

METHODS = {
    "sp": "w/o Pruning",
    "pruned": "w/ Static Pruning only",
    "rl_pruned": "w/ Static and Dynamic Pruning",
    "cascade": "w/ Static Pruning and Cascade",
}
DYNAMIC = ("rl_pruned", "cascade")  # stages whose networks decide image by image what is run
RECORD, RESULTS, LOCK = "record.json", "results.json", ".results.lock"
PATIENCE = 60.0  # seconds to wait for a run that writes its results, which takes one or two
NOT_MEASURED = {"latency_ms": None, "throughput": None}
Record = dict[str, Any]
NEEDED = {  # to be shown in the table and the picture
    "stage", "method", "dataset", "network", "depth", "width", "accuracy", "gflops", "compression", "parameters",
    "computation", "checkpoint", "source", "selected_on", "points", "accuracy_every_block", "within_budget",
    "seed", "image_size", "latency_ms", "throughput",
}  # fmt: skip


def read_records(result_dir: Path) -> list[Record]:
    """Every record below ``result_dir``, oldest run first.

    Raises:
        UserError: if a file cannot be read.
    """
    paths = [path for stage in METHODS for path in result_dir.glob(f"{stage}/*/*/*/{RECORD}")]  # data set, network, run
    return sorted(map(_content, paths), key=lambda record: _age(result_dir, record))


def save_records(result_dir: Path, records: list[Record]) -> None:
    """Write each record into the folder of its run.

    Raises:
        UserError: if one cannot be written.
    """
    for record in records:
        folder = (result_dir / record["checkpoint"]).parent
        try:
            write_json(folder / RECORD, record)
        except OSError as error:
            raise UserError(
                f"results cannot be written to {folder} ({error}): free disk space or fix permissions"
            ) from None


@contextmanager
def results_locked(result_dir: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Keep other runs from reading or writing the shared results meanwhile.

    The lock is released when its process ends.  If it cannot be had, because the file system has no locks or a stopped
    run holds it, this run says so and continues without: records are safe in any case, and the next run that ends
    makes the results again from all of them.
    """
    lock = FileLock(result_dir / LOCK, timeout=PATIENCE)
    try:
        lock.acquire()
    except (OSError, NotImplementedError) as error:  # running out of patience is an OSError, too
        say(f"{result_dir} cannot be locked ({error}): results.md may lack a row until the next run ends")
    try:
        yield
    finally:
        lock.release()


def latest_chain(records: list[Record], last: Record | None = None) -> list[Record]:
    """The newest record of one network and those of the stages it was made from, first stage first."""
    by_run = {Path(record["checkpoint"]).parent: record for record in records}
    chain = [last or records[-1]]
    by_run.pop(Path(chain[0]["checkpoint"]).parent, None)
    while chain[0]["source"] is not None:
        earlier = by_run.pop(Path(chain[0]["source"]).parent, None)  # popped: no record leads back to itself
        if earlier is None:
            break
        chain.insert(0, earlier)
    return chain


def chains(records: list[Record]) -> list[list[Record]]:
    """Every chain of stages, the newest first: a last run, and the runs that it was made from."""
    found, shown = [], set()
    for record in reversed(records):
        if record["checkpoint"] not in shown:
            found.append(latest_chain(records, record))
            shown |= {r["checkpoint"] for r in found[-1]}
    return found


def timed_together(chain: list[Record]) -> list[Record]:
    """The records of a chain with the speeds that its last run measured for all; older records keep their own."""
    together = chain[-1].get("chain_speeds")
    return chain if together is None else [r | together.get(r["checkpoint"], NOT_MEASURED) for r in chain]


def _content(path: Path) -> Record:
    try:
        record = json.loads(path.read_text())
        if not isinstance(record, dict) or not record.keys() >= NEEDED or record["stage"] not in list(METHODS):
            raise ValueError("it is no record of a run, or of another version of this program")
        return record
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): move it away, then run its stage with the same settings and --resume, "
            "which makes a new one"
        ) from None


def _age(result_dir: Path, record: Record) -> tuple:
    """Sort key: the time of the run's start, then what identifies the run."""
    checkpoint = record["checkpoint"]
    return age((result_dir / checkpoint).parent), list(METHODS).index(record["stage"]), checkpoint
