"""Pointwise layers, 1x1 convolutions and linear ones, as two factors: in -> rank -> out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.channels import damped
from pruning.factors import Factors
from pruning.layers import ConvWeights


@dataclass(frozen=True)
class Pointwise:
    """A pointwise layer's kernel W, and the identity of its narrower side, of m channels, as P core.

    The first r columns of P and rows of core are the map of rank r that loses least in the metric of the Fisher.
    """

    kernel: Tensor  # W [out, in]
    P: Tensor  # [m, m]
    core: Tensor  # [m, m]


def pointwise(kernel: Tensor, factors: Factors) -> Pointwise:
    """Decompose the identity of the narrower side in the metric of the Fisher there.

    A map K of the narrower side is predicted to cost 1/2 tr(L^T (I - K) A (I - K)^T L), with G = L L^T.  Of all K of
    rank r the least is that of K = L^-T U U^T L^T, where U holds the r leading eigenvectors of L^T A L (Eckart-Young).
    They are nested, so one decomposition serves all ranks.  L is Q_g d_g^1/2: in G, a mean of products in float32,
    rounding can exceed the damping, so that it has no Cholesky factor.

    Args:
        kernel: W [out, in].
        factors: those of ``pruning.factors.narrowed`` inputs and gradients.
    """
    d_g, Q_g = torch.linalg.eigh(factors.G.double())
    roots = damped(torch.diag(d_g.clamp(min=0))).diagonal().sqrt()
    L = Q_g * roots
    U = torch.linalg.eigh(L.t() @ damped(factors.A) @ L).eigenvectors.flip(1)
    return Pointwise(kernel, Q_g / roots @ U, U.t() @ L.t())


def two_factors(layer: Pointwise, rank: int) -> ConvWeights:
    """The layer as in -> rank -> out, the second factor orthonormal, which trains best."""
    W, first, second = layer.kernel.double(), layer.core[:rank], layer.P[:, :rank]
    first, second = (first @ W, second) if len(W) <= W.shape[1] else (first, W @ second)
    Q, R = torch.linalg.qr(second)
    return ConvWeights((R @ first)[:, :, None, None], None, Q)
