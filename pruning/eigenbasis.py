"""The Kronecker-factored eigenbasis of a layer: eigenvectors of its factors, and weights rotated into it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning.capture import Passes, visit_gradients
from pruning.factors import Factors, rotated_gradient_squares
from utils import parallel

CHUNK = 32  # images whose unfolded windows are held in memory at once


@dataclass(frozen=True)
class Eigenbasis:
    """Eigen-decompositions A = Q_a diag(d_a) Q_a^T and G = Q_g diag(d_g) Q_g^T, in float64."""

    Q_a: Tensor  # [in, in], columns are eigenvectors
    Q_g: Tensor  # [out, out]
    d_a: Tensor  # [in], ascending, never negative
    d_g: Tensor  # [out]


def eigenbasis(factors: Factors) -> Eigenbasis:
    """Decompose both factors; eigenvalues that rounding made negative become zero."""
    d_a, Q_a = torch.linalg.eigh(factors.A.double())
    d_g, Q_g = torch.linalg.eigh(factors.G.double())
    return Eigenbasis(Q_a, Q_g, d_a.clamp(min=0), d_g.clamp(min=0))


def rotate(weight: Tensor, basis: Eigenbasis) -> Tensor:
    """W' = Q_g^T W Q_a, tap by tap, in float64; weight [out, in, kh, kw].  Source: EigenDamage, section 4."""
    return torch.einsum("oihw,op,ij->pjhw", weight.double(), basis.Q_g, basis.Q_a)


def curvature(basis: Eigenbasis, weight: Tensor) -> Tensor:
    """s_ijt = d_g[i] d_a[j]: K-FAC's diagonal of the Fisher in the eigenbasis, in the shape of ``weight``."""
    return torch.outer(basis.d_g, basis.d_a)[:, :, None, None].expand(weight.shape)


def gradient_squares(
    network: nn.Module, layers: Mapping[str, nn.Conv2d], bases: Mapping[str, Eigenbasis], passes: Passes
) -> dict[str, Tensor]:
    """s_ijt = E[(Q_g^T grad W Q_a)_ijt^2], the exact diagonal of the Fisher in the eigenbasis, layer by layer.

    Source: EK-FAC (arXiv:1806.03884), proposition 1.  A layer without an entry in ``bases`` is measured in the
    coordinates it has.
    """
    sums = {name: torch.zeros_like(layer.weight, dtype=torch.float64) for name, layer in layers.items()}

    def add(name: str, layer: nn.Conv2d, a: Tensor, g: Tensor) -> None:
        rotations = (bases[name].Q_a, bases[name].Q_g) if name in bases else (None, None)
        for part_a, part_g in zip(a.split(CHUNK), g.split(CHUNK), strict=True):
            sums[name] += rotated_gradient_squares(layer, part_a, part_g, *rotations).double()

    images = visit_gradients(network, layers, passes, add)
    return {name: parallel.all_reduced(total).double() / images for name, total in sums.items()}


def eigendamage(rotated: Tensor, curvature: Tensor) -> Tensor:
    """1/2 s_ijt W'_ijt^2 for every entry of the rotated weight.

    Given the part of a weight that surgery takes away instead of the weight, the sum of the entries is the predicted
    rise of the loss.  Source: EigenDamage (arXiv:1905.05934), section 4; with s from the eigenvalue correction,
    EK-FAC.

    Args:
        rotated: W' [out, in, kh, kw].
        curvature: s, the same shape.
    """
    return 0.5 * curvature * rotated.square()
