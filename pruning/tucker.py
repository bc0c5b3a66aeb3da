"""The Tucker form of a layer: the best core and rotations of given ranks in the metric of the Fisher."""

import torch
from torch import Tensor

from pruning.channels import damped
from pruning.eigenbasis import Eigenbasis
from pruning.layers import ConvWeights

SWEEPS = 20  # of orthogonal iteration, each starting from the last


def tucker(
    core: Tensor, basis: Eigenbasis, keep_in: Tensor | None, keep_out: Tensor | None, sweeps: int = SWEEPS
) -> ConvWeights:
    """A convolution with the ranks of the kept directions, in the subspaces that lose least.

    Truncation keeps eigendirections as they are; among all forms of the same ranks K-FAC's quadratic model
    1/2 tr(G D A D^T) has its minimum at the Tucker decomposition of G^1/2 W A^1/2.  (That of W' itself would be that
    of W: a rotation does not change it.)  It is found by higher-order orthogonal iteration from the truncated
    directions, so in that
    model it never falls behind them.  Source: HOOI, De Lathauwer et al. 2000; Tucker convolutions,
    arXiv:1511.06530.

    Arguments as in ``pruning.surgery.truncated``.
    """
    root_in, root_out = root(basis.Q_a, basis.d_a), root(basis.Q_g, basis.d_g)
    scaled = torch.einsum("op,pihw,ij->ojhw", root_out, core.double(), root_in)
    U_in = None if keep_in is None else _first(basis.Q_a, keep_in)
    U_out = None if keep_out is None else _first(basis.Q_g, keep_out)
    for _ in range(sweeps):
        if U_in is not None:
            part = scaled if U_out is None else torch.einsum("oihw,or->rihw", scaled, U_out)
            U_in = _leading(part.transpose(0, 1).flatten(1), U_in.shape[1])
        if U_out is not None:
            part = scaled if U_in is None else torch.einsum("oihw,ic->ochw", scaled, U_in)
            U_out = _leading(part.flatten(1), U_out.shape[1])
        if U_in is None or U_out is None:
            break  # with one side the leading subspace is the optimum
    core, rotate_in, rotate_out = scaled, None, None
    # Back from the metric, with orthonormal rotations: those train best.
    if U_in is None:
        core = torch.einsum("oihw,ij->ojhw", core, torch.linalg.inv(root_in))
    else:
        Q, R = torch.linalg.qr(torch.linalg.solve(root_in, U_in))
        core, rotate_in = torch.einsum("oihw,ic,kc->okhw", core, U_in, R), Q.t()
    if U_out is None:
        core = torch.einsum("po,oihw->pihw", torch.linalg.inv(root_out), core)
    else:
        rotate_out, R = torch.linalg.qr(torch.linalg.solve(root_out, U_out))
        core = torch.einsum("kr,or,oihw->kihw", R, U_out, core)
    return ConvWeights(core, rotate_in, rotate_out)


def root(Q: Tensor, d: Tensor) -> Tensor:
    """Symmetric square root of the damped factor Q diag(d) Q^T."""
    return Q @ torch.diag(damped(torch.diag(d)).diagonal().sqrt()) @ Q.t()


def _first(Q: Tensor, keep: Tensor) -> Tensor:
    return Q[:, keep.to(Q.device)]


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """The ``rank`` leading left singular vectors."""
    return torch.linalg.eigh(matrix @ matrix.t()).eigenvectors[:, -rank:]
