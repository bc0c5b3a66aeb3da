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
from utils.sizes import parse_size

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
NUMBER, NONE = (int, float), type(None)
NEEDED = {  # to be shown in the table and the picture
    "stage": str, "method": str, "dataset": str, "network": str, "depth": (int, str), "width": (int, str),
    "accuracy": NUMBER, "gflops": NUMBER, "compression": NUMBER, "parameters": int, "computation": NUMBER,
    "checkpoint": str, "source": (str, NONE), "selected_on": str, "points": list, "accuracy_every_block": NUMBER,
    "within_budget": bool, "seed": int, "image_size": (int, str), "latency_ms": (*NUMBER, NONE),
    "throughput": (*NUMBER, NONE),
}  # fmt: skip


def read_records(result_dir: Path) -> list[Record]:
    """Every record below ``result_dir``, oldest run first.

    Raises:
        UserError: if a file cannot be read.
    """
    paths = [path for stage in METHODS for path in result_dir.glob(f"{stage}/*/*/*/{RECORD}")]  # data set, network, run
    found = [_content(path, (path.parent / BEST).relative_to(result_dir).as_posix()) for path in paths]
    return sorted(found, key=lambda record: _age(result_dir, record))


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


def latest_chain(records: list[Record], last: Record | None = None) -> list[Record]:
    """The newest record of one network and those of the stages it was made from, first stage first."""
    by_run = {Path(name).parent: record for record in records for name in record.get("renamed", ())}
    by_run |= {Path(record["checkpoint"]).parent: record for record in records}
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
    if together is None:
        return chain
    return [r | next((together[name] for name in names(r) if name in together), NOT_MEASURED) for r in chain]


def names(record: Record) -> list[str]:
    """The checkpoint of a record, and as it was called before its run's folder was renamed."""
    return [record["checkpoint"], *record.get("renamed", ())]


def _content(path: Path, checkpoint: str) -> Record:
    """The record in a file whose run has its network in ``checkpoint``: the run's folder may have been renamed."""
    try:
        record = json.loads(path.read_text())
        if not isinstance(record, dict) or not record.keys() >= NEEDED.keys() or record["stage"] not in list(METHODS):
            raise ValueError("it is no record of a run, or of another version of this program")
        if isinstance(record.get("renamed"), str):  # as an earlier version wrote it
            record["renamed"] = [record["renamed"]]
        _check_values(record)
        if record["checkpoint"] != checkpoint:
            record |= {"renamed": names(record), "checkpoint": checkpoint}
        return record
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): move it away, then run its stage with the same settings and --resume, "
            "which makes a new one"
        ) from None


def _check_values(record: Record) -> None:
    """Refuse values that neither the table nor the picture can show.

    Raises:
        ValueError: names the first one.
    """
    for key, kinds in NEEDED.items():
        if not isinstance(record[key], kinds):
            raise ValueError(f"{key} is {record[key]!r}")
    parse_size(record["image_size"])
    if not isinstance(record.get("renamed", []), list):
        raise ValueError(f"renamed is {record['renamed']!r}")
    measured, points = record.get("chain_speeds", {}), record["points"]
    if not all(isinstance(point, dict) and point.keys() >= {"accuracy", "measured_on"} for point in points):
        raise ValueError(f"points are {points!r}")
    if not isinstance(measured, dict) or not all(isinstance(speeds, dict) for speeds in measured.values()):
        raise ValueError(f"chain_speeds are {measured!r}")


def _age(result_dir: Path, record: Record) -> tuple:
    """Sort key: the time of the run's start, then what identifies the run."""
    checkpoint = record["checkpoint"]
    return age((result_dir / checkpoint).parent), list(METHODS).index(record["stage"]), checkpoint
