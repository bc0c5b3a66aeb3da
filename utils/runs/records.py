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
from utils.runs.run import BEST, RECORD, age

METHODS = {
    "sp": "w/o Pruning",
    "pruned": "w/ Static Pruning only",
    "rl_pruned": "w/ Static and Dynamic Pruning",
    "cascade": "w/ Static Pruning and Cascade",
}
DYNAMIC = ("rl_pruned", "cascade")  # stages whose networks decide image by image what is run
RESULTS, LOCK = "results.json", ".results.lock"
PATIENCE = 60.0  # seconds to wait for a run that writes its results, which takes one or two
NOT_MEASURED = {"latency_ms": None, "throughput": None}
Record = dict[str, Any]


def read_records(result_dir: Path) -> list[Record]:
    """Every record below ``result_dir``, oldest run first.

    Raises:
        UserError: if a file cannot be read.
    """
    paths = [path for stage in METHODS for path in sorted(result_dir.glob(f"{stage}/*/*/*/{RECORD}"))]
    paths.sort(key=lambda path: age(path.parent))
    return [_content(path, (path.parent / BEST).relative_to(result_dir).as_posix()) for path in paths]


def save_record(result_dir: Path, record: Record) -> None:
    """Write a record into the folder of its run.

    Raises:
        UserError: if it cannot be written.
    """
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
    except (OSError, NotImplementedError) as error:  # a timeout is an OSError, too
        say(f"{result_dir} cannot be locked ({error}): results.md may lack a row until the next run ends")
    try:
        yield
    finally:
        lock.release()


def latest_chain(records: list[Record], last: Record) -> list[Record]:
    """A record and those of the stages that its network was made from, first stage first."""
    by_run = {Path(name).parent: record for record in records for name in record.get("renamed", ())}
    by_run |= {Path(record["checkpoint"]).parent: record for record in records}
    chain = [last]
    while chain[0]["source"] and (earlier := by_run.get(Path(chain[0]["source"]).parent)):
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
    """The records of a chain with the speeds that its last run measured for all."""
    together = chain[-1].get("chain_speeds", {})
    return [r | next((together[name] for name in names(r) if name in together), NOT_MEASURED) for r in chain]


def names(record: Record) -> list[str]:
    """The checkpoint of a record, and as it was called before its run's folder was renamed."""
    return [record["checkpoint"], *record.get("renamed", ())]


def _content(path: Path, checkpoint: str) -> Record:
    """The record in a file whose run has its network in ``checkpoint``: the run's folder may have been renamed."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): move it away, then run its stage with the same settings and --resume, "
            "which makes a new one"
        ) from None
    if record["checkpoint"] != checkpoint:
        record |= {"renamed": [record["checkpoint"]], "checkpoint": checkpoint}
    return record
