"""The networks that stages 2 and 3 start from: found in the result folder, or named."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.flops import network_cost
from utils.runs.checkpoint import Checkpoint, load_checkpoint
from utils.runs.run import BEST, LAST, stage_folder

COMMANDS = {"sp": "main_sp.py", "pruned": "main_prune.py", "rl_pruned": "main_rl_prune.py"}

Found = list[tuple[Path, Checkpoint]]


def trained_network(settings: Any, data_name: str) -> Checkpoint:
    """What stage 2 starts from: the checkpoint named, or stage 1's with the best accuracy (the newest of equals).

    Args:
        settings: of stage 2 (``pruning.settings.PruneSettings``).

    Raises:
        UserError: if there is none, or if it is of another size.
    """
    if settings.checkpoint:
        path = Path(settings.checkpoint).expanduser()
        trained = load_checkpoint(path)
    else:
        found = finished_checkpoints(settings.result_dir, "sp", data_name, settings.network, settings.depth)
        of_this_width = [item for item in found if item[1].architecture["width"] == settings.width] or found
        path, trained = max(reversed(of_this_width), key=lambda item: item[1].metrics["accuracy"])
    for key in ("network", "depth", "width"):
        if trained.architecture[key] != getattr(settings, key):
            raise UserError(
                f"checkpoint {path} has {key} {trained.architecture[key]}, the settings say {getattr(settings, key)}: "
                f"change {key} or the checkpoint"
            )
    return _started_from(path, trained, "pruned", settings)


def pruned_network(settings: Any, data_name: str) -> Checkpoint:
    """What stage 3 starts from: the checkpoint named, or stage 2's with the fewest FLOPs within the budget.

    Only networks from a stage 1 of the same size as the newest run's count.

    Args:
        settings: of stage 3.

    Raises:
        UserError: if there is none, or if it has no switches.
    """
    if settings.checkpoint:
        path = Path(settings.checkpoint).expanduser()
        pruned = load_checkpoint(path)
    else:
        folder = (settings.result_dir, "pruned", data_name, settings.network, settings.depth)
        found = finished_checkpoints(*folder)
        newest = found[-1][1]
        # The networks that stage 2 chose come first, those of single iterations where its budget was wider than ours.
        within = _within_budget(found, newest, settings.max_accuracy_drop) or _within_budget(
            saved_checkpoints(*folder, "iteration_*.pt"), newest, settings.max_accuracy_drop
        )
        if not within:
            raise UserError(
                f"no network of stage 2 is within {settings.max_accuracy_drop} of stage 1's accuracy: raise "
                f"--max_accuracy_drop, name a --checkpoint, or run main_prune.py with a smaller prune_ratio"
            )
        image_size = newest.data["image_size"]
        path, pruned = min(within, key=lambda item: network_cost(item[1].network(), image_size).flops)
    for key in ("network", "depth"):
        if pruned.architecture[key] != getattr(settings, key):
            raise UserError(
                f"checkpoint {path} has {key} {pruned.architecture[key]}, not {getattr(settings, key)}: change --{key}"
            )
    if pruned.architecture["gate"] == "none":
        raise UserError(f"checkpoint {path} has no switches to teach: train stage 1 with --gate rnn, ff1 or ff2")
    if not pruned.network().deciding:
        raise UserError(
            f"checkpoint {path} has no switch that still decides: give the unsettled.pt beside it, or one of stage 2"
        )
    return _started_from(path, pruned, "rl_pruned", settings)


def _started_from(path: Path, source: Checkpoint, stage: str, settings: Any) -> Checkpoint:
    """The source as a later stage's first checkpoint."""
    name = relative_to_results(path, settings.result_dir)
    return replace(source, stage=stage, source=name, seed=settings.seed, progress={}, training={})


def _within_budget(found: Found, newest: Checkpoint, drop: float) -> Found:
    """The switched networks within the budget that come from a stage 1 of the same cost as the newest run's."""
    return [
        (path, c)
        for path, c in found
        if c.metrics["accuracy"] >= c.original["accuracy"] - drop - 1e-9
        and all(c.original[key] == newest.original[key] for key in ("parameters", "flops"))
        and c.architecture["gate"] == newest.architecture["gate"]
    ]


def saved_checkpoints(result_dir: str | Path, stage: str, data: str, network: str, depth: int, name: str) -> Found:
    """Every checkpoint of a stage for this data set and network whose file is called ``name``, oldest run first."""
    folder = stage_folder(result_dir, stage, data, network, depth)
    return [(path, load_checkpoint(path)) for path in sorted(folder.glob(f"*/{name}"))]


def finished_checkpoints(result_dir: str | Path, stage: str, data: str, network: str, depth: int) -> Found:
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
