"""The depthwise separable form of a layer: 1x1, one filter a channel, 1x1.

The kernel becomes a sum of R terms u_k v_k^T d_kt: the input is mixed by V^T into R channels, each is filtered by its
own d_k, and U mixes the results.  Source: EigenDamage (arXiv:1905.05934), the depthwise separable form of its appendix.
"""

import torch
from torch import Tensor

from pruning.eigenbasis import Eigenbasis, rotate
from pruning.layers import ConvWeights
from pruning.tucker import root

SWEEPS = 20
RIDGE = 1e-9  # of the mean diagonal: keeps the normal equations solvable where terms have become alike


def captured_shares(core: Tensor, basis: Eigenbasis) -> Tensor:
    """[in]: the share of each input direction's saliency that one term along this direction can keep.

    That is the share of the largest squared singular value of G^1/2 W'_j [out, taps].
    """
    scaled = rotate(core, basis) * basis.d_g.sqrt()[:, None, None, None]
    squares = torch.linalg.svdvals(scaled.transpose(0, 1).flatten(2)).square()
    return squares[:, 0] / squares.sum(dim=1).clamp(min=torch.finfo(torch.float64).tiny)


def separable(core: Tensor, basis: Eigenbasis, keep: Tensor) -> ConvWeights:
    """A depthwise separable convolution with one term for each kept input direction.

    Among all sums of so many terms it is a local minimum of the quadratic model 1/2 tr(G D A D^T) of K-FAC: the
    canonical decomposition of G^1/2 W A^1/2 by alternating least squares, started from the best term along every kept
    direction.  Source of the decomposition: Carroll and Chang 1970; of its use for convolutions, arXiv:1412.6553.

    Args:
        core: kernel [out, in, kh, kw], in the channels that ``basis`` belongs to.
        keep: indices of the input directions to start from.
    """
    root_in, root_out = root(basis.Q_a, basis.d_a), root(basis.Q_g, basis.d_g)
    scaled = torch.einsum("op,pihw,ij->ojhw", root_out, core.double(), root_in).flatten(2)  # [out, in, taps]
    V = basis.Q_a[:, keep.to(basis.Q_a.device)]
    left, values, right = torch.linalg.svd(torch.einsum("oit,ik->kot", scaled, V), full_matrices=False)
    U, D = (left[:, :, 0] * values[:, :1]).t(), right[:, 0].t()
    for _ in range(SWEEPS):
        V = _unit(_least_squares(torch.einsum("oit,ok,tk->ik", scaled, U, D), U, D))
        D = _unit(_least_squares(torch.einsum("oit,ok,ik->tk", scaled, U, V), U, V))
        U = _least_squares(torch.einsum("oit,ik,tk->ok", scaled, V, D), V, D)
    mix_in, mix_out = torch.linalg.solve(root_in, V), torch.linalg.solve(root_out, U)
    sizes = mix_in.norm(dim=0) * mix_out.norm(dim=0)  # into the filters: mixtures of unit length train best
    filters = (D * sizes).t().reshape(-1, 1, *core.shape[2:])
    return ConvWeights(filters, _unit(mix_in).t(), _unit(mix_out), depthwise=True)


def without_channels(weights: ConvWeights, keep: Tensor) -> ConvWeights:
    """A depthwise separable layer with the kept channels of its core only."""
    keep = keep.to(weights.core.device)
    return ConvWeights(weights.core[keep], weights.rotate_in[keep], weights.rotate_out[:, keep], depthwise=True)


def _least_squares(projected: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The third factor [n, R] of the best sum of terms, given the other two and the kernel contracted with them."""
    normal = (first.t() @ first) * (second.t() @ second)
    normal.diagonal().add_(RIDGE * normal.diagonal().mean().clamp(min=1e-200))
    return torch.linalg.solve(normal, projected.t()).t()


def _unit(matrix: Tensor) -> Tensor:
    """Columns of length 1; columns of zeros stay."""
    return matrix / matrix.norm(dim=0).clamp(min=torch.finfo(torch.float64).tiny)
