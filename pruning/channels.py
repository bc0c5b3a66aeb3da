"""Saliencies of whole channels, and the update of the weights that remain when channels go.

A channel j between the two convolutions of a block reaches the rest of the network only through column j of the second
one, so removing it is exactly zeroing W[:, j]: the first convolution's row and its batch norm then have no effect.  The
papers write their formulas for the rows of a weight; here they are for its columns, with A and G exchanged.

All functions take W [out, in, kh, kw] of the second convolution, its factors A [in, in] and G [out, out] (the Fisher
being A (x) G for each tap), and return one saliency per channel, [in], in nats unless they say otherwise, in float64.
"""

import torch
from torch import Tensor

# Share of the mean eigenvalue that is added before a factor is inverted: with dead channels it would be singular.
DAMPING = 1e-6
# Minimum that is added, so that a factor of zeros has an inverse, too: below all saliencies above rounding, and far
# enough from the smallest float64 for products of several such factors.
LEAST_DAMPING = 1e-30


def damped(factor: Tensor) -> Tensor:
    """The factor with DAMPING times its mean eigenvalue added on the diagonal."""
    size = len(factor)
    added = (DAMPING * factor.double().trace() / size).clamp(min=LEAST_DAMPING)
    return factor.double() + torch.eye(size, dtype=torch.float64, device=factor.device) * added


def c_obd(weight: Tensor, diagonal: Tensor) -> Tensor:
    """1/2 sum over the channel of F_qq w_q^2, with the diagonal of the Fisher [out, in, kh, kw].

    Source: C-OBD, EigenDamage (arXiv:1905.05934), section 3, from Optimal Brain Damage (LeCun 1989).
    """
    return 0.5 * (diagonal * weight.double().square()).sum(dim=(0, 2, 3))


def c_obs(weight: Tensor, A: Tensor, G: Tensor) -> Tensor:
    """1/2 sum over the channel of w_q^2 / [F^-1]_qq, with F^-1 = A^-1 (x) G^-1, as channels go one by one.

    Source: C-OBS, EigenDamage (arXiv:1905.05934), section 3, from Optimal Brain Surgeon (Hassibi 1993).  Each weight
    is priced as if the others of its channel could still compensate for it; removed channels cannot, see
    ``removed_in_turn``.
    """
    return removed_in_turn(weight, A, torch.diag(1 / torch.linalg.inv(damped(G)).diagonal()))


def kron_obd(weight: Tensor, A: Tensor, G: Tensor) -> Tensor:
    """1/2 A_jj sum over taps of W_j^T G W_j: the channel zeroed, the others left as they are.

    Source: Kron-OBD, EigenDamage (arXiv:1905.05934), section 3.
    """
    weight = weight.double()
    errors = (weight * torch.einsum("op,pihw->oihw", G.double(), weight)).sum(dim=(0, 2, 3))
    return 0.5 * A.double().diagonal() * errors


def removed_in_turn(weight: Tensor, A: Tensor, price: Tensor) -> Tensor:
    """The cost of each channel, [in], when channels are removed one by one, the cheapest first, and the others updated.

    With the price G it is Kron-OBS, EigenDamage (arXiv:1905.05934), section 3.

    Priced all at once, a channel would rely on compensation by others that are removed at the same time.  Here W and
    A^-1 are those of the channels that are left: W_K -= W_j [A^-1]_jK / [A^-1]_jj, and A^-1 is downdated by column j.
    The costs of the first n add up to the rise of the quadratic model when these n are removed, with the rest at its
    optimum.  Source: Optimal Brain Surgeon (Hassibi 1993), section 3, and its blocks, arXiv:2203.07259, section 3.

    A cost that is below that of a channel before it is raised to it, so that sorting keeps the order.

    Args:
        price: [out, out], cost of an error of the outputs.
    """
    values, vectors = torch.linalg.eigh(price.double())
    root = vectors * values.clamp(min=0).sqrt()
    scaled = torch.einsum("op,oihw->iphw", root, weight.double()).flatten(1)  # an error costs its squared norm
    inverse = torch.linalg.inv(damped(A))
    left = torch.ones(len(A), dtype=torch.bool, device=A.device)
    costs, last = torch.zeros(len(A), dtype=torch.float64, device=A.device), None
    for _ in range(len(A)):
        diagonal = torch.where(left, inverse.diagonal(), 1.0)
        every = torch.where(left, 0.5 * scaled.square().sum(dim=1) / diagonal, torch.inf)
        j = every.argmin(keepdim=True)
        cost = every[j]
        last = cost if last is None else torch.maximum(cost, torch.nextafter(last, torch.full_like(last, torch.inf)))
        costs[j], left[j] = last, False
        share = inverse[j] / diagonal[j]  # [1, in]
        scaled -= share.t() * scaled[j]
        inverse -= inverse[:, j] * share
    return costs


def magnitude(row: Tensor, column: Tensor) -> Tensor:
    """Squared norm of all weights of a channel, over its mean in the layer; a control that ignores the loss.

    Source: the group norm of DepGraph (arXiv:2301.12900), equation (5), and its normalisation by the layer's mean.

    Args:
        row: the first convolution's weight [channels, in, kh, kw].
        column: the second one's [out, channels, kh, kw].
    """
    squares = row.double().square().sum((1, 2, 3)) + column.double().square().sum((0, 2, 3))
    return squares / squares.mean()


def compensated(weight: Tensor, A: Tensor, kept: Tensor) -> Tensor:
    """The kept columns of W [out, kept, kh, kw], updated to compensate for the removed ones as well as possible.

    The optimum of the quadratic model 1/2 tr(G D A D^T), summed over taps, under D = -W on all removed columns P at
    once: D_K = W_P A_PK A_KK^-1.  It does not depend on G.  For one column it is the update of Kron-OBS, EigenDamage
    (arXiv:1905.05934), section 3; for several it is never worse than the sum of theirs.
    """
    A = damped(A)
    gone = torch.ones(len(A), dtype=torch.bool, device=A.device)
    gone[kept] = False
    update = torch.linalg.solve(A[kept][:, kept], A[kept][:, gone])  # [kept, gone]
    return weight[:, kept].double() + torch.einsum("oghw,kg->okhw", weight[:, gone].double(), update)
