"""The Tucker form of a layer: the best core and rotations of given ranks in the metric of the Fisher."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.channels import damped
from pruning.eigenbasis import Eigenbasis
from pruning.layers import ConvWeights

SWEEPS = 20  # of orthogonal iteration, each starting from the last


def tucker(core: Tensor, basis: Eigenbasis, keep_in: Tensor | None, keep_out: Tensor | None) -> ConvWeights:
    """A convolution with the ranks of the kept directions, in the subspaces that lose least.

    Truncation keeps eigendirections as they are; among all forms of the same ranks K-FAC's quadratic model
    1/2 tr(G D A D^T) has its minimum at the Tucker decomposition of G^1/2 W A^1/2.  (That of W' itself would be that
    of W: a rotation does not change it.)  It is found by higher-order orthogonal iteration from the truncated
    directions, so in that model it is never worse than them.  Source: HOOI, De Lathauwer et al. 2000; Tucker
    convolutions, arXiv:1511.06530.

    Arguments as in ``pruning.surgery.truncated``.
    """
    scaled = in_metric(core, basis)
    U_in = None if keep_in is None else _first(basis.Q_a, keep_in)
    U_out = None if keep_out is None else _first(basis.Q_g, keep_out)
    for _ in range(SWEEPS):
        if U_in is not None:
            part = scaled if U_out is None else torch.einsum("oihw,or->rihw", scaled, U_out)
            U_in = _leading(part.transpose(0, 1).flatten(1), U_in.shape[1])
        if U_out is not None:
            part = scaled if U_in is None else torch.einsum("oihw,ic->ochw", scaled, U_in)
            U_out = _leading(part.flatten(1), U_out.shape[1])
        if U_in is None or U_out is None:
            break  # with one side, the leading subspace is optimal
    core, rotate_in, rotate_out = scaled, None, None
    # Back from the metric, with orthonormal rotations, which train best.
    back_in, back_out = inverse_root(basis.Q_a, basis.d_a), inverse_root(basis.Q_g, basis.d_g)
    if U_in is None:
        core = torch.einsum("oihw,ij->ojhw", core, back_in)
    else:
        Q, R = torch.linalg.qr(back_in @ U_in)
        core, rotate_in = torch.einsum("oihw,ic,kc->okhw", core, U_in, R), Q.t()
    if U_out is None:
        core = torch.einsum("po,oihw->pihw", back_out, core)
    else:
        rotate_out, R = torch.linalg.qr(back_out @ U_out)
        core = torch.einsum("kr,or,oihw->kihw", R, U_out, core)
    return ConvWeights(core, rotate_in, rotate_out)


@dataclass(frozen=True)
class Coordinates:
    """A kernel W[o, i, t] = sum over p, j of P[o, p] core[p, j, t] Q[i, j], the p and j that matter most coming first.

    So every corner core[:r, :c] is a Tucker form of W, which loses the other entries.
    """

    P: Tensor  # [out, out]
    Q: Tensor  # [in, in]
    core: Tensor  # [out, in, kh, kw]
    to_core: tuple[Tensor, Tensor]  # maps from a tensor in the metric to these coordinates, for both sides

    def rotated(self, U: Tensor, V: Tensor, D: Tensor) -> Tensor:
        """The sum of terms U [out, R], V [in, R], D [taps, R] of the metric of the Fisher, in these coordinates."""
        out, into = self.to_core
        # In the order that makes the smallest tensors.
        return torch.einsum("jk,tk,pk->pjt", into.t() @ V, D, out.t() @ U)


def coordinates(kernel: Tensor, basis: Eigenbasis) -> Coordinates:
    """The truncated higher-order singular value decomposition of G^1/2 W A^1/2, for all ranks at once.

    Close enough to ``tucker`` for a choice: each squared error is at most twice as large.  Source: HOSVD, De Lathauwer
    et al. 2000.
    """
    scaled = in_metric(kernel, basis)
    U_in = _leading(scaled.transpose(0, 1).flatten(1), scaled.shape[1]).flip(1)
    U_out = _leading(scaled.flatten(1), scaled.shape[0]).flip(1)
    core = torch.einsum("op,oihw,ij->pjhw", U_out, scaled, U_in)
    Q, P = inverse_root(basis.Q_a, basis.d_a) @ U_in, inverse_root(basis.Q_g, basis.d_g) @ U_out
    return Coordinates(P, Q, core, (U_out, U_in))


def in_metric(kernel: Tensor, basis: Eigenbasis) -> Tensor:
    """G^1/2 W A^1/2, tap by tap, [out, in, kh, kw] in float64: its squared error is twice the predicted rise."""
    root_in, root_out = root(basis.Q_a, basis.d_a), root(basis.Q_g, basis.d_g)
    return torch.einsum("op,pihw,ij->ojhw", root_out, kernel.double(), root_in)


def root(Q: Tensor, d: Tensor) -> Tensor:
    """Symmetric square root of the damped factor Q diag(d) Q^T."""
    return Q * _damped_values(d).sqrt() @ Q.t()


def inverse_root(Q: Tensor, d: Tensor) -> Tensor:
    """The inverse of ``root``."""
    return Q / _damped_values(d).sqrt() @ Q.t()


def _damped_values(d: Tensor) -> Tensor:
    return damped(torch.diag(d)).diagonal()


def _first(Q: Tensor, keep: Tensor) -> Tensor:
    return Q[:, keep.to(Q.device)]


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """The ``rank`` leading left singular vectors."""
    return torch.linalg.eigh(matrix @ matrix.t()).eigenvectors[:, -rank:]
