"""Checkpoints that describe themselves: architecture, weights, normalisation, classes, metrics and how to continue.

A checkpoint is a dictionary of plain types and tensors that ``torch.load(weights_only=True)`` accepts, so loading one
never runs code.  Its keys are the fields of ``Checkpoint``.
"""

import hashlib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import ResNet, build_network
from utils import parallel
from utils.data.augment import Normalisation
from utils.data.batches import Splits
from utils.data.folder import DataSet
from utils.errors import UserError
from utils.files import atomic_write
from utils.flops import NetworkCost
from utils.sizes import Size

FORMAT = "switched-resnet-checkpoint-1"


@dataclass
class Checkpoint:
    """One saved network."""

    stage: str  # "sp", "pruned", "rl_pruned" or "cascade"
    architecture: dict[str, Any]  # arguments of models.build_network
    weights: dict[str, Tensor]
    normalisation: dict[str, list[float]]  # mean and std of the training images
    classes: list[str]
    # name, image_size, flip, val_fraction, split_seed, and ``utils.data.batches.Splits.identity``: later stages set the
    # same images aside
    data: dict[str, Any]
    metrics: dict[str, float]  # measured on the images that choices look at
    original: dict[str, float]  # parameters, flops and accuracy of stage 1's network
    seed: int
    progress: dict[str, Any] = field(default_factory=dict)  # epoch, iteration: where a resumed run continues
    training: dict[str, Any] = field(default_factory=dict)  # optimiser and random state, only where a run can resume
    source: str | None = None  # checkpoint that this network came from

    def network(self) -> ResNet:
        """The network with its weights, in evaluation mode, on the CPU.

        Raises:
            UserError: if the function of a user's network was not allowed, or if the weights do not fit the
                architecture.
        """
        try:
            network = build_network(**self.architecture)
            network.load_state_dict(self.weights)
        except PermissionError as error:
            raise UserError(str(error)) from None
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(f"the checkpoint's network cannot be built ({reason}): use another one") from error
        return network.eval()

    def compression(self, cost: NetworkCost) -> float:
        """Share of stage 1's parameters that is removed in a network of this cost."""
        return 1 - cost.parameters / self.original["parameters"]

    def normaliser(self) -> Normalisation:
        return Normalisation(tuple(self.normalisation["mean"]), tuple(self.normalisation["std"]))


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint`` to ``path``, weights on the CPU.  Of several processes one writes and the others wait.

    Raises:
        UserError: if the file cannot be written; an older file at ``path`` is left as it was.
    """
    with parallel.main_process_first():
        if not parallel.is_main_process():
            return
        content = {f.name: getattr(checkpoint, f.name) for f in fields(checkpoint)}
        content["weights"] = {name: tensor.detach().cpu() for name, tensor in checkpoint.weights.items()}
        try:
            with atomic_write(Path(path)) as file:
                torch.save({"format": FORMAT, **content}, file)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"checkpoint {path} cannot be written ({error}): free disk space or choose another folder"
            ) from error


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint; tensors come back on the CPU.

    Raises:
        UserError: if the file is missing, damaged, or no checkpoint of this program.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist: check the path, or run the stage that makes it") from None
    except Exception as error:  # torch.load raises many kinds for a file that is no checkpoint or would run code
        reason = str(error).strip().split("\n")[0][:120]
        raise UserError(
            f"checkpoint {path} cannot be read ({reason}), as it is damaged or of another program: give another one, "
            f"or make it again"
        ) from error
    keys = {f.name for f in fields(Checkpoint)}
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT or content.keys() != keys:
        raise UserError(f"{path} is no checkpoint of this program (format {FORMAT}): give one made by the three stages")
    checkpoint = Checkpoint(**content)
    checkpoint.weights = {  # bf16, which halves a file, becomes float32
        name: weight.float() if weight.dtype == torch.bfloat16 else weight
        for name, weight in checkpoint.weights.items()
    }
    return checkpoint


def weights_digest(checkpoint: Checkpoint) -> str:
    """Tells networks with other weights apart."""
    found = hashlib.sha256()
    for name, weight in sorted(checkpoint.weights.items()):
        found.update(name.encode() + weight.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def is_checkpoint(path: str | Path) -> bool:
    """Whether a file is a checkpoint of this program, not a ``state_dict`` of a user's own network or anything else."""
    try:
        load_checkpoint(path)
    except UserError:
        return False
    return True


def load_network(path: str | Path, device: str | torch.device = "cpu") -> ResNet:
    """Rebuild the network of any stage's checkpoint, ready to evaluate.

    It takes images normalised with the checkpoint's mean and standard deviation, and skips blocks as its switches say.

    Raises:
        UserError: if the file is missing, damaged, or no checkpoint of this program.
    """
    return load_checkpoint(path).network().to(device)


def first_checkpoint(
    settings: Any, network: ResNet, data: DataSet, splits: Splits, normalisation: Normalisation, cost: NetworkCost
) -> Checkpoint:
    """That of a run of stage 1, before anything is measured.

    Args:
        settings: with ``resize``, ``no_flip``, ``val_fraction`` and ``seed``.
    """
    return Checkpoint(
        stage="sp",
        architecture=network.architecture,
        weights=network.state_dict(),
        normalisation={key: list(values) for key, values in asdict(normalisation).items()},
        classes=list(data.classes),
        data={
            "name": data.name,
            "image_size": settings.resize,
            "flip": not settings.no_flip,
            "val_fraction": settings.val_fraction,
            "split_seed": settings.seed,
            **splits.identity,
        },
        metrics={"accuracy": 0.0, "computation": 1.0},
        original={"accuracy": 0.0, "parameters": cost.parameters, "flops": cost.flops},
        seed=settings.seed,
    )


def check_data(checkpoint: Checkpoint, data: DataSet, image_size: Size) -> None:
    """Refuse data that a checkpoint's network was not trained on.

    Raises:
        UserError: if the classes or the image size differ.
    """
    if list(data.classes) != checkpoint.classes:
        raise UserError(
            f"the checkpoint was trained on {len(checkpoint.classes)} classes ({', '.join(checkpoint.classes[:3])}, "
            f"...), the data has {len(data.classes)} ({', '.join(data.classes[:3])}, ...): use the same data"
        )
    if image_size != checkpoint.data["image_size"]:
        raise UserError(
            f"the checkpoint was trained on images of {checkpoint.data['image_size']} pixels, not {image_size}: "
            f"change --resize (resize in config.json)"
        )
