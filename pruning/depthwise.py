"""The depthwise separable form of a layer: 1x1, one filter a channel, 1x1.

The kernel becomes a sum of R terms u_k v_k^T d_kt: the input is mixed by V^T into R channels, each is filtered by its
own d_k, and U mixes the results.  Source: EigenDamage (arXiv:1905.05934), the depthwise separable form of its appendix.
"""

import math

import torch
from torch import Tensor

from pruning.eigenbasis import Eigenbasis
from pruning.layers import ConvWeights
from pruning.tucker import root

# Sweeps of least squares go on until so many have lowered the error by less than this share of it.
WINDOW, TOLERANCE = 50, 1e-3
MOST_SWEEPS = 5000
ROUNDING = 1e-12  # of the squared norm: an error that small is none
# What the squared size of a term costs.  Without it the best sums have large terms that nearly cancel, which
# fine-tuning tears apart; see Phan et al., arXiv:2008.05441.
PENALTY = 1e-2
RIDGE = 1e-9  # the same where it only keeps equations solvable


def separable(kernel: Tensor, basis: Eigenbasis, terms: int, sweeps: int = MOST_SWEEPS) -> ConvWeights:
    """A depthwise separable convolution of so many terms.

    Among all sums of so many terms it is a local minimum of the quadratic model 1/2 tr(G D A D^T) of K-FAC, with a
    ``PENALTY`` on the size of its terms: the canonical decomposition of G^1/2 W A^1/2 by alternating least squares,
    started from the largest of the terms u v^T d along the input's eigendirections v, several along one of them if need
    be, and run until it has converged.  Source of the decomposition: Carroll and Chang 1970; of its use for
    convolutions, arXiv:1412.6553.

    Args:
        kernel: [out, in, kh, kw].
        terms: at most as many for each input direction as there are taps or outputs.
        sweeps: of least squares at most; none leaves the terms as they start.
    """
    root_in, root_out = root(basis.Q_a, basis.d_a), root(basis.Q_g, basis.d_g)
    scaled = torch.einsum("op,pihw,ij->ojhw", root_out, kernel.double(), root_in).flatten(2)  # [out, in, taps]
    along = torch.einsum("oit,ik->kot", scaled, basis.Q_a)
    left, values, right = torch.linalg.svd(along, full_matrices=False)
    largest = values.flatten().argsort(descending=True)[:terms]
    k, i = largest // values.shape[1], largest % values.shape[1]
    U, V, D = _converged(scaled, (left[k, :, i] * values[k, i, None]).t(), basis.Q_a[:, k], right[k, i].t(), sweeps)
    mix_in, mix_out = torch.linalg.solve(root_in, V), torch.linalg.solve(root_out, U)
    sizes = mix_in.norm(dim=0) * mix_out.norm(dim=0)  # into the filters: mixtures of unit length train best
    filters = (D * sizes).t().reshape(-1, 1, *kernel.shape[2:])
    return ConvWeights(filters, _unit(mix_in).t(), _unit(mix_out), depthwise=True)


def _converged(tensor: Tensor, U: Tensor, V: Tensor, D: Tensor, sweeps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Alternating least squares from the given terms to where they no longer lower the error of ``tensor`` [o, i, t].

    The error is penalised, that of the mixtures U which are returned is not.

    Every sweep starts from terms extrapolated along the last step, as far as Nesterov's sequence says, and is thrown
    away with the sequence where the error has grown: plain sweeps are slow, ten times as many leave more of it.
    Source: Mitchell, Ye and De Sterck, arXiv:1810.05846, with restarts by the function's value.
    """
    total = tensor.square().sum()
    now = before = (U, V, D)
    errors, streak = [math.inf], 0
    for _ in range(sweeps):
        ahead = streak / (streak + 3)
        found = _sweep(tensor, *(term + ahead * (term - last) for term, last in zip(now, before, strict=True)))
        error = (total - found[1]).item()
        if error > errors[-1] and streak > 0:
            before, streak = now, 0
            errors.append(errors[-1])
            continue
        before, now, streak = now, found[0], streak + 1
        errors.append(error)
        if len(errors) > WINDOW and errors[-1 - WINDOW] - error <= TOLERANCE * error + ROUNDING * total.item():
            break
    _, V, D = now
    projected = torch.einsum("oit,ik,tk->ok", tensor, V, D)
    return _least_squares(projected, V, D, penalty=0.0), V, D


def _sweep(tensor: Tensor, U: Tensor, V: Tensor, D: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """The terms, each factor in turn at its least-squares optimum, and how far they lower the penalised error."""
    mixed = torch.einsum("oit,ok->kit", tensor, U)
    V = _unit(_least_squares(torch.einsum("kit,tk->ik", mixed, D), U, D, PENALTY))
    D = _unit(_least_squares(torch.einsum("kit,ik->tk", mixed, V), U, V, PENALTY))
    projected = torch.einsum("oit,ik,tk->ok", tensor, V, D)
    U = _least_squares(projected, V, D, PENALTY)
    squares = (V.t() @ V) * (D.t() @ D) * (U.t() @ U)
    return (U, V, D), 2 * (projected * U).sum() - squares.sum() - PENALTY * squares.trace()


def _least_squares(projected: Tensor, first: Tensor, second: Tensor, penalty: float) -> Tensor:
    """The third factor [n, R] of the best sum of terms, given the other two and the kernel contracted with them."""
    normal = (first.t() @ first) * (second.t() @ second)
    normal.diagonal().mul_(1 + max(penalty, RIDGE)).add_(torch.finfo(torch.float64).tiny)
    return torch.linalg.solve(normal, projected.t()).t()


def _unit(matrix: Tensor) -> Tensor:
    """Columns of length 1; columns of zeros stay."""
    return matrix / matrix.norm(dim=0).clamp(min=torch.finfo(torch.float64).tiny)
