"""Splits of the images, and the batches that training and evaluation take from them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from utils import parallel
from utils.data.augment import Normalisation, colour_histogram, crop_and_flip, draw_crops, normalisation_of
from utils.data.folder import DataSet
from utils.data.identity import digest, first_copies, stratified_split
from utils.data.images import Images, with_progress
from utils.errors import UserError

PARTS = {"train": "training", "val": "validation", "test": "test"}


@dataclass(frozen=True)
class Splits:
    """The images of a stage: for training, for model selection, and for the report."""

    train: Images
    val: Images
    test: Images
    val_is_test: bool = False  # where no image was set aside for validation
    # Identifies these images in a checkpoint: fingerprints of all that were ever set aside, int64 [n], and a digest of
    # each part.
    identity: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # notes for the user

    @property
    def val_name(self) -> str:
        """The name of the images that select epochs and budgets."""
        return "test" if self.val_is_test else "validation"

    @property
    def place(self) -> str:
        """The place of the training images, for the log."""
        place = f"images {self.train.place}"
        return place if parallel.world_size() == 1 else f"{place}, {parallel.world_size()} processes"

    def to(self, device: torch.device) -> "Splits":
        return replace(self, train=self.train.to(device), val=self.val.to(device), test=self.test.to(device))


def split_data(data: DataSet, val_fraction: float, seed: int) -> Splits:
    """Set validation images aside: the data's own, else a seeded, stratified share of the training images.

    Copies of a set-aside image are set aside, too.

    Raises:
        UserError: if fewer than two images are left to train on.
    """
    if data.val is not None:
        return _splits(data, data.fingerprints["val"])
    candidates = first_copies(data.fingerprints["train"]).nonzero().squeeze(1)
    _, aside = stratified_split(data.train.labels[candidates], val_fraction, seed)
    splits = _splits(data, data.fingerprints["train"][candidates[aside]])
    if val_fraction == 0 or len(aside):
        return splits
    note = f"no class has enough images for val_fraction {val_fraction:g}: there are no validation images"
    return replace(splits, notes=(*splits.notes, note))


def split_as_before(data: DataSet, known: Mapping[str, Any], resumed: bool = False) -> Splits:
    """The split of an earlier run: images that it set aside are never trained on, even if their files have moved.

    New training images are trained on.  New ones in a ``val/`` folder are left out: an earlier stage may have been
    trained on them.

    Args:
        known: the data's entry in the run's checkpoint.
        resumed: whether that run itself is continued; then no image may have changed.

    Raises:
        UserError: if this is other data, or if fewer than two images are left to train on.
    """
    vanished = check_images(data, known)
    splits = _splits(data, known["set_aside"])
    notes = [*splits.notes]
    if data.val is not None and splits.val_is_test:
        notes.append(
            "the validation images of the data are not used: stage 1 had none, and may have been trained on these; to "
            "use them, start with stage 1 again"
        )
    changed = [PARTS[part] for part in PARTS if splits.identity[part] != known[part]]
    if changed and resumed:
        raise UserError(
            f"the {' and '.join(changed)} images of data {data.name} have changed since this run began: put "
            f"those back, or start a new run without --resume"
        )
    if vanished:
        notes.append(
            f"{vanished} of {len(known['set_aside'])} images that were set aside for validation are no longer in the "
            f"data: {len(splits.val)} are left"
        )
    if PARTS["train"] in changed:
        notes.append("training images were added or removed since the checkpoint was made: the current ones are used")
    return replace(splits, notes=tuple(notes))


def check_images(data: DataSet, known: Mapping[str, Any]) -> int:
    """Refuse data whose test or validation images are not those of a checkpoint's network.

    Args:
        known: the data's entry in the checkpoint.

    Returns:
        how many of the images that were set aside are no longer in the data, at most one half.

    Raises:
        UserError: says which.
    """
    if digest(data.fingerprints["test"]) != known["test"]:
        raise UserError(
            f"the test images of data {data.name} are not those that the checkpoint's run had (other files, or decoded "
            f"by another version of Pillow): use the same data, or start with stage 1 again"
        )
    there = torch.isin(known["set_aside"], data.fingerprints["train" if data.val is None else "val"])
    missing, count = int((~there).sum()), len(there)
    if 2 * missing > count:
        raise UserError(
            f"data {data.name} lacks {missing} of the {count} images that the checkpoint's run set aside for "
            f"validation: use the same data and val_dir, or start with stage 1 again"
        )
    return missing


def _splits(data: DataSet, set_aside: Tensor) -> Splits:
    """Keep images with these fingerprints, int64 [n], out of training; they are the validation images."""
    prints, held = data.fingerprints, "train" if data.val is None else "val"
    kept, aside = (~torch.isin(prints["train"], set_aside), torch.isin(prints[held], set_aside))
    val_is_test = len(set_aside) == 0
    used = {"train": prints["train"][kept], "val": prints[held][aside], "test": prints["test"]}
    copies = int(torch.isin(used["train"], used["test"]).sum())
    note = f"{copies} training images are copies of test images: the test accuracy is too optimistic"
    splits = Splits(
        train=_chosen(data.train, kept),
        val=data.test if val_is_test else _chosen(getattr(data, held), aside),
        test=data.test,
        val_is_test=val_is_test,
        notes=(*data.notes, note) if copies else data.notes,
        identity={"set_aside": set_aside.unique(), **{part: digest(own) for part, own in used.items()}},
    )
    if len(splits.train) < 2:
        raise UserError(
            f"data {data.name} leaves {len(splits.train)} training images that are no validation images, but batch "
            f"norms need two: add others"
        )
    return splits


def _chosen(images: Images, members: Tensor) -> Images:
    """The images with ``members``, bool [N], without a copy if these are all."""
    return images if members.all() else images[members.nonzero().squeeze(1)]


def batch_ends(images: int, batch_size: int) -> list[int]:
    """Where each training batch of an epoch ends; a single image that is left over joins the batch before it.

    In training mode a batch norm over vectors, such as the gates have, cannot work on one image.  Nor can a process on
    none: with several processes, fewer left-over images than processes join the batch before them, too.
    """
    least = max(2, parallel.world_size())
    ends = [*range(batch_size, images, batch_size), images]
    if len(ends) > 1 and ends[-1] - ends[-2] < least:
        del ends[-2]
    return ends


def check_batches(images: int, batch_size: int) -> None:
    """Refuse batches with fewer images than processes.

    Raises:
        UserError: if a batch has fewer images than there are processes.
    """
    if min(images, batch_size) < parallel.world_size():
        raise UserError(
            f"{parallel.world_size()} processes cannot share batches of {min(images, batch_size)} images: start fewer "
            f"processes or choose larger batches"
        )


def training_normalisation(images: Images, batch_size: int = 1024) -> Normalisation:
    """Mean and standard deviation of all images, each process counting its part of them."""
    groups = parallel.local_part(torch.arange(len(images))).split(batch_size)
    counts = torch.zeros(3, 256, dtype=torch.int64)
    for pixels in with_progress(images.batches(groups), "measuring colours", groups):
        counts += colour_histogram(pixels).cpu()
    return normalisation_of(parallel.all_reduced(counts))


@dataclass(frozen=True)
class TrainingBatches:
    """Shuffled, augmented batches: images [B, 3, H, W] in float32, normalised, and labels [B].  Each pass is an epoch.

    Where several processes share the batches, each gets the images of its part (``utils.parallel.local_part``), and the
    labels of the whole batch.

    All random numbers come from ``generator`` (on the CPU), so that its state resumes the sequence.  They are drawn at
    the start of an epoch, and for whole batches, whatever part of them this process gets.
    """

    images: Images
    batch_size: int
    generator: torch.Generator
    normalisation: Normalisation
    flip: bool
    whole: bool = False  # give this process the images of whole batches

    def __len__(self) -> int:
        return len(batch_ends(len(self.images), self.batch_size))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, part = self.images, (lambda tensor: tensor) if self.whole else parallel.local_part
        order = torch.randperm(len(images), generator=self.generator)
        groups = order.tensor_split(batch_ends(len(images), self.batch_size)[:-1])
        crops = [draw_crops(len(group), self.generator, self.flip) for group in groups]
        local = [part(group) for group in groups]
        # Copied to a GPU at once for the epoch, since each copy waits for the GPU.
        labels = images.labels.to(images.device)[order.to(images.device)].split([len(group) for group in groups])
        offsets, mirrored = torch.cat([part(crop) for crop in crops]).to(images.device).split([2, 1], dim=1)
        crops = (t.split([len(group) for group in local]) for t in (offsets, mirrored.squeeze(1) == 1))
        normalise = self.normalisation.on(images.device)
        for pixels, offset, mirror, whole_labels in zip(images.batches(local), *crops, labels, strict=True):
            yield normalise(crop_and_flip(pixels, *offset.unbind(1), mirror)), whole_labels


def plain_batches(
    images: Images, batch_size: int, normalisation: Normalisation, shared: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """The images in their order, normalised and not augmented, with their labels.

    Args:
        shared: every process gets its part of each batch, as in training, with the labels of all.
    """
    groups = torch.arange(len(images)).split(batch_size)
    local = [parallel.local_part(group) for group in groups] if shared else groups
    labels = images.labels.to(images.device).split(batch_size)
    yield from zip(map(normalisation.on(images.device), images.batches(local)), labels, strict=True)
