"""How much switches tell images apart, in bits.

Thresholded decisions are a function of the image, so their mutual information with it is their entropy over images:
nothing of it is left when the image is known.
"""

import torch
from torch import Tensor


def information(decisions: Tensor, labels: Tensor) -> dict[str, float]:
    """Bits of the decisions that the image decides, and bounds that say what they are made of.

    Entropies are those of observed frequencies, which underestimate by about (patterns - 1) / (1.39 N) bits.

    Args:
        decisions: [N, K], 0 or 1.
        labels: int64 [N].

    Returns:
        ``bits`` of the whole pattern of an image; ``bits_apart``, the sum over single switches, which is more where
        switches say the same; ``bits_class``, what the pattern tells of the class; and the number of ``patterns``.
    """
    patterns, which = torch.unique(decisions.int(), dim=0, return_inverse=True)
    bits = entropy(torch.bincount(which))
    classes, sizes = torch.unique(labels, return_counts=True)
    within = sum(
        size.item() / len(labels) * entropy(torch.bincount(which[labels == label]))
        for label, size in zip(classes, sizes, strict=True)
    )
    apart = sum(entropy(torch.bincount(column)) for column in decisions.int().unbind(1))
    return {"bits": bits, "bits_apart": apart, "bits_class": bits - within, "patterns": len(patterns)}


def entropy(counts: Tensor) -> float:
    """Of observed frequencies, in bits."""
    p = counts[counts > 0].double() / counts.sum()
    return -(p * p.log2()).sum().item()
