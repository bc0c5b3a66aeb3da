"""The decisions of a finished run on the test images: pictures and ``routing.json``."""

import torch

from gating.pictures import (
    by_class,
    class_means,
    draw_easy_and_hard,
    draw_executed,
    draw_path,
    draw_run_shares,
    hardness_by_flops,
)
from training.evaluate import Evaluator
from training.norms import placed
from utils import parallel
from utils.data.images import Images
from utils.files import write_json
from utils.runs.checkpoint import Checkpoint
from utils.runs.run import Run


def record_routing(run: Run, best: Checkpoint, test: Images, floor: float, device: torch.device) -> None:
    """Draw and write the decisions of the best network.

    Args:
        floor: accuracy that the budget asks for.
    """
    classes = best.classes
    measured = Evaluator(test, best.normaliser(), best.data["image_size"])(placed(best.network(), device))
    if not parallel.is_main_process():
        return
    labels = test.labels.cpu()
    run_shares = class_means(measured.decisions, labels, len(classes))
    run.picture("runs_by_class", draw_run_shares(run_shares, classes))
    run.picture("executed_flops", draw_executed(measured.executed, measured.flops_all))
    for name, figure in draw_easy_and_hard(test, hardness_by_flops(measured.executed), classes):
        run.picture(name, figure)
    epochs = [values for values in run.recorded() if "Overview/accuracy_val" in values]
    path = [[values[tag] for values in epochs] for tag in ("Overview/accuracy_val", "Overview/executed_flops")]
    run.picture("accuracy_against_flops", draw_path(*path, floor))
    routing = {
        "flops_every_block": measured.flops_all,
        "flops_executed": measured.flops_executed,
        "flops_executed_by_class": by_class(class_means(measured.executed, labels, len(classes)), classes),
        "run_shares": measured.run_shares,
        "run_shares_by_class": by_class(run_shares, classes),
    }
    write_json(run.path / "routing.json", routing)
