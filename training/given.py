"""Registers a network of the user's own as the run of stage 1 that all other commands start from."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import OwnNetwork
from training.evaluate import Evaluator
from training.norms import placed
from training.report import Chosen, MeasureSpeeds, report
from training.scalars import EPOCH_CHARTS
from utils import parallel
from utils.data.augment import Normalisation
from utils.data.batches import split_data, training_normalisation
from utils.data.folder import DataSet
from utils.errors import UserError
from utils.flops import network_cost
from utils.runs.checkpoint import Checkpoint, first_checkpoint, load_checkpoint, save_checkpoint, weights_digest
from utils.runs.records import RECORD
from utils.runs.run import BEST, Run, stage_folder
from utils.sizes import height_width, shown_size

PREFIXES = ("module.", "_orig_mod.")
WRAPPERS = ("state_dict", "model")  # keys under which training scripts keep the weights


def register_given(settings: Any, data: DataSet, device: torch.device, measure_speeds: MeasureSpeeds) -> Path:
    """Evaluate the given network and save it as a finished run of stage 1, only once if it is pruned several times.

    Args:
        settings: of stage 2 (``pruning.settings.PruneSettings``): ``network`` is its function, ``checkpoint`` a file
            with its weights.

    Returns:
        the file of the network in that run.

    Raises:
        UserError: if function, weights or output do not fit.
    """
    network = given_network(settings, len(data.classes))
    splits = split_data(data, settings.val_fraction, settings.seed).to(device)
    if settings.mean:
        normalisation = Normalisation(tuple(settings.mean), tuple(settings.std))
    else:
        normalisation = training_normalisation(splits.train)
    cost = network_cost(network, settings.resize)
    given = first_checkpoint(settings, network, data, splits, normalisation, cost)
    parent = stage_folder(settings.result_dir, "sp", data.name, settings.network, settings.depth)
    known = parallel.from_main_process(lambda: [p for p in sorted(parent.glob(f"*/{BEST}")) if _registered(given, p)])
    if known:
        return known[-1]
    with Run.new(parent, asdict(settings), EPOCH_CHARTS) as run:
        run.say(f"{run.path}: {settings.network} as it was given, {cost.parameters:,} parameters, {cost.flops:,} FLOPs")
        given.metrics = Evaluator(splits.val, normalisation, settings.resize)(placed(network, device)).metrics
        given.original["accuracy"] = given.metrics["accuracy"]
        save_checkpoint(run.path / BEST, given)
        report(settings.result_dir, run, Chosen(given, splits.val_name), splits.test, measure_speeds)
    return run.path / BEST


def given_network(settings: Any, classes: int) -> OwnNetwork:
    """The network that the settings name, with its weights, in evaluation mode.

    Raises:
        UserError: as ``register_given``.
    """
    try:
        network = OwnNetwork(settings.network, classes).eval()
    except ValueError as error:
        raise UserError(str(error)) from error
    if not any(p.requires_grad for p in network.parameters()):
        raise UserError(f"{settings.network} returns a network without trainable parameters: nothing can be fine-tuned")
    if settings.checkpoint:
        _load(network.network, Path(settings.checkpoint).expanduser(), settings.network)
    size = settings.resize
    try:
        with torch.no_grad():
            outputs = network(torch.zeros(2, 3, *height_width(size))).logits
    except ValueError as error:
        raise UserError(f"{settings.network}: {error}") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{settings.network} cannot take images of {shown_size(size)} pixels ({reason}): change resize"
        ) from error
    if outputs.shape[1] != classes:
        raise UserError(
            f"{settings.network} has {outputs.shape[1]} classes and the data has {classes}: use the network or "
            f"data with the same number of classes"
        )
    return network


def _load(network: torch.nn.Module, path: Path, source: str) -> None:
    """Load a file with a ``state_dict``, also one that is wrapped, or of a network that was."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist: give the file with the weights of {source}") from None
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:120]
        raise UserError(
            f"checkpoint {path} cannot be read ({reason}): save the network's state_dict() again"
        ) from error
    for key in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"checkpoint {path} holds no state_dict: save the network's state_dict()")
    own = network.state_dict()
    # Batch norms of PyTorch before 0.4.1 counted no batches.
    uncounted = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")}
    weights = uncounted | {_unwrapped(name, own): value for name, value in content.items()}
    wrong = [name for name in own if name not in weights or weights[name].shape != own[name].shape]
    wrong += [name for name in weights if name not in own]
    if wrong:
        name = wrong[0]
        found, wanted = (list(d[name].shape) if name in d else "missing" for d in (weights, own))
        raise UserError(
            f"checkpoint {path} does not fit {source}: {len(wrong)} of {len(own)} weights differ, {name} is {found} in "
            f"the file and {wanted} in the network"
        )
    network.load_state_dict(weights)


def _unwrapped(name: str, own: Mapping[str, Tensor]) -> str:
    """The name of a weight without what ``DataParallel`` and ``torch.compile`` put in front of it."""
    while name not in own and name.startswith(PREFIXES):
        name = name.partition(".")[2]
    return name


def _registered(given: Checkpoint, path: Path) -> bool:
    """Whether a run of stage 1 that has ended is of the same network, weights and images."""
    if not (path.parent / RECORD).exists():
        return False
    try:
        other = load_checkpoint(path)
    except UserError:
        return False
    images = given.data.keys() - {"set_aside"}  # which follow from the digests of the parts
    return (
        weights_digest(given) == weights_digest(other)
        and all(getattr(given, key) == getattr(other, key) for key in ("architecture", "normalisation", "classes"))
        and all(given.data[key] == other.data[key] for key in images)
    )
