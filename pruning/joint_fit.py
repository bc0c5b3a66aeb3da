"""All convolutions of a low-rank layer brought next to wanted outputs together, by least squares on true patches.

With the rotation before the core as it is, core and rotation behind it have a closed form (``pruning.refit.best_map``).
Here that rotation moves too, and in a depthwise separable layer the filters: a sum of squares of products, which has no
closed form and is taken down from there by a quasi-Newton method (L-BFGS; Nocedal and Wright, chapter 7).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.layers import ConvWeights

ITERATIONS = 60  # what twice as many gain no longer shows


@dataclass(frozen=True)
class Moments:
    """Means and centred covariances of inputs z [n] and wanted outputs y [out] over images and positions, float64."""

    zz: Tensor  # [n, n]
    yz: Tensor  # [out, n]
    z: Tensor  # [n]
    y: Tensor  # [out]

    def through(self, Z: Tensor) -> "Moments":
        """Of the inputs Z z, for Z [m, n]."""
        return Moments(Z @ self.zz @ Z.t(), self.yz @ Z.t(), Z @ self.z, self.y)


def mixing(weights: ConvWeights) -> Tensor | None:
    """Z [n, in * taps] that takes a patch to what the last of the convolutions that have to be refitted reads.

    That is the core or, where it is depthwise, the rotation behind it.  None stands for the identity.
    """
    R = weights.rotate_in
    if R is None:
        return None
    taps = weights.core.shape[2] * weights.core.shape[3]
    if weights.depthwise:
        return torch.einsum("kt,ki->kit", weights.core.flatten(1), R).flatten(1)
    return torch.kron(R, torch.eye(taps, dtype=R.dtype, device=R.device))


def multiplied_out(weights: ConvWeights) -> Tensor:
    """The map [out, in * taps] from a patch to the outputs: ``pruning.surgery.composed``, without its detours."""
    core, U = weights.core.flatten(2), weights.rotate_out
    if weights.depthwise:
        return torch.einsum("ok,kt,ki->oit", U, core[:, 0], weights.rotate_in).flatten(1)
    if weights.rotate_in is not None:
        core = torch.einsum("rct,ci->rit", core, weights.rotate_in)
    return core.flatten(1) if U is None else U @ core.flatten(1)


def jointly_fitted(weights: ConvWeights, found: Moments, metric: Tensor) -> ConvWeights:
    """The layer with all its convolutions nearer to the least E |M^1/2 (y - b - P z)|^2 of the map P they multiply to.

    Args:
        weights: in float64, with a rotation before the core: where the descent starts.
        found: moments of whole patches, n = in * taps.
        metric: the diagonal of M [out], what an error of the outputs costs.
    """
    parts = [part for part in (weights.rotate_in, weights.core, weights.rotate_out) if part is not None]
    parts = [part.contiguous().clone().requires_grad_() for part in parts]
    weight = metric[:, None]

    def layer() -> ConvWeights:
        return ConvWeights(parts[1], parts[0], parts[2] if len(parts) > 2 else None, weights.depthwise)

    def error() -> Tensor:
        """But for a constant: tr(M P S P^T) - 2 tr(M C P^T), its gradient to P being 2 M (P S - C)."""
        optimiser.zero_grad(set_to_none=True)
        with torch.enable_grad():
            P = multiplied_out(layer())
        with torch.no_grad():
            left = P @ found.zz
            value = ((left - 2 * found.yz) * weight * P).sum()
            gradient = 2 * weight * (left - found.yz)
        P.backward(gradient)
        for part in parts:
            part.grad = part.grad.contiguous()
        return value

    optimiser = torch.optim.LBFGS(
        parts, max_iter=ITERATIONS, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=0.0,
        tolerance_change=0.0,
    )  # fmt: skip
    optimiser.step(error)
    return _scaled(*(part.detach() for part in (layer().core, *parts[:1], *parts[2:])), depthwise=weights.depthwise)


def _scaled(core: Tensor, R: Tensor, U: Tensor | None = None, *, depthwise: bool) -> ConvWeights:
    """The same map with mixtures of unit length or, around a full core, orthonormal rotations: such train best."""
    tiny = torch.finfo(core.dtype).tiny
    if depthwise:
        before, behind = R.norm(dim=1).clamp(min=tiny), U.norm(dim=0).clamp(min=tiny)
        return ConvWeights(core * (before * behind)[:, None, None, None], R / before[:, None], U / behind, True)
    Q, L = torch.linalg.qr(R.t())  # R = L^T Q^T
    core = torch.einsum("rchw,dc->rdhw", core, L)
    if U is None:
        return ConvWeights(core, Q.t())
    Q_out, L_out = torch.linalg.qr(U)
    return ConvWeights(torch.einsum("sr,rchw->schw", L_out, core), Q.t(), Q_out)
