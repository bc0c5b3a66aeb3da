"""The Kronecker-factored eigenbasis of a layer: eigenvectors of its factors, and weights rotated into it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models import ResNet
from pruning.capture import visit_gradients
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
    network: ResNet,
    layers: Mapping[str, nn.Conv2d],
    bases: Mapping[str, Eigenbasis],
    batches: Iterable[tuple[Tensor, Tensor]],
    fisher_type: str,
    draws: torch.Generator,
    fisher_draws: int = 1,
    accumulate: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """s_ijt = E[(Q_g^T grad W Q_a)_ijt^2], the exact diagonal of the Fisher in the eigenbasis, layer by layer.

    Source: EK-FAC (arXiv:1806.03884), proposition 1.  A layer without an entry in ``bases`` is measured in the
    coordinates it has.  The other arguments are those of ``pruning.factors.collect_factors``.
    """
    sums = {name: torch.zeros_like(layer.weight, dtype=accumulate) for name, layer in layers.items()}

    def add(name: str, layer: nn.Conv2d, a: Tensor, g: Tensor) -> None:
        rotations = (bases[name].Q_a, bases[name].Q_g) if name in bases else (None, None)
        for part_a, part_g in zip(a.split(CHUNK), g.split(CHUNK), strict=True):
            sums[name] += rotated_gradient_squares(layer, part_a, part_g, *rotations).to(accumulate)

    images = visit_gradients(network, layers, batches, fisher_type, draws, add, fisher_draws)
    return {name: parallel.summed(total).double() / images for name, total in sums.items()}
