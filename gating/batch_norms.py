"""Batch norms under drawn decisions.

Sampled paths have other statistics than the thresholded paths of evaluation.  Norms that follow them in training feed
evaluation with the statistics of a network that it never runs: the collapse that users of SkipNet report.
"""

from torch import nn

from utils.batch_norms import batch_norms

BATCH_NORM_MODES = ("frozen", "reestimate", "follow")


def freeze_batch_norms(network: nn.Module) -> None:
    """Batch norms use their running statistics and leave them as they are, until the next ``network.train()``."""
    for norm in batch_norms(network):
        norm.eval()
