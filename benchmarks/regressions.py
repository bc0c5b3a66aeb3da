"""What a skip costs an image, told from what a switch sees or from more: three regressions, each fitted to one block.

The cost has a long tail.  So the two networks tell mean and variance of its root, and expect the mean square of that.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

RIDGE = 1e-3  # of the features' mean variance
HIDDEN, STEPS, BATCH, RATE = 128, 3000, 512, 1e-3  # of ``multilayer``
CHANNELS, PASSES, MAPS, MAPS_RATE = 64, 6, 256, 4e-3  # of ``convolutional``: the last two, images at once and rate

Regression = Callable[[Tensor], Tensor]  # what is seen, [N, ...], to what is expected, [N]


def linear(x: Tensor, y: Tensor) -> Regression:
    """Ridge regression of y [N] on x [N, n]."""
    mean, scale = x.mean(dim=0), x.std(dim=0).clamp(min=1e-6)
    z = ((x - mean) / scale).double()
    gram = z.t() @ z / len(z) + RIDGE * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    weights = torch.linalg.solve(gram, z.t() @ (y - y.mean()).double() / len(z)).float()
    return lambda x: (x - mean) / scale @ weights + y.mean()


def multilayer(x: Tensor, y: Tensor) -> Regression:
    """Regression of y [N] on x [N, n] by a network with two hidden layers."""
    mean, scale = x.mean(dim=0), x.std(dim=0).clamp(min=1e-6)
    model = nn.Sequential(
        nn.Linear(x.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2)
    )
    fitted = of_root(model, (x - mean) / scale, y, STEPS, BATCH, RATE)
    return lambda x: fitted((x - mean) / scale)


def convolutional(maps: Tensor, y: Tensor) -> Regression:
    """Regression of y [N] on whole feature maps [N, channels, H, W], mirrored or not, by three convolutions.

    The first two are strided where the map is large.
    """
    layers: list[nn.Module] = [nn.BatchNorm2d(maps.shape[1])]
    size = maps.shape[2]
    for inputs, stride in ((maps.shape[1], 1 + (size > 8)), (CHANNELS, 1 + (size > 4)), (CHANNELS, 1)):
        layers += [nn.Conv2d(inputs, CHANNELS, 3, stride, 1, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 2))
    return of_root(model, maps, y, max(2, PASSES * len(y) // MAPS), MAPS, MAPS_RATE)


def of_root(model: nn.Module, seen: Tensor, y: Tensor, steps: int, batch: int, rate: float) -> Regression:
    """Fit ``model``, [batch, ...] to [batch, 2], to mean and log variance of the root of y [N].

    Args:
        seen: [N, ...], in any precision; where it has positions, every other batch is mirrored.
    """
    model = model.to(y.device).train()
    root = y.clamp(min=0).sqrt()
    centre, spread = root.mean(), root.std().clamp(min=1e-6)
    optimiser = torch.optim.AdamW(model.parameters(), rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, steps)

    def predicted(seen: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = model(seen.float()).unbind(1)
        return mean * spread + centre, log_variance.clamp(-8, 8) + 2 * spread.log()

    for step in range(steps):
        rows = torch.randint(len(y), (batch,), device=y.device)
        chosen = seen[rows].flip(3) if seen.dim() == 4 and step % 2 else seen[rows]
        mean, log_variance = predicted(chosen)
        loss = (log_variance + (root[rows] - mean).square() / log_variance.exp()).mean() / 2
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
    model.eval()

    @torch.no_grad()
    def expected(seen: Tensor) -> Tensor:
        parts = [predicted(part) for part in seen.split(batch)]
        return torch.cat([mean.square() + log_variance.exp() for mean, log_variance in parts])

    return expected
