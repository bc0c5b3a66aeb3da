"""Splits of the images, and the batches that training and evaluation take from them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from utils import parallel
from utils.data.augment import Normalisation, colour_histogram, crop_and_flip, draw_crops, normalisation_of
from utils.data.folder import DataSet
from utils.data.images import Images
from utils.errors import UserError


@dataclass(frozen=True)
class Splits:
    """The images of a stage: to train on, to choose epochs and budgets by, and to report on."""

    train: Images
    val: Images
    test: Images
    val_is_test: bool = False  # where no image was set aside for validation

    @property
    def val_name(self) -> str:
        """What the images that choices look at are called."""
        return "test" if self.val_is_test else "validation"

    @property
    def place(self) -> str:
        """Where the training images are, as a run says it."""
        place = f"images {self.train.place}"
        return place if parallel.world_size() == 1 else f"{place}, {parallel.world_size()} processes"

    def to(self, device: torch.device) -> "Splits":
        return Splits(self.train.to(device), self.val.to(device), self.test.to(device), self.val_is_test)


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the kept and of the set-aside images, the same share of every class, at least one kept of each.

    Args:
        labels: int64 [N].
        fraction: share to set aside, in [0, 1).
        seed: the same seed gives the same split.
    """
    generator = torch.Generator().manual_seed(seed)
    kept, aside = [], []
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        count = min(round(fraction * len(members)), len(members) - 1)
        aside.append(members[:count])
        kept.append(members[count:])
    return torch.cat(kept).sort().values, torch.cat(aside).sort().values


def split_data(data: DataSet, val_fraction: float, seed: int) -> Splits:
    """Set validation images aside: the data's own, else a seeded, stratified share of the training images.

    Raises:
        UserError: if fewer than two images are left to train on.
    """
    splits = _split(data, val_fraction, seed)
    if len(splits.train) < 2:
        raise UserError(
            f"data {data.name} leaves {len(splits.train)} image to train on: batch norms need two, add more"
        )
    return splits


def _split(data: DataSet, val_fraction: float, seed: int) -> Splits:
    if data.val is not None:
        return Splits(data.train, data.val, data.test)
    kept, aside = stratified_split(data.train.labels, val_fraction, seed)
    if len(aside) == 0:
        return Splits(data.train, data.test, data.test, val_is_test=True)
    return Splits(data.train[kept], data.train[aside], data.test)


def batch_ends(images: int, batch_size: int) -> list[int]:
    """Where each training batch of an epoch ends; a single image that is left over joins the batch before it.

    In training mode a batch norm over vectors, such as the gates have, cannot work on one image.  Nor can a process on
    none: with more than two processes, fewer images than processes that are left over join the batch before them, too.
    """
    least = max(2, parallel.world_size())
    ends = [*range(batch_size, images, batch_size), images]
    if len(ends) > 1 and ends[-1] - ends[-2] < least:
        del ends[-2]
    return ends


def check_batches(images: int, batch_size: int) -> None:
    """Refuse batches that do not go round.

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
    local = torch.arange(len(images))[parallel.local_slice(len(images))]
    counts = torch.zeros(3, 256, dtype=torch.int64)
    for pixels in images.batches(local.split(batch_size)):
        counts += colour_histogram(pixels).cpu()
    return normalisation_of(parallel.all_reduced(counts))


@dataclass(frozen=True)
class TrainingBatches:
    """Shuffled, augmented batches: images [B, 3, H, W] in float32, normalised, and labels [B].  Each pass is an epoch.

    Where several processes share the batches, each gets the images of its part (``utils.parallel.local_part``), and the
    labels of the whole batch.

    Every random number comes from ``generator`` (a CPU generator), so that its state resumes the sequence.  All are
    drawn when an epoch begins, and for whole batches, whatever part of them this process gets.
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
        # What an epoch needs on a GPU goes there at once, since the GPU is waited for each time.
        labels = _labels(images)[order.to(images.device)].split([len(group) for group in groups])
        offsets, mirrored = torch.cat([part(crop) for crop in crops]).to(images.device).split([2, 1], dim=1)
        numbers = torch.arange(max(len(group) for group in local), device=images.device)
        crops = (t.split([len(group) for group in local]) for t in (offsets, mirrored.squeeze(1) == 1))
        normalise = self.normalisation.on(images.device)
        for pixels, offset, mirror, whole_labels in zip(images.batches(local), *crops, labels, strict=True):
            yield normalise(crop_and_flip(pixels, numbers[: len(pixels)], *offset.unbind(1), mirror)), whole_labels


def plain_batches(
    images: Images, batch_size: int, normalisation: Normalisation, every: int = 1, first: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """The images in their order, normalised and not augmented, with their labels.

    Args:
        every, first: give each ``every``-th batch only, beginning with the batch of index ``first``.
    """
    groups, labels = (t.split(batch_size)[first::every] for t in (torch.arange(len(images)), _labels(images)))
    yield from zip(map(normalisation.on(images.device), images.batches(groups)), labels, strict=True)


def _labels(images: Images) -> Tensor:
    """All labels, where batches are."""
    return images.labels.to(images.device)


def whole_batches_by_process(
    images: Images, batch_size: int, normalisation: Normalisation
) -> Iterator[tuple[Tensor, Tensor]]:
    """``plain_batches`` of which each process gets whole ones in turn: every ``world_size``-th."""
    return plain_batches(images, batch_size, normalisation, parallel.world_size(), parallel.rank())


def batch_parts_by_process(
    images: Images, batch_size: int, normalisation: Normalisation
) -> Iterator[tuple[Tensor, Tensor]]:
    """``plain_batches`` of which each process gets its part of every one, as in training, with the labels of all."""
    groups = [parallel.local_part(group) for group in torch.arange(len(images)).split(batch_size)]
    batches = map(normalisation.on(images.device), images.batches(groups))
    yield from zip(batches, _labels(images).split(batch_size), strict=True)
