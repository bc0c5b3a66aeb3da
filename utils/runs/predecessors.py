"""The networks that stages 2 and 3 start from: found in the result folder, or named."""

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from models import is_own
from utils import parallel
from utils.data.batches import check_images
from utils.data.folder import DataSet
from utils.errors import UserError
from utils.flops import network_cost
from utils.runs.checkpoint import Checkpoint, check_data, load_checkpoint, weights_digest
from utils.runs.records import RECORD
from utils.runs.run import BEST, LAST, age, stage_folder

COMMANDS = {"sp": "main_sp.py", "pruned": "main_prune.py", "rl_pruned": "main_rl_prune.py"}
NAMED = 5  # runs that a line names at most

T = TypeVar("T")
Found = list[tuple[Path, Checkpoint]]
Search = Callable[[Any, DataSet], T]


def _by_first_process(search: Search) -> Search:
    """The search of the first of several processes, for all: others may see other files."""

    @wraps(search)
    def shared(settings: Any, data: DataSet) -> T:
        _ = data.fingerprints  # which all processes compute together, before one compares them
        return parallel.from_main_process(lambda: search(settings, data))

    return shared


@_by_first_process
def trained_network(settings: Any, data: DataSet) -> tuple[Checkpoint, list[str]]:
    """What stage 2 starts from: the checkpoint named, or that of the newest run of stage 1 that fits and has ended.

    A run fits if its network, depth, width, image size and images are those of the settings; one that has not ended is
    taken only where no other is left.

    Args:
        settings: of stage 2 (``pruning.settings.PruneSettings``).

    Returns:
        the first checkpoint of stage 2, and lines for the log: which was taken, and which others there were.

    Raises:
        UserError: if there is none that fits, or if the one named does not.
    """
    if settings.checkpoint:
        path, trained = _named(settings, data)
        if 0 in trained.architecture.get("fixed_switches", {}).values():
            raise UserError(
                f"checkpoint {path} is of stage 3, which has removed blocks, so its FLOPs cannot be compared: prune "
                f"the network that stage 3 started from, or before_fixing.pt beside it"
            )
        return _started_from(path, trained, "pruned", settings), []
    found, unfit = _saved(settings, "sp", data, BEST)
    if not found:
        raise _nothing_fits(settings, "sp", data, unfit)
    ended = _ended(found)
    path, trained = (ended or found)[-1]
    why = "the newest run of stage 1 that fits" + ("" if ended else "; no finished run fits")
    notes = [f"starting from {_introduced(path, trained, settings)}: {why}", *_others(path, found, unfit, settings)]
    return _started_from(path, trained, "pruned", settings), notes


@_by_first_process
def pruned_network(settings: Any, data: DataSet) -> tuple[Checkpoint, list[str]]:
    """What stage 3 starts from: the checkpoint named, or stage 2's with the fewest FLOPs within the budget.

    Networks must have switches, and the depth, image size and images of the settings.  They are searched in this order:
    networks and single iterations of runs that have ended, made from the same network of stage 1 as the newest run's;
    those made from another network of stage 1; networks of unfinished runs.

    Args:
        settings: of stage 3.

    Returns:
        the first checkpoint of stage 3, and lines for the log: which was taken, and which others there were.

    Raises:
        UserError: if there is none, or if the one named does not fit.
    """
    if settings.checkpoint:
        path, pruned = _named(settings, data, switched=True)
        return _started_from(path, pruned, "rl_pruned", settings), []
    found, unfit = _saved(settings, "pruned", data, BEST, "iteration_*.pt", switched=True)
    if not found:
        raise _nothing_fits(settings, "pruned", data, unfit)
    pools = _by_origin(_ended(found)) + _by_origin(found)
    within = next(filter(None, (_within_budget(pool, settings.max_accuracy_drop) for pool in pools)), None)
    if within is None:
        raise UserError(
            f"no network of stage 2 is within {settings.max_accuracy_drop} of stage 1's accuracy: raise "
            f"--max_accuracy_drop, name a --checkpoint, or run main_prune.py with a smaller prune_ratio"
        )
    path, pruned = min(within, key=lambda item: network_cost(item[1].network(), settings.resize).flops)
    why = f"the smallest network within the budget that was made from {pruned.source}"
    notes = [f"starting from {_introduced(path, pruned, settings)}: {why}", *_others(path, found, unfit, settings)]
    return _started_from(path, pruned, "rl_pruned", settings), notes


@_by_first_process
def cascade_networks(settings: Any, data: DataSet) -> tuple[Found, list[str]]:
    """The networks that a cascade may be made of: those named, or those of the newest run of every stage that fits.

    With several networks or depths in the settings, of each.  All iterations of stage 2 count.

    Args:
        settings: of ``main_cascade.py``.

    Returns:
        the files and checkpoints, and lines for the log on their origin.

    Raises:
        UserError: if there are fewer than two, or if one that was named does not fit.
    """
    if settings.networks:
        unfit = {}
        paths = dict.fromkeys(Path(name).expanduser().resolve() for name in settings.networks)
        found = [(path, load_checkpoint(path)) for path in paths]
        for path, checkpoint in found:
            if checkpoint.stage == "cascade":
                raise UserError(f"{path} is a cascade itself: name the networks that it was made of")
            try:
                _check_data(checkpoint, settings, data)
            except UserError as error:
                raise UserError(f"{path} does not fit: {error}") from None
    else:
        found, unfit = [], {}
        kinds = [(name, depth) for name in settings.network for depth in settings.depth[: 1 if is_own(name) else None]]
        for (network, depth), (stage, name) in product(
            kinds, (("sp", BEST), ("pruned", "iteration_*.pt"), ("rl_pruned", BEST))
        ):
            fitting, others = _saved(replace(settings, network=network, depth=depth), stage, data, name)
            unfit |= others
            fitting = _ended(fitting) or fitting
            found += [item for item in fitting if item[0].parent == fitting[-1][0].parent]
        if unfit and len(found) < 2:
            raise _nothing_fits(settings, "pruned", data, unfit)
    if len(found) < 2:
        raise UserError(
            f"a cascade needs two networks or more, and there are {len(found)} in {settings.result_dir}: run "
            f"main_prune.py first, or name --networks"
        )
    runs = dict.fromkeys(relative_to_results(path.parent, settings.result_dir) for path, _ in found)
    return found, [f"networks of {', '.join(runs)}", *_others(None, [], unfit, settings)]


def _named(settings: Any, data: DataSet, switched: bool = False) -> tuple[Path, Checkpoint]:
    path = Path(settings.checkpoint).expanduser()
    checkpoint = load_checkpoint(path)
    _check(path, checkpoint, settings, data, switched)
    return path, checkpoint


def has_ended(path: Path) -> bool:
    """Whether the run that wrote a checkpoint has ended; one without a run's files beside it was put there by hand."""
    return (path.parent / RECORD).exists() or not (path.parent / LAST).exists()


def _ended(found: Found) -> Found:
    return [item for item in found if has_ended(item[0])]


def _started_from(path: Path, source: Checkpoint, stage: str, settings: Any) -> Checkpoint:
    """The source as a later stage's first checkpoint."""
    name = relative_to_results(path, settings.result_dir)
    return replace(source, stage=stage, source=name, seed=settings.seed, progress={}, training={})


def _saved(
    settings: Any, stage: str, data: DataSet, *names: str, switched: bool = False
) -> tuple[Found, dict[Path, UserError]]:
    """The checkpoints of a stage with one of the names that fit, oldest run first, and why the other runs do not."""
    folder = stage_folder(settings.result_dir, stage, data.name, settings.network, settings.depth)
    paths = [path for name in names for path in sorted(folder.glob(f"*/{name}"))]
    found, unfit = [], {}
    for path in sorted(paths, key=lambda path: age(path.parent)):
        try:
            checkpoint = load_checkpoint(path)
            _check(path, checkpoint, settings, data, switched)
            found.append((path, checkpoint))
        except UserError as error:  # of a run that was abandoned, too
            unfit.setdefault(path.parent, error)
    return found, unfit


def _check(path: Path, checkpoint: Checkpoint, settings: Any, data: DataSet, switched: bool = False) -> None:
    """Refuse a checkpoint that does not fit the settings and the data.

    Args:
        switched: whether it needs switches that decide.

    Raises:
        UserError: with the reason.
    """
    keys = ("network",) if is_own(settings.network) else ("network", "depth", "width")
    for key in keys:
        if getattr(settings, key, checkpoint.architecture.get(key)) != checkpoint.architecture.get(key):
            raise UserError(
                f"checkpoint {path} has {key} {checkpoint.architecture[key]}, the settings say "
                f"{getattr(settings, key)}: change {key} or the checkpoint"
            )
    _check_data(checkpoint, settings, data)
    network = checkpoint.network()
    if switched and checkpoint.architecture.get("gate", "none") == "none":
        raise UserError(f"checkpoint {path} has no switches to train: train stage 1 with --gate rnn, ff1 or ff2")
    if switched and not network.free_switches:
        raise UserError(
            f"checkpoint {path} has no switch that still decides: give the before_fixing.pt beside it, or one of stage "
            "2"
        )


def _nothing_fits(settings: Any, stage: str, data: DataSet, unfit: dict[Path, UserError]) -> UserError:
    """Why the newest run does not fit, or that there is none."""
    if unfit:
        path, error = list(unfit.items())[-1]
        more = f" (older ones that do not fit either: {len(unfit) - 1})" if len(unfit) > 1 else ""
        return UserError(f"{relative_to_results(path, settings.result_dir)} does not fit{more}: {error}")
    folder = stage_folder(settings.result_dir, stage, data.name, settings.network, settings.depth)
    return UserError(f"no checkpoint {folder}/*/{BEST}: run {COMMANDS[stage]} with the same data and network first")


def _introduced(path: Path, checkpoint: Checkpoint, settings: Any) -> str:
    name, accuracy = relative_to_results(path, settings.result_dir), checkpoint.metrics["accuracy"]
    return f"{name} (gate {checkpoint.architecture.get('gate', 'none')}, accuracy {accuracy:.2%})"


def _others(taken: Path | None, found: Found, unfit: dict[Path, UserError], settings: Any) -> list[str]:
    """A line on the runs that fit and were not taken, and one on those that do not fit, newest first."""
    fitting = [
        _introduced(path, checkpoint, settings)
        for path, checkpoint in reversed(found)
        if path.name == BEST and (taken is None or path.parent != taken.parent)
    ]
    unfitting = [f"{relative_to_results(path, settings.result_dir)} ({unfit[path]})" for path in reversed(unfit)]
    lines = []
    for title, names in (("other runs that fit", fitting), ("runs that do not fit", unfitting)):
        if names:
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            lines.append(f"{title}: {', '.join(names[:NAMED])}{more} (set checkpoint to choose one)")
    return lines


def _by_origin(found: Found) -> list[Found]:
    """By the network of stage 1 that they were made from, that of the newest run first."""
    origins = dict.fromkeys(checkpoint.source for _, checkpoint in reversed(found))
    return [[item for item in found if item[1].source == origin] for origin in origins]


def _within_budget(found: Found, drop: float) -> Found:
    return [(path, c) for path, c in found if c.metrics["accuracy"] >= c.original["accuracy"] - drop - 1e-9]


def relative_to_results(path: Path, result_dir: str | Path) -> str:
    """``path`` below ``result_dir``, so that the folder can be moved; as it is where it lies elsewhere."""
    path, root = Path(path), Path(result_dir).expanduser()
    for below, above in ((path.absolute(), root.absolute()), (path.resolve(), root.resolve())):  # a stage may be a link
        if below.is_relative_to(above):
            return str(below.relative_to(above))
    return str(path.resolve())


def source_path(source: str, result_dir: str | Path) -> Path:
    """The file that a checkpoint's ``source`` names."""
    return Path(result_dir).expanduser() / source  # an absolute source stays as it is


def source_of(start: Checkpoint, result_dir: str | Path) -> Checkpoint:
    """The network that a run started from.

    Args:
        start: the first checkpoint of the run or, where it is resumed, its last one.

    Raises:
        UserError: if it has changed since the run began.
    """
    source = load_checkpoint(source_path(start.source, result_dir))
    before = start.progress.get("source_weights")  # none in a run that begins
    if before and before != weights_digest(source):
        raise UserError(
            f"{start.source} has changed since this run began, so that it cannot be continued: start a new run without "
            f"--resume"
        )
    return source


def _check_data(checkpoint: Checkpoint, settings: Any, data: DataSet) -> None:
    check_data(checkpoint, data, settings.resize)
    check_images(data, checkpoint.data)
