"""Pictures of a routed network, as matplotlib figures."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from utils.data.images import Images

CLASSES_A_PAGE = 10  # of images
MOST_PAGES = 10  # each takes seconds to draw


def draw_run_shares(shares: Tensor, classes: Sequence[str]) -> Figure:
    """Share of images for which each switched block runs, one row per class; ``shares`` [classes, K]."""
    figure = Figure(figsize=(2 + 0.5 * shares.shape[1], 1.2 + 0.22 * len(classes)), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axis.set(xlabel="switch", ylabel="class", title="share of test images for which the block runs")
    axis.set_xticks(range(shares.shape[1]), [str(i + 1) for i in range(shares.shape[1])])
    axis.set_yticks(range(len(classes)), classes, fontsize=7 if len(classes) > 20 else 9, parse_math=False)
    figure.colorbar(image, ax=axis, format=PercentFormatter(1))
    return figure


def draw_executed(executed: Tensor, flops_all: float) -> Figure:
    """Histogram over the images of the FLOPs spent on each, ``executed`` [N]."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axis = figure.subplots()
    axis.hist(executed.numpy() / flops_all, bins=50, range=(0, 1), color="#1f77b4")
    axis.axvline(executed.mean().item() / flops_all, color="#d62728", label="mean")
    axis.set(xlabel="executed FLOPs, % of the FLOPs with every block run", ylabel="test images")
    axis.xaxis.set_major_formatter(PercentFormatter(1))
    axis.legend()
    return figure


@dataclass(frozen=True)
class Hardness:
    """The order of a picture of easy and hard images."""

    values: Tensor  # [N], the least for the easiest image
    captions: Sequence[str]  # of the images
    title: str


def hardness_by_flops(executed: Tensor) -> Hardness:
    """The more FLOPs an image takes, [N], the harder it is."""
    captions = [f"{flops / 1e6:.2f}" for flops in executed.tolist()]
    return Hardness(
        executed, captions, "cheapest test images  <  class  >  most expensive test images (executed MFLOPs)"
    )


def draw_easy_and_hard(
    images: Images, hardness: Hardness, classes: Sequence[str], count: int = 5
) -> Iterator[tuple[str, Figure]]:
    """The easiest (left) and hardest (right) images of each class, page by page; of more than 100 classes the first."""
    labels = images.labels.cpu()
    chosen = list(zip(classes, extremes_by_class(hardness.values, labels, len(classes), count), strict=True))
    firsts = range(0, len(classes), CLASSES_A_PAGE)[:MOST_PAGES]
    for number, first in enumerate(firsts, start=1):
        page = chosen[first : first + CLASSES_A_PAGE]
        size = (1.05 * (2 * count + 1), 1.25 * len(page))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(page), 2 * count + 1, squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
        for row, (name, (easy, hard)) in zip(axes, page, strict=True):
            row[count].text(0.5, 0.5, name, parse_math=False, ha="center", va="center", fontsize=9)
            for start, members in ((0, easy), (count + 1, hard)):
                for column, i in enumerate(members.tolist(), start):
                    row[column].imshow(images[i : i + 1].pixels[0].cpu().permute(1, 2, 0).numpy())
                    row[column].set_title(hardness.captions[i], fontsize=7, pad=2)
        figure.suptitle(hardness.title)
        yield ("easy_and_hard" if len(classes) <= CLASSES_A_PAGE else f"easy_and_hard_{number:02d}"), figure


def draw_path(accuracies: Sequence[float], executed: Sequence[float], floor: float) -> Figure:
    """Accuracy against executed FLOPs over the epochs of stage 3."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    mflops = [value / 1e6 for value in executed]
    axis.plot(mflops, accuracies, color="#999999", linewidth=0.8)
    points = axis.scatter(mflops, accuracies, c=range(len(mflops)), cmap="viridis", zorder=3, s=18)
    axis.axhline(floor, color="#d62728", linestyle=":", label="budget")
    axis.set(xlabel="mean executed MFLOPs per image", ylabel="accuracy with thresholded decisions")
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.legend()
    figure.colorbar(points, ax=axis, label="epoch")
    return figure


def class_means(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Means over each class's images, [classes, ...] for values [N, ...]; NaN for a class without images."""
    return torch.stack([values[labels == label].mean(dim=0) for label in range(classes)])


def by_class(means: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """The means of each class that has images, as plain data."""
    return {name: own.tolist() for name, own in zip(classes, means, strict=True) if not own.isnan().any()}


def extremes_by_class(values: Tensor, labels: Tensor, classes: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """For each class the indices of its ``count`` images of least and of greatest value, the extremes first.

    Args:
        values: [N]; equal ones keep their order.
        labels: int64 [N].
    """
    result = []
    for label in range(classes):
        members = (labels == label).nonzero().squeeze(1)
        order = members[values[members].argsort(stable=True)]
        reverse = members[values[members].argsort(stable=True, descending=True)]
        result.append((order[:count], reverse[:count]))
    return result
