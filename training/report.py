"""The measurements of a finished run's chosen network, and its row in the results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from models import CASCADE, is_own
from training.evaluate import Evaluator
from training.norms import placed
from utils import parallel
from utils.data.images import Images
from utils.flops import network_cost
from utils.runs.checkpoint import Checkpoint
from utils.runs.predecessors import relative_to_results
from utils.runs.records import (
    DYNAMIC,
    METHODS,
    NOT_MEASURED,
    Record,
    latest_chain,
    read_records,
    results_locked,
    save_record,
)
from utils.runs.results import results_picture, results_table, shown_accuracy, write_results
from utils.runs.run import BEST, Run

TIMED_IMAGES = 1000  # test images at most that speeds are measured on
SHOWN = ("compression", "computation", "gflops", "latency_ms", "parameters", "throughput")  # beside hyperparameters
# From checkpoints by name and test images, uint8 [N, 3, H, W], to latency_ms and throughput by name: ``deploy.speeds``.
MeasureSpeeds = Callable[[dict[str, Path], Tensor], dict[str, dict[str, float]]]


@dataclass(frozen=True)
class Chosen:
    """The network that a run chose, and how."""

    best: Checkpoint
    selected_on: str  # "validation", "test" or "last epoch"
    within_budget: bool = True  # whether it met the budget of accuracy or computation
    points: Sequence[dict[str, Any]] = ()  # gflops and accuracy of other networks of the run, for the picture


def report(result_dir: str | Path, run: Run, chosen: Chosen, test: Images, measure_speeds: MeasureSpeeds) -> Record:
    """Measure a finished run's best network on the test images; add it to the results, draw them, print the table.

    Several processes share the test images; one does the rest.

    Args:
        test: on the device to measure on.
        measure_speeds: of the exported networks.
    """
    best = chosen.best
    result_dir = Path(result_dir).expanduser()
    network = placed(best.network(), test.device)
    cost = network_cost(network, best.data["image_size"])
    measured, every = Evaluator(test, best.normaliser(), best.data["image_size"]).both(network)
    counted = measured.flops_executed if best.stage in DYNAMIC else measured.flops_all
    record = {
        "method": METHODS[best.stage],
        "stage": best.stage,
        "dataset": best.data["name"],
        **subject(best.architecture),
        "accuracy": measured.accuracy,
        "accuracy_every_block": every.accuracy,
        "gflops": counted / 1e9,
        "gflops_all": measured.flops_all / 1e9,
        "gflops_executed": measured.flops_executed / 1e9,
        "parameters": cost.parameters,
        "compression": best.compression(cost),
        "computation": measured.computation,
        "image_size": best.data["image_size"],
        "seed": best.seed,
        "checkpoint": relative_to_results(run.path / BEST, result_dir),
        "source": best.source,
        "selected_on": chosen.selected_on,
        "within_budget": chosen.within_budget,
        "points": list(chosen.points),
        **NOT_MEASURED,
    }
    if not parallel.is_main_process():
        return record
    save_record(result_dir, record)  # first, so that a later failure cannot lose it
    run.say("measuring the exported networks")
    files = {r["checkpoint"]: result_dir / r["checkpoint"] for r in latest_chain(read_records(result_dir), record)}
    speeds = measure_speeds(files, test[:: -(-len(test) // TIMED_IMAGES)].pixels.cpu())
    record["chain_speeds"] = {name: speeds.get(name, NOT_MEASURED) for name in files}
    record |= record["chain_speeds"][record["checkpoint"]]
    save_record(result_dir, record)
    with results_locked(result_dir, run.say):
        records = read_records(result_dir)  # read again: other runs may have ended meanwhile
        write_results(result_dir, records)
    chain = latest_chain(records, record)
    run.say(f"\n{results_table(chain)}")
    shown = {"accuracy": shown_accuracy(record)} | {key: record[key] for key in SHOWN if record[key] is not None}
    run.results(results_table(chain), shown)
    run.picture("results", results_picture(chain))
    run.say(f"table    {result_dir / 'results.md'}")
    run.say(f"picture  {result_dir / 'results.png'}")
    run.say(f"watch    tensorboard --logdir {result_dir}  (overview: http://localhost:6006/#custom_scalars)")
    return record


def subject(architecture: dict[str, Any]) -> dict[str, Any]:
    """The record's fields of a network; for a cascade those of the last member."""
    if architecture["network"] == CASCADE:
        return subject(architecture["members"][-1])
    if is_own(architecture["network"]):
        name = architecture["network"].rpartition(":")[2]
        return {"network": name, "depth": "", "width": "", "num_classes": architecture["num_classes"]}
    return {key: architecture[key] for key in ("network", "depth", "width", "num_classes", "gate")}
