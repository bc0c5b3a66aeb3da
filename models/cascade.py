"""A cascade: a small network answers if it is confident and hands other images on to the next network."""

from collections.abc import Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.decisions import DecisionRule, thresholded
from models.resnet import RoutedOutput

ANSWERS = ("last", "mean")


class Member(NamedTuple):
    """One network of a cascade, and what it expects of its images."""

    network: nn.Module  # returns a ``RoutedOutput``
    mean: Sequence[float]  # of each channel, of pixels in [0, 1]
    std: Sequence[float]


class Cascade(nn.Module):
    """Networks in turn: each runs only on the images on which all before it were unsure.

    An image is handed on where the largest probability of the answer so far is below a member's threshold.  Source:
    cascades of whole networks (arXiv:2012.01988, section 3); the largest probability of the softmax as confidence
    (arXiv:2307.02764).

    Args:
        members: from the cheapest to the most expensive; they may have switches of their own.
        thresholds: of every member but the last, in [0, 1].
        answer: "last" takes the prediction of the last member that ran, "mean" the mean of all that ran.

    Raises:
        ValueError: for fewer than two members, another number of thresholds, or an unknown ``answer``.
    """

    fixed_switches = MappingProxyType({})  # of its own; members may have some

    def __init__(self, members: Sequence[Member], thresholds: Sequence[float], answer: str):
        super().__init__()
        if len(members) < 2 or len(thresholds) != len(members) - 1:
            raise ValueError(
                f"{len(members)} networks and {len(thresholds)} thresholds: a cascade takes n and n - 1, n > 1"
            )
        if not all(0 <= threshold <= 1 for threshold in thresholds):
            raise ValueError(f"thresholds are {list(thresholds)}: they take numbers from 0 to 1")
        if answer not in ANSWERS:
            raise ValueError(f"answer {answer!r} is unknown: use one of {', '.join(ANSWERS)}")
        self.architecture = {
            "network": "cascade",
            "members": [
                {**member.network.architecture, "mean": list(member.mean), "std": list(member.std)}
                for member in members
            ],
            "thresholds": [float(threshold) for threshold in thresholds],
            "answer": answer,
        }
        self.thresholds, self.answer = self.architecture["thresholds"], answer
        self.members = nn.ModuleList(member.network for member in members)
        for name in ("mean", "std"):
            values = torch.tensor([list(getattr(member, name)) for member in members])
            self.register_buffer(name, values, persistent=False)

    @property
    def switches(self) -> int:
        """K, one between each two members, then those of the members."""
        return len(self.thresholds) + sum(member.switches for member in self.members)

    def forward(self, images: Tensor, decide: DecisionRule = thresholded) -> RoutedOutput:
        """Classify images, each only by the members that it reaches.

        Args:
            images: [N, 3, H, W] with pixels in [0, 1].
            decide: ``thresholded`` hands on what a member is unsure of, ``all_on`` everything.

        Returns:
            logits: [N, classes], logarithms of probabilities.
            probabilities: [N, K]; of a switch between members above one half where the confidence is below the
                threshold; 0 where an image does not come.
            decisions: [N, K], 1 where the image was handed on, or a member's block was run.
        """
        rows = torch.arange(len(images), device=images.device)
        answer, inner = self._answer(0, images, decide)
        total, columns = answer, len(self.thresholds)
        probabilities, decisions = (answer.new_zeros(len(images), self.switches) for _ in range(2))
        for index in range(len(self.members)):
            if index > 0:
                threshold = self.thresholds[index - 1]
                # In float64: in float32 differences of neighbouring confidences near 1 would be lost beside 0.5.
                doubt = 0.5 + (threshold - answer[rows].amax(dim=1).double()) / 2
                decision = decide(doubt).to(answer.dtype)
                probabilities[rows, index - 1], decisions[rows, index - 1] = doubt.to(answer.dtype), decision
                rows = rows[decision > 0]
                if len(rows) == 0:
                    break
                own, inner = self._answer(index, images[rows], decide)
                total = total.index_add(0, rows, own)
                answer = answer.index_copy(0, rows, total[rows] / (index + 1) if self.answer == "mean" else own)
            width = self.members[index].switches
            probabilities[rows, columns : columns + width] = inner.probabilities.to(answer.dtype)
            decisions[rows, columns : columns + width] = inner.decisions.to(answer.dtype)
            columns += width
        return RoutedOutput(answer.clamp(min=torch.finfo(answer.dtype).tiny).log(), probabilities, decisions)

    def _answer(self, index: int, images: Tensor, decide: DecisionRule) -> tuple[Tensor, RoutedOutput]:
        """Probabilities [N, classes] of one member, in float32 or more, and all that it returned."""
        mean, std = (values[index].view(-1, 1, 1) for values in (self.mean, self.std))
        output = self.members[index]((images - mean) / std, decide=decide)
        logits = output.logits.to(torch.promote_types(output.logits.dtype, torch.float32))
        return logits.softmax(dim=1), output
