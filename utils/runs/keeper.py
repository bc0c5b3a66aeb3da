"""What a run keeps: the best network so far, and everything that an interrupted run needs to continue."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from models import ResNet
from utils.errors import UserError
from utils.runs.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from utils.runs.run import BEST, LAST, Run


@dataclass
class Progress:
    """The progress of a run; stages add fields of their own."""

    step: int = 0  # epochs done; in stage 2 every pruning counts as one more
    best: list | None = None  # score of the best network so far, None before the first
    source_weights: str = ""  # ``weights_digest`` of the network that the run started from


class Keeper:
    """Writes ``best.pt`` and ``last.pt`` of a run, and restores from them.

    Args:
        template: the run's checkpoint without weights, metrics and progress.
        network: its weights are saved.
        stateful: what else a resumed run needs, by name: optimisers, random numbers; each has ``state_dict`` and
            ``load_state_dict``.
        best_name: file of the best network.
    """

    def __init__(
        self,
        run: Run,
        template: Checkpoint,
        network: ResNet,
        progress: Progress,
        stateful: Mapping[str, Any],
        best_name: str = BEST,
    ):
        self.template, self.network, self.progress, self.stateful = template, network, progress, dict(stateful)
        self.best_path, self._last_path = run.path / best_name, run.path / LAST

    def offer(self, score: Sequence[float], metrics: dict[str, float]) -> bool:
        """Keep the network as the best if its score is above all earlier ones; returns whether it was kept."""
        score = list(score)
        if self.progress.best is not None and score <= self.progress.best:
            return False
        self.progress.best = score
        save_checkpoint(self.best_path, self._checkpoint(metrics))
        return True

    def save_last(self) -> None:
        """Save all that a resumed run needs."""
        training = {name: item.state_dict() for name, item in self.stateful.items()}
        save_checkpoint(self._last_path, replace(self._checkpoint(self.template.metrics), training=training))

    def resume(self, last: Checkpoint) -> None:
        """Continue from where ``last`` was saved.

        Raises:
            UserError: if another version of this program saved it.
        """
        try:
            self.network.load_state_dict(last.weights)
            vars(self.progress).update(last.progress)
            for name, item in self.stateful.items():
                item.load_state_dict(last.training[name])
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{self._last_path} cannot be resumed ({type(error).__name__}: {error}): it was saved by another "
                f"version; start a new run without --resume"
            ) from error

    def best(self) -> Checkpoint:
        return load_checkpoint(self.best_path)

    def _checkpoint(self, metrics: dict[str, float]) -> Checkpoint:
        original = self.template.original
        if self.template.stage == "sp":  # stage 1's network is the one that all others are compared with
            original = {**original, "accuracy": metrics["accuracy"]}
        return replace(
            self.template,
            architecture=self.network.architecture,
            weights=self.network.state_dict(),
            metrics=metrics,
            original=original,
            progress=asdict(self.progress),
            training={},
        )
