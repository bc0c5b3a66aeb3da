"""A cascade: a small network answers what it is sure of and hands the rest on to the next one."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.decisions import DecisionRule, thresholded
from models.resnet import RoutedOutput

ANSWERS = ("last", "mean")


class Member(NamedTuple):
    """One network of a cascade, and what it expects of its images."""

    network: nn.Module  # returns logits [N, classes] or a ``RoutedOutput``
    mean: Sequence[float]  # of each channel, of pixels in [0, 1]
    std: Sequence[float]


class Cascade(nn.Module):
    """Networks that answer in turn, each only the images that all before it were unsure of.

    An image is handed on from a member whose answer so far has a largest probability below the member's threshold.
    Source: cascades of classifiers after whole predictions (arXiv:2012.01988, section 3), with the largest softmax
    probability as confidence.

    Args:
        members: from the cheapest to the most expensive.
        thresholds: of every member but the last, in [0, 1].
        answer: "last" takes the prediction of the last member that ran, "mean" the mean of all that ran.

    Raises:
        ValueError: for fewer than two members, another number of thresholds, or an unknown ``answer``.
    """

    def __init__(self, members: Sequence[Member], thresholds: Sequence[float], answer: str):
        super().__init__()
        if len(members) < 2 or len(thresholds) != len(members) - 1:
            raise ValueError(
                f"{len(members)} networks and {len(thresholds)} thresholds: a cascade takes n and n - 1, n > 1"
            )
        if answer not in ANSWERS:
            raise ValueError(f"answer {answer!r} is unknown: use one of {', '.join(ANSWERS)}")
        self.members = nn.ModuleList(member.network for member in members)
        self.thresholds, self.answer = [float(threshold) for threshold in thresholds], answer
        for name in ("mean", "std"):
            values = torch.tensor([getattr(member, name) for member in members]).view(len(members), 1, -1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    @property
    def switches(self) -> int:
        """K, one between each two members."""
        return len(self.thresholds)

    def forward(self, images: Tensor, decide: DecisionRule = thresholded) -> RoutedOutput:
        """Classify images, each by the members that it reaches only.

        Args:
            images: [N, 3, H, W] with pixels in [0, 1].
            decide: ``thresholded`` hands on what a member is unsure of, ``all_on`` everything.

        Returns:
            logits: [N, classes], logarithms of probabilities.
            probabilities: [N, K], above one half where the confidence is below the threshold; 0 where a member before
                has answered.
            decisions: [N, K], 1 where the image was handed on.
        """
        total = answer = self._answer(0, images)
        rows = torch.arange(len(images), device=images.device)
        probabilities, decisions = answer.new_zeros(2, len(images), self.switches)
        for switch, threshold in enumerate(self.thresholds):
            doubt = 0.5 + (threshold - answer[rows].amax(dim=1)) / 2
            decision = decide(doubt)
            probabilities[rows, switch], decisions[rows, switch] = doubt, decision
            rows = rows[decision > 0]
            if len(rows) == 0:
                break
            own = self._answer(switch + 1, images[rows])
            total = total.index_add(0, rows, own)
            answer = answer.index_copy(0, rows, total[rows] / (switch + 2) if self.answer == "mean" else own)
        return RoutedOutput(answer.clamp(min=torch.finfo(answer.dtype).tiny).log(), probabilities, decisions)

    def _answer(self, index: int, images: Tensor) -> Tensor:
        """Probabilities [N, classes] of one member, in float32 or more."""
        output = self.members[index]((images - self.mean[index]) / self.std[index])
        logits = output if isinstance(output, Tensor) else output.logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=1)
