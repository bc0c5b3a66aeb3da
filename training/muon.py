"""Muon: steps that change a layer's filters by an orthogonal matrix, for stage 1.

Source: Jordan et al. 2024, github.com/KellerJordan/Muon; for convolutions with filters of fixed size,
github.com/KellerJordan/cifar10-airbench.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

# A step of SGD at rate 0.1 becomes one that turns a layer's filters by 0.06 of their length.
TURN = 0.6
# Coefficients of a x + b x^3 + c x^5, which drives singular values in (0, 1] to about 1 if it is applied ROUNDS times.
A, B, C, ROUNDS = 3.4445, -4.7750, 2.0315, 4


class Muon(SGD):
    """SGD whose groups with a ``turn`` take orthogonal steps; the others follow SGD.

    The filters of a layer, [out, in, kh, kw], are one matrix [out, in kh kw].  Its step is Nesterov's momentum with all
    singular values near 1, times the rate and ``turn``.  Its size stays out^1/2, since the batch norm behind the layer
    undoes it: weight decay has nothing to do.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; gradients of filters are replaced by their orthogonal directions."""
        for group in self.param_groups:
            if "turn" in group:
                for filters in _of_one_shape(p for p in group["params"] if p.grad is not None):
                    self._turn(filters, group["turn"])
        return super().step(closure)

    def _turn(self, filters: list[nn.Parameter], turn: float) -> None:
        directions = []
        for p in filters:
            state = self.state[p]
            momentum = state.setdefault("momentum_buffer", torch.zeros_like(p))
            momentum.mul_(self.defaults["momentum"]).add_(p.grad)
            directions.append((p.grad + self.defaults["momentum"] * momentum).flatten(1))
            p.mul_(len(p) ** 0.5 / p.norm())
        for p, direction in zip(filters, orthogonal(torch.stack(directions)), strict=True):
            p.grad = turn * direction.view_as(p)


def filter_group(filters: list[nn.Parameter]) -> dict[str, Any]:
    """The parameter group of filters that take orthogonal steps."""
    return {"params": filters, "turn": TURN, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices [K, m, n] with the same singular vectors and singular values near 1.

    Between 0.6 and 1.3, where they were at least 5% of the matrix's norm; smaller ones are nearer to 0.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.transpose(1, 2)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + torch.finfo(x.dtype).tiny)
    for _ in range(ROUNDS):
        gram = x @ x.transpose(1, 2)
        x = A * x + (B * gram + C * gram @ gram) @ x
    return x if wide else x.transpose(1, 2)


def _of_one_shape(parameters: Iterable[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    """In lists of equal shapes, each of which is turned at once."""
    found = defaultdict(list)
    for p in parameters:
        found[p.shape].append(p)
    return found.values()
