"""A small switched network, images for it, and one iteration of pruning."""

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models import LowRankConv2d, all_on, build_network
from pruning.compress import prune_once
from pruning.depthwise import MOST_SWEEPS, mixtures, separable_terms
from pruning.factors import Factors
from pruning.selection import least_kept
from pruning.settings import Method
from pruning.tucker import Coordinates, in_metric
from utils.flops import every_block, network_cost

SIZE = 8
METHOD = Method(prune_ratio_limit=0.95, round_to=1, decomposition="truncate", objective="saliency", refit=False)


def switched_network(depth=14, width=12):
    torch.manual_seed(0)
    network = build_network("resnet", depth=depth, num_classes=4, width=width)
    for _ in range(3):
        network(torch.randn(16, 3, SIZE, SIZE))
    return network.eval()


def separable(kernel, basis, terms, sweeps=MOST_SWEEPS):
    """A depthwise separable convolution of so many terms."""
    factors = separable_terms(in_metric(kernel, basis).flatten(2)[None], basis.Q_a[None], terms, sweeps)
    return mixtures(*(factor[0] for factor in factors), basis, kernel.shape[2:])


def corner(at: Coordinates, c: int, r: int) -> Tensor:
    """The kernel [out, in, kh, kw] of a Tucker form."""
    return torch.einsum("or,rchw,ic->oihw", at.P[:, :r], at.core[:r, :c], at.Q[:, :c])


def labelled_images():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(24, 3, SIZE, SIZE, generator=generator), torch.randint(4, (24,), generator=generator)


def pruned_by(network, images, goal, method):
    def batches():
        return zip(images[0].split(8), images[1].split(8), strict=True)

    passes = method.passes(batches, torch.Generator().manual_seed(2), every_block)
    return prune_once(network, passes, cost=network_cost(network, SIZE), goal=goal, method=method)


def counted(network) -> tuple[int, int]:
    """FLOPs by torch's own counter, parameters by a plain sum."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, SIZE, SIZE), decide=all_on)
    return counter.get_total_flops(), sum(p.numel() for p in network.parameters())


def check_table(network, pruned, norms: int = 0):
    """The network's own cost and the sums of the table against independent counters.

    Args:
        norms: parameters of batch norms that went together with channels.
    """
    before, after = counted(network), counted(pruned.network)
    cost = network_cost(pruned.network, SIZE)
    assert (cost.flops, cost.parameters) == after
    assert before[0] - after[0] == sum(c.flops_before - c.flops_after for c in pruned.changes) > 0
    assert before[1] - after[1] - norms == sum(c.parameters_before - c.parameters_after for c in pruned.changes)


def check_limits(network, smaller, limit):
    for name, module in smaller.named_modules():
        if isinstance(module, LowRankConv2d):
            whole = network.get_submodule(name)
            if module.kernel_size == (1, 1):  # two factors, whose rank is that of the narrower side
                assert module.core.out_channels >= least_kept(min(whole.in_channels, whole.out_channels), limit)
                continue
            assert module.core.in_channels >= least_kept(whole.in_channels, limit)
            # There the one rank is that of the input; with one channel a depthwise core is a plain one.
            if not module.depthwise and module.core.in_channels > 1:
                assert module.core.out_channels >= least_kept(whole.out_channels, limit)
    for block, inner in smaller.architecture["inner"].items():
        assert inner >= least_kept(network.get_submodule(block).conv2.out_channels, limit)


def random_factors(inputs: int, outputs: int, rows: int = 20, power: int = 1, seed: int | None = None) -> Factors:
    """Of that many random rows, each number raised to the power."""
    if seed is not None:
        torch.manual_seed(seed)
    a, g = (torch.randn(rows, n, dtype=torch.float64) ** power for n in (inputs, outputs))
    return Factors(a.t() @ a / rows, g.t() @ g / rows)


def quadratic_rise(change: Tensor, A: Tensor, G: Tensor) -> Tensor:
    """1/2 tr(G D A D^T), summed over taps: predicted rise of the loss under the change D [out, in, kh, kw] of W."""
    change = change.double()
    return 0.5 * torch.einsum("oihw,op,pjhw,ij->", change, G.double(), change, A.double())
