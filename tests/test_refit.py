"""Refitted cores against least squares on explicitly unfolded patches, in float64, and whole networks of every form.

Tolerances of 1e-4 are those of the damping, 1e-6 of the mean eigenvalue; nothing else is approximated.
"""

import copy
from dataclasses import replace

import pytest
import torch
from pruning_case import METHOD, SIZE, labelled_images, pruned_by, switched_network
from test_factors import windows_of
from torch import Tensor, nn
from torch.nn import functional as F

from models import LowRankConv2d, all_on
from pruning.capture import Passes
from pruning.goals import Goal
from pruning.layers import rebuilt_layers
from pruning.refit import best_map, moments, patches, refit, row_sums
from pruning.survey import survey
from utils.flops import every_block, network_cost

FORMS = [
    # rank in, rank out, stride, depthwise
    (3, 4, 1, False),
    (3, None, 2, False),
    (None, 2, 1, False),
    (4, 4, 1, True),
]


def windows(layer: nn.Conv2d, a: Tensor) -> Tensor:
    """[positions, 9 in], by explicit loops."""
    return windows_of(layer, a).permute(0, 3, 1, 2).flatten(2).flatten(0, 1)


def rows_of(y: Tensor) -> Tensor:
    return y.permute(0, 2, 3, 1).flatten(0, 2)


def read_by(layer, a: Tensor, positions=None) -> Tensor:
    """What the part of a layer that is refitted reads, at all positions unless some are given."""
    positions = torch.arange(layer(a)[0, 0].numel()) if positions is None else positions
    part = layer.rotate_out if getattr(layer, "depthwise", False) else getattr(layer, "core", layer)
    return patches(layer, a, positions, part).detach()


def norms_of(network, smaller) -> dict:
    """The rebuilt layers in the order in which they run, and the norms behind them."""
    norms = survey(network, torch.zeros(2, 3, SIZE, SIZE, dtype=torch.float64), every_block).norms
    return {name: norms[name] for name in rebuilt_layers(network, smaller, norms)}


def example(rank_in, rank_out, stride, depthwise=False):
    """A whole layer, a low-rank one in its place, inputs and what the whole layer makes of others."""
    torch.manual_seed(0)
    whole = nn.Conv2d(6, 5, 3, stride, 1, bias=False).double()
    layer = LowRankConv2d(whole, (rank_in, rank_out), depthwise).double()
    a = torch.randn(7, 6, 6, 6, dtype=torch.float64) + torch.rand(6, 1, 1, dtype=torch.float64)
    a[:, :, :, 1:] += 0.8 * a[:, :, :, :-1]  # taps are correlated
    y = whole(a + 0.3 * torch.randn_like(a)).detach() + 2
    return whole, layer, a, y


@pytest.mark.parametrize("form", FORMS)
def test_patches_and_sums_are_those_of_explicit_windows(form):
    whole, layer, a, y = example(*form)
    mixed = a if layer.rotate_in is None else torch.einsum("nihw,ci->nchw", a, layer.rotate_in.weight[:, :, 0, 0])
    if form[3]:
        own = windows(whole, mixed).unflatten(1, (4, 9))
        expected = torch.einsum("pkt,kt->pk", own, layer.core.weight.flatten(1))
    else:
        expected = windows(whole, mixed)
    z = read_by(layer, a)
    torch.testing.assert_close(z, expected.detach(), rtol=1e-12, atol=1e-12)
    some = torch.tensor([1, 4, 5])
    of_some = expected.detach().unflatten(0, (len(a), -1))[:, some].flatten(0, 1)
    torch.testing.assert_close(read_by(layer, a, some), of_some, rtol=1e-12, atol=1e-12)
    found = moments(row_sums(z, rows_of(y)), z.shape[1])
    centred_z, centred_y = z - z.mean(0), rows_of(y) - rows_of(y).mean(0)
    torch.testing.assert_close(found.zz, centred_z.t() @ centred_z / len(z), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.yz, centred_y.t() @ centred_z / len(z), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.y, rows_of(y).mean(0), rtol=1e-12, atol=1e-12)


def test_a_core_without_a_rotation_behind_is_the_least_squares_solution():
    _, layer, a, y = example(3, None, 2)
    z, wanted = read_by(layer, a), rows_of(y)
    with_intercept = torch.cat([z, torch.ones(len(z), 1).double()], dim=1)
    expected = torch.linalg.lstsq(with_intercept, wanted).solution[:-1].t()
    metric = torch.diag(torch.rand(5).double())
    K, U = best_map(moments(row_sums(z, wanted), z.shape[1]), metric, None)
    assert U is None
    torch.testing.assert_close(K, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_rotation_and_core_are_the_best_of_their_rank(rank):
    """What is left is what the best projection of that rank leaves: Eckart-Young, on the rows themselves."""
    _, layer, a, y = example(3, 2, 1)
    z, wanted = read_by(layer, a), rows_of(y)
    root = torch.randn(5, 5).double()
    left, right = (rows - rows.mean(0) for rows in (wanted @ root, z))
    explained = torch.linalg.qr(right).Q.t() @ left
    best = left.square().sum() - torch.linalg.svdvals(explained)[:rank].square().sum()
    K, U = best_map(moments(row_sums(z, wanted), z.shape[1]), root @ root.t(), rank)
    torch.testing.assert_close(U.t() @ U, torch.eye(rank).double())
    errors = left - right @ K.t() @ U.t() @ root
    assert errors.square().sum().item() == pytest.approx(best.item(), rel=1e-8)


def test_an_output_nobody_looks_at_and_inputs_that_are_dead_leave_finite_weights():
    _, layer, a, y = example(3, 2, 1)
    a[:] = 0
    z = read_by(layer, a)
    for metric in (torch.zeros(5, 5).double(), torch.diag(torch.tensor([1.0, 0, 0, 0, 0])).double()):
        for inputs in (z, torch.randn_like(z)):
            K, U = best_map(moments(row_sums(inputs, rows_of(y)), z.shape[1]), metric, 2)
            assert K.isfinite().all() and U.isfinite().all()


@pytest.fixture(scope="module")
def network():
    return switched_network().double()


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(500, 3, SIZE, SIZE, generator=generator).double(), torch.zeros(500, dtype=torch.long)


METHODS = {
    "tucker": {"decomposition": "tucker"},
    "depthwise": {"decomposition": "depthwise"},
    "channels": {"criterion": "kron_obd"},
}


@pytest.mark.parametrize("form", METHODS)
def test_every_layer_is_at_the_minimum_given_the_layers_before_it(network, images, form):
    method = replace(METHOD, **METHODS[form])
    few = tuple(part[:24] for part in images)
    smaller = pruned_by(network, few, Goal(flops=0.4 * network_cost(network, SIZE).flops), method).network
    norms = norms_of(network, smaller)
    names = [name for name, norm in norms.items() if norm]
    before, first = (copy.deepcopy(net.state_dict()) for net in (network, smaller))

    def batches():
        return zip(images[0].split(70), images[1].split(70), strict=True)

    refit(network, smaller, norms, dict.fromkeys(norms, torch.ones(4)), Passes(batches, forward=every_block))
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), key
    for key, value in smaller.state_dict().items():
        assert key.startswith(("blocks", "classifier", "stem")) or torch.equal(value, first[key]), key
    assert all(not m._forward_hooks and not m._forward_pre_hooks for net in (network, smaller) for m in net.modules())
    seen = {}
    for net in (network, smaller):
        handles = [
            net.get_submodule(n).register_forward_hook(lambda m, i, o, n=n, net=net: seen.update({(net, n): (i[0], o)}))
            for n in names
        ]
        with torch.no_grad():
            net(images[0], decide=all_on, skip=False)
        for handle in handles:
            handle.remove()
    for name in names:
        wanted, (a, found) = rows_of(seen[network, name][1]), seen[smaller, name]
        norm, own = network.get_submodule(norms[name]), smaller.get_submodule(norms[name])
        found = rows_of(found)
        # Behind the norms the outputs have the mean that they had, measured against the statistics that were there.
        behind = (found.mean(0) - own.running_mean, wanted.mean(0) - norm.running_mean)
        torch.testing.assert_close(*behind, rtol=1e-8, atol=1e-8)
        assert torch.equal(own.running_var, norm.running_var)
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        errors = (wanted - found - (wanted - found).mean(0)) * scale
        z = read_by(smaller.get_submodule(name), a)
        # No change of the core, nor of the rotation behind it, lowers the error: its gradient is zero.
        layer = smaller.get_submodule(name)
        U = torch.eye(wanted.shape[1]).double()
        if isinstance(layer, LowRankConv2d) and layer.rotate_out is not None and layer.core.groups == 1:
            U = layer.rotate_out.weight[:, :, 0, 0]
        gradient = ((errors * scale) @ U).t() @ (z - z.mean(0)) / len(z)
        size = ((wanted - wanted.mean(0)) * scale.square() @ U).abs().mean() * z.std()
        assert gradient.abs().max() < 1e-3 * size, name


@pytest.mark.parametrize("form", METHODS)
def test_an_iteration_that_refits_stays_nearer_to_what_the_network_predicted(form):
    network, (x, y) = switched_network(), labelled_images()
    distances = {}
    for refitted in (False, True):
        method = replace(METHOD, refit=refitted, **METHODS[form])
        pruned = pruned_by(network, (x, y), Goal(flops=0.5 * network_cost(network, SIZE).flops), method)
        with torch.no_grad():
            logits = [net(x, decide=all_on).logits.log_softmax(1) for net in (network, pruned.network.eval())]
        distances[refitted] = F.kl_div(*reversed(logits), reduction="batchmean", log_target=True).item()
    assert distances[True] < distances[False]
