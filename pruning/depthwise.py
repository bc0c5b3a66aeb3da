"""The depthwise separable form of a layer: 1x1, one filter per channel, 1x1.

The kernel becomes a sum of R terms u_k v_k^T d_kt: the input is mixed by V^T into R channels, each is filtered by its
own d_k, and U mixes the results.  Source: EigenDamage (arXiv:1905.05934), the depthwise separable form of its appendix.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pruning.eigenbasis import Eigenbasis
from pruning.layers import ConvWeights
from pruning.tucker import inverse_root

# Sweeps of least squares stop once WINDOW of them lower the error by less than this share of it.
WINDOW, TOLERANCE = 50, 1e-3
MOST_SWEEPS = 5000
FEW_SWEEPS = 15  # near enough for a choice among forms
# Limits of one layer's multiply-adds in sweeps, for the choice and for the final solution, and least number of sweeps:
# without limits layers with hundreds of channels would take minutes.
FEW_FLOPS, MOST_FLOPS = 1e9, 5e9
LEAST_FEW, LEAST_SWEEPS = 3, 10
ROUNDING = 1e-12  # of the squared norm: smaller errors count as zero
# Penalty on the squared size of a term.  Without it the best sums have large terms that nearly cancel and are unstable
# in fine-tuning; see Phan et al., arXiv:2008.05441.
PENALTY = 1e-2
RIDGE = 1e-9  # the same, only to keep equations solvable


def mixtures(U: Tensor, V: Tensor, D: Tensor, basis: Eigenbasis, window: tuple[int, int]) -> ConvWeights:
    """The layer of the terms U [out, R], V [in, R], D [taps, R], which are in the metric of ``basis``."""
    mix_in, mix_out = inverse_root(basis.Q_a, basis.d_a) @ V, inverse_root(basis.Q_g, basis.d_g) @ U
    sizes = mix_in.norm(dim=0) * mix_out.norm(dim=0)  # into the filters: mixtures of unit length train best
    filters = (D * sizes).t().reshape(-1, 1, *window)
    return ConvWeights(filters, _unit(mix_in).t(), _unit(mix_out), depthwise=True)


def separable_terms(tensor: Tensor, Q_a: Tensor, terms: int, sweeps: int) -> tuple[Tensor, ...]:
    """Sums of so many terms for B kernels of one shape at once: U [B, out, R], V [B, in, R], D [B, taps, R].

    Among all sums of so many terms each is a local minimum of the quadratic model 1/2 tr(G D A D^T) of K-FAC, with a
    ``PENALTY`` on the size of its terms: the canonical decomposition of G^1/2 W A^1/2 by alternating least squares,
    started from the largest of the terms u v^T d along the input's eigendirections v, several along one of them if need
    be, and run until it has converged.  Source of the decomposition: Carroll and Chang 1970; of its use for
    convolutions, arXiv:1412.6553.

    Args:
        tensor: G^1/2 W A^1/2, [B, out, in, taps].
        Q_a: [B, in, in], eigenvectors of A.
        terms: at most as many for each input direction as there are taps or outputs.
    """
    # On the CPU: sweeps over small float64 matrices keep a GPU waiting.
    device, tensor, Q_a = tensor.device, tensor.cpu(), Q_a.cpu()
    batch = torch.arange(len(tensor), device=tensor.device)[:, None]
    along = torch.einsum("boit,bik->bkot", tensor, Q_a)
    left, values, right = torch.linalg.svd(along, full_matrices=False)
    largest = values.flatten(1).argsort(dim=1, descending=True)[:, :terms]
    k, i = largest // values.shape[2], largest % values.shape[2]
    U = (left[batch, k, :, i] * values[batch, k, i, None]).transpose(1, 2)
    V, D = Q_a.transpose(1, 2)[batch, k].transpose(1, 2), right[batch, k, i].transpose(1, 2)
    return tuple(factor.to(device) for factor in _converged(tensor, U, V, D, sweeps))


def sweeps_of(shape: Sequence[int], terms: int, quickly: bool) -> int:
    """Largest number of sweeps for a kernel [out, in, kh, kw]."""
    flops, most, least = (FEW_FLOPS, FEW_SWEEPS, LEAST_FEW) if quickly else (MOST_FLOPS, MOST_SWEEPS, LEAST_SWEEPS)
    return min(most, max(least, int(flops / (6 * math.prod(shape) * terms))))


def _converged(tensor: Tensor, U: Tensor, V: Tensor, D: Tensor, sweeps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Alternating least squares from the given terms until they no longer lower the error of ``tensor``.

    The sweeps lower the penalised error; the returned mixtures U are a last solution without penalty.

    Every sweep starts from terms extrapolated along the last step by Nesterov's sequence; if the error has grown, the
    sweep is discarded and the sequence restarts.  Plain sweeps are slow: ten times as many leave a larger error.
    Source: Mitchell, Ye and De Sterck, arXiv:1810.05846, with restarts by the function's value.
    """
    done = (U.clone(), V.clone(), D.clone())
    left = torch.arange(len(tensor), device=tensor.device)  # what has not converged
    own, total = tensor, tensor.square().sum(dim=(1, 2, 3))
    now = before = (U, V, D)
    started = least = torch.full_like(total, math.inf)
    streak = torch.zeros_like(total)
    for sweep in range(sweeps):
        if sweep % WINDOW == 0:
            if sweep:
                going = (started - least > TOLERANCE * least + ROUNDING * total).nonzero()[:, 0]
                for kept, found in zip(done, now, strict=True):
                    kept[left] = found
                if len(going) == 0:
                    break
                left, own, total, least, streak = (t[going] for t in (left, own, total, least, streak))
                now, before = (tuple(t[going] for t in terms) for terms in (now, before))
            started = least
        ahead = (streak / (streak + 3))[:, None, None]
        found, lowered = _sweep(own, *(term + ahead * (term - last) for term, last in zip(now, before, strict=True)))
        error = total - lowered
        worse = (error > least) & (streak > 0)
        least, streak = torch.where(worse, least, error), torch.where(worse, 0.0, streak + 1)
        keep = worse[:, None, None]
        before, now = now, tuple(torch.where(keep, term, new) for term, new in zip(now, found, strict=True))
    for kept, found in zip(done, now, strict=True):
        kept[left] = found
    _, V, D = done
    projected = torch.einsum("boit,bik,btk->bok", tensor, V, D)
    return _least_squares(projected, V, D, penalty=0.0), V, D


def _sweep(tensor: Tensor, U: Tensor, V: Tensor, D: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """The terms, each factor in turn at its least-squares optimum, and how far they lower the penalised errors [B]."""
    mixed = torch.einsum("boit,bok->bkit", tensor, U)
    V = _unit(_least_squares(torch.einsum("bkit,btk->bik", mixed, D), U, D, PENALTY))
    D = _unit(_least_squares(torch.einsum("bkit,bik->btk", mixed, V), U, V, PENALTY))
    projected = torch.einsum("boit,bik,btk->bok", tensor, V, D)
    U = _least_squares(projected, V, D, PENALTY)
    squares = _gram(V) * _gram(D) * _gram(U)
    penalty = PENALTY * squares.diagonal(dim1=1, dim2=2).sum(dim=1)
    return (U, V, D), 2 * (projected * U).sum(dim=(1, 2)) - squares.sum(dim=(1, 2)) - penalty


def _least_squares(projected: Tensor, first: Tensor, second: Tensor, penalty: float) -> Tensor:
    """The third factor [B, n, R] of the best sum of terms, given the other two and the kernel contracted with them."""
    normal = _gram(first) * _gram(second)
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal.mul_(1 + max(penalty, RIDGE)).add_(torch.finfo(torch.float64).tiny)
    root = torch.linalg.cholesky(normal)
    return torch.cholesky_solve(projected.transpose(1, 2), root).transpose(1, 2)


def _gram(factor: Tensor) -> Tensor:
    return factor.transpose(1, 2) @ factor


def _unit(matrix: Tensor) -> Tensor:
    """Columns of length 1; columns of zeros stay."""
    return matrix / matrix.norm(dim=-2, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
