"""Pictures and figures of a cascade: the candidates, and the images that are handed on."""

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from gating.cascade_search import Candidate, Outcome, Predictions, frontier
from gating.pictures import Hardness, class_means


def draw_frontier(found: Sequence[Candidate], chosen: Candidate, floor: float | None) -> Figure:
    """Accuracy against executed FLOPs: the single networks, the best cascades of them, and the one chosen.

    Args:
        floor: accuracy that the budget asks for, None where there is a target in FLOPs.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    for candidates, style, label in (
        (frontier([c for c in found if len(c.members) > 1]), {"color": "#2ca02c", "linewidth": 1.5}, "cascades"),
        ([c for c in found if len(c.members) == 1], {"color": "#1f77b4", "marker": "s"}, "single networks"),
        ([chosen], {"color": "#d62728", "marker": "D", "linestyle": "none"}, "chosen"),
    ):
        axis.plot([c.flops / 1e9 for c in candidates], [c.accuracy for c in candidates], label=label, **style)
    if floor is not None:
        axis.axhline(floor, color="#999999", linestyle=":", label="budget")
    axis.set(xlabel="mean executed GFLOPs per image", ylabel="accuracy on the validation images")
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def draw_answered(done: Outcome, labels: Tensor, classes: Sequence[str]) -> Figure:
    """Share of each class's images that each member answers."""
    shares = answered_by_class(done, labels, len(classes))
    order = shares[:, 0].argsort()
    figure = Figure(figsize=(6, 1.2 + 0.22 * len(classes)), layout="constrained")
    axis = figure.subplots()
    left = torch.zeros(len(classes))
    for member, share in enumerate(shares[order].t(), start=1):
        axis.barh(range(len(classes)), share, left=left, label=f"network {member}")
        left = left + share
    axis.set_yticks(range(len(classes)), [classes[i] for i in order], parse_math=False)
    axis.set(xlabel="share of the test images that each network answers", xlim=(0, 1))
    axis.xaxis.set_major_formatter(PercentFormatter(1))
    axis.tick_params(axis="y", labelsize=7 if len(classes) > 20 else 9)
    figure.legend(fontsize=8, loc="outside upper center", ncols=shares.shape[1], frameon=False)
    return figure


def hardness_by_answer(done: Outcome, first: Predictions) -> Hardness:
    """Images that go further are harder; among those of one network, the ones of which the first was less confident."""
    confidence = first.probabilities.amax(dim=1)
    captions = [
        f"network {network}: {share:.0%}"
        for network, share in zip(done.members_run.tolist(), confidence.tolist(), strict=True)
    ]
    title = "answered by the first network  <  class  >  handed on furthest (confidence of the first network)"
    return Hardness(done.members_run - confidence.double(), captions, title)


def answered_by_class(done: Outcome, labels: Tensor, classes: int) -> Tensor:
    """Share of each class's images that each member answers, [classes, members]; NaN for a class without images."""
    by_member = torch.stack([done.members_run == m for m in range(1, done.members + 1)], dim=1).double()
    return class_means(by_member, labels, classes)


def what_is_known(done: Outcome, predictions: Sequence[Predictions], labels: Tensor) -> dict[str, Any]:
    """How well the decision separates: accuracies of the first and the last member on images kept and handed on.

    An oracle would hand on exactly those images that the last member gets right and the first does not.

    Args:
        predictions: of the members, in their order.
    """
    right = {"first": predictions[0], "last": predictions[-1]}
    right = {name: network.probabilities.argmax(dim=1) == labels for name, network in right.items()}
    kept, oracle = done.members_run == 1, right["last"] & ~right["first"]
    known = {
        "accuracy": done.correct.double().mean().item(),
        "handed_on": (~kept).double().mean().item(),
        "oracle_accuracy": (right["first"] | right["last"]).double().mean().item(),
        "oracle_handed_on": oracle.double().mean().item(),
    }
    for where, images in (("kept", kept), ("handed_on", ~kept)):
        for name, correct in right.items():
            known[f"accuracy_{name}_{where}"] = correct[images].double().mean().item() if images.any() else None
    return known
