"""Kronecker factors against brute force and exact Fisher blocks, in float64."""

import itertools

import pytest
import torch
from compare import assert_close
from torch import Tensor, nn
from torch.nn import functional as F

from models import all_on, build_network
from pruning.capture import Passes, score_directions, visit_gradients
from pruning.eigenbasis import eigenbasis
from pruning.factors import Factors, collect_factors, input_factor, output_factor, rotated_gradient_squares
from pruning.layers import prunable_layers
from utils.flops import every_block

CONVOLUTIONS = [
    # in, out, kernel, stride, padding, bias, height, width
    (3, 4, 3, 1, 1, False, 6, 6),
    (3, 4, 3, 2, 1, False, 7, 5),
    (2, 5, 3, 2, 1, True, 8, 8),
    (4, 3, 1, 1, 0, True, 5, 7),
    (4, 3, 1, 2, 0, False, 7, 7),
    (2, 3, 5, 3, 2, False, 9, 11),
    (2, 3, (3, 1), (1, 2), (1, 0), False, 6, 5),
]


def windows_of(layer: nn.Conv2d, a: Tensor) -> Tensor:
    """[N, in, T, S] by explicit loops over output positions: no unfold that could share an error with the code."""
    (kh, kw), (sh, sw), (ph, pw) = layer.kernel_size, layer.stride, layer.padding
    padded = F.pad(a, (pw, pw, ph, ph))
    rows = range(0, padded.shape[2] - kh + 1, sh)
    columns = range(0, padded.shape[3] - kw + 1, sw)
    patches = [padded[:, :, i : i + kh, j : j + kw].flatten(2) for i, j in itertools.product(rows, columns)]
    return torch.stack(patches, dim=3)


def image_gradients(layer: nn.Conv2d, a: Tensor, g: Tensor) -> Tensor:
    """[N, out, in, kh, kw], one image at a time by autograd."""
    found = []
    for image, gradient in zip(a, g, strict=True):
        weight = layer.weight.detach().requires_grad_()
        output = F.conv2d(image[None], weight, None, layer.stride, layer.padding)
        found.append(torch.autograd.grad(output, weight, gradient[None])[0])
    return torch.stack(found)


def example(spec: tuple) -> tuple[nn.Conv2d, Tensor, Tensor]:
    torch.manual_seed(0)
    inputs, outputs, kernel, stride, padding, bias, height, width = spec
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=bias).double()
    a = torch.randn(4, inputs, height, width, dtype=torch.float64)
    return layer, a, torch.randn_like(layer(a)).detach()


@pytest.mark.parametrize("spec", CONVOLUTIONS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_factors_of_a_convolution_equal_brute_force(spec, memory_format):
    layer, a, g = example(spec)
    patches = windows_of(layer, a)
    expected_A = torch.einsum("nits,njts->ij", patches, patches) / patches.shape[2]
    expected_G = sum(
        torch.outer(g[n, :, i, j], g[n, :, i, j]) for n, i, j in itertools.product(*map(range, g[:, 0].shape))
    )
    A = input_factor(layer, a.contiguous(memory_format=memory_format))
    G = output_factor(g.contiguous(memory_format=memory_format))
    torch.testing.assert_close(A, expected_A, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(G, expected_G / g[0, 0].numel(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spec", CONVOLUTIONS)
def test_rotated_gradient_squares_equal_autograd_image_by_image(spec):
    layer, a, g = example(spec)
    Q_a = torch.linalg.qr(torch.randn(a.shape[1], a.shape[1], dtype=torch.float64)).Q
    Q_g = torch.linalg.qr(torch.randn(g.shape[1], g.shape[1], dtype=torch.float64)).Q
    rotated = torch.einsum("noihw,op,ij->npjhw", image_gradients(layer, a, g), Q_g, Q_a)
    measured = rotated_gradient_squares(layer, a, g, Q_a, Q_g)
    torch.testing.assert_close(measured, rotated.square().sum(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spec", CONVOLUTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_ekfac_is_never_further_from_the_exact_block_than_kfac(spec, seed):
    layer, a, g = example(spec)
    torch.manual_seed(seed)
    g = g * torch.rand(len(g), 1, 1, 1, dtype=torch.float64) * a.abs().mean((1, 2, 3))[:, None, None, None]  # coupled
    images, taps = len(a), layer.weight[0, 0].numel()
    gradients = image_gradients(layer, a, g).flatten(3).permute(0, 2, 1, 3).flatten(1)  # [N, in * out * T]
    exact = gradients.t() @ gradients / images
    factors = Factors(input_factor(layer, a) / images, output_factor(g) / images)
    basis = eigenbasis(factors)
    Q = torch.kron(torch.kron(basis.Q_a.contiguous(), basis.Q_g.contiguous()), torch.eye(taps, dtype=torch.float64))
    s = rotated_gradient_squares(layer, a, g, basis.Q_a, basis.Q_g) / images
    kfac = torch.kron(torch.kron(factors.A, factors.G), torch.eye(taps, dtype=torch.float64))
    ekfac = Q @ torch.diag(s.flatten(2).permute(1, 0, 2).flatten()) @ Q.t()
    torch.testing.assert_close(ekfac.trace(), exact.trace(), rtol=1e-10, atol=0)  # the right scale by construction
    assert (ekfac - exact).norm() <= (kfac - exact).norm() * (1 + 1e-12)


def given(batches, fisher_type="empirical", draws=None) -> Passes:
    return Passes(lambda: batches, draws, fisher_type, forward=every_block)


def tiny() -> tuple:
    torch.manual_seed(0)
    network = build_network("resnet", depth=8, num_classes=3, width=2, gate="none").double().eval()
    return network, torch.randn(5, 3, 6, 6, dtype=torch.float64)


def test_the_pass_sums_losses_and_leaves_the_network_as_it_was():
    network, x = tiny()
    network.train()
    network.stem[0].weight.requires_grad_(False)
    labels = torch.tensor([0, 1, 2, 0, 1])
    before = {key: value.clone() for key, value in network.state_dict().items()}
    layers = prunable_layers(network)
    seen = {}

    def visit(name, layer, a, g):
        with torch.enable_grad():  # hooks of a backward pass run without
            seen[name] = image_gradients(layer, a, g).sum(0)

    assert visit_gradients(network, layers, given([(x, labels)]), visit) == 5
    assert network.training and network.blocks[0].conv1.weight.requires_grad
    assert not network.stem[0].weight.requires_grad
    assert all(not module._forward_hooks for module in network.modules())
    assert_close(dict(network.state_dict()), before, "network")
    network.eval()
    network.stem[0].weight.requires_grad_(True)
    loss = F.cross_entropy(network(x, decide=all_on, skip=False).logits, labels, reduction="sum")
    expected = torch.autograd.grad(loss, [layer.weight for layer in layers.values()])
    for name, gradient in zip(layers, expected, strict=True):
        torch.testing.assert_close(seen[name], gradient, rtol=1e-10, atol=1e-12)


def test_the_drawn_fisher_converges_to_the_exact_one_as_one_over_the_root_of_the_draws():
    network, x = tiny()
    layers = {"blocks.1.conv2": network.blocks[1].conv2}
    with torch.no_grad():
        p = network(x).logits.softmax(1)
    exact = torch.zeros(4, 4, dtype=torch.float64)
    for n, c in itertools.product(range(5), range(3)):
        one = collect_factors(network, layers, given([(x[n : n + 1], torch.tensor([c]))]))
        exact += p[n, c] * one["blocks.1.conv2"].G / 5
    labels = torch.zeros(5, dtype=torch.long)

    def error(draws: int) -> float:
        squares = []
        for seed in range(12):
            generator = torch.Generator().manual_seed(seed)
            batch = (x.repeat(draws, 1, 1, 1), labels.repeat(draws))
            G = collect_factors(network, layers, given([batch], "true", generator))["blocks.1.conv2"].G
            squares.append((G - exact).square().sum().item())
        return (sum(squares) / len(squares)) ** 0.5

    few, many = error(4), error(256)
    assert 8 / 1.6 < few / many < 8 * 1.6  # 64 times the draws: one eighth of the error
    assert many < 0.1 * exact.norm()


def test_random_directions_have_the_second_moment_of_the_fisher():
    """Over all signs, one by one, in float64."""
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)), dtype=torch.float64).t()
    v = torch.stack([score_directions(logits, own.expand(3, 4)) for own in signs.t()], dim=2)
    p = logits.softmax(1)
    fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    torch.testing.assert_close(v @ v.transpose(1, 2) / 16, fisher, rtol=0, atol=1e-14)


def test_factors_do_not_depend_on_how_the_images_are_batched():
    network, x = tiny()
    layers, labels = prunable_layers(network), torch.tensor([0, 1, 2, 0, 1])
    whole = collect_factors(network, layers, given([(x, labels)]))
    parts = collect_factors(network, layers, given(list(zip(x.split(2), labels.split(2), strict=True))))
    for name in layers:
        torch.testing.assert_close(whole[name].A, parts[name].A, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(whole[name].G, parts[name].G, rtol=1e-12, atol=1e-14)
