"""What the switches do with a set of images: by class, in FLOPs, and which images are easy."""

import torch
from torch import Tensor


def passing_by_class(decisions: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Share of each class's images that each switch lets pass, [classes, K]; NaN for a class without images.

    Args:
        decisions: [N, K].
        labels: int64 [N].
    """
    return torch.stack([decisions[labels == label].mean(dim=0) for label in range(classes)])


def cheapest_and_dearest(executed: Tensor, labels: Tensor, classes: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """For each class the indices of its ``count`` cheapest images, cheapest first, and of its dearest, dearest first.

    Args:
        executed: [N], FLOPs spent on each image; equal ones keep their order.
        labels: int64 [N].
    """
    result = []
    for label in range(classes):
        members = (labels == label).nonzero().squeeze(1)
        order = members[executed[members].argsort(stable=True)]
        reverse = members[executed[members].argsort(stable=True, descending=True)]
        result.append((order[:count], reverse[:count]))
    return result
