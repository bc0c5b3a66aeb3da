"""Images identified by their pixels, and shares of them: renaming files changes nothing, and copies count as one.

An image's fingerprint is a BLAKE2b digest of 8 bytes of its decoded pixels, at the size that the network sees.  By
chance two of 1.2 million images share one with a probability of 4e-8.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

from utils import parallel
from utils.data.images import Images, with_progress

BATCH = 1024


def fingerprints(images: Images) -> Tensor:
    """int64 [N]; several processes share the work, so that all of them have to call this."""
    found = torch.zeros(len(images), dtype=torch.int64)
    groups = parallel.local_part(torch.arange(len(images))).split(BATCH)
    for group, pixels in zip(groups, with_progress(images.batches(groups), "identifying images", groups), strict=True):
        digests = (hashlib.blake2b(image, digest_size=8).digest() for image in pixels.cpu().contiguous().numpy())
        found[group] = torch.from_numpy(np.frombuffer(b"".join(digests), dtype="<i8").astype(np.int64))
    return parallel.all_reduced(found)


def digest(prints: Tensor) -> str:
    """Digest of a set of images by their fingerprints, int64 [N], in any order; copies count."""
    return hashlib.blake2b(prints.sort().values.numpy().tobytes(), digest_size=16).hexdigest()


def first_copies(prints: Tensor) -> Tensor:
    """Whether each image, int64 [N], is the first of its copies, bool [N]."""
    _, inverse = torch.unique(prints, return_inverse=True)
    positions = torch.arange(len(prints))
    first = torch.full((int(inverse.max()) + 1,), len(prints)).scatter_reduce(0, inverse, positions, "amin")
    return first[inverse] == positions


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
