"""The predicted rise of the loss against gradients image by image, in float64, and against the rise itself."""

import itertools

import pytest
import torch
from networks import edits_to
from pruning_case import corner
from torch import nn
from torch.nn import functional as F

from models import all_on, build_network
from models.edits import low_rank_layers
from pruning import prediction
from pruning.capture import Passes
from pruning.layers import composed, prunable_layers, weights_of
from pruning.prediction import Trials, predicted_rise, try_forms
from pruning.tucker import Coordinates
from pruning.two_factors import Pointwise
from utils.flops import every_block


@pytest.fixture
def network():
    ranks = {"blocks.1.conv1": (3, 4), "blocks.2.conv2": (5, 5)}
    sizes = {"depth": 8, "num_classes": 3, "width": 4, "gate": "none"}
    network = build_network("resnet", **sizes, edits=edits_to(ranks, ["blocks.2.conv2"])).double()
    for _ in range(3):
        network(torch.randn(8, 3, 6, 6, dtype=torch.float64))
    return network.eval()


def layers_of(network):
    """All 3x3 layers: plain, of low rank and depthwise separable, the last two as a whole."""
    return {name: network.get_submodule(name) for name in {**prunable_layers(network), **low_rank_layers(network)}}


def random_changes(network, *shape: int):
    """In the shape of each layer's kernel, multiplied out."""
    return {
        name: torch.randn(*shape, *composed(weights_of(network.get_submodule(name))).shape, dtype=torch.float64)
        for name in layers_of(network)
    }


def given(batches, fisher_type="empirical") -> Passes:
    return Passes(lambda: batches, torch.Generator().manual_seed(0), fisher_type, every_block)


def products_by_image(network, changes, x, y):
    """<grad W, D> of every image [N] for each layer, W being an addition to the layer's kernel, of zeros."""
    zeros = {name: torch.zeros_like(change, requires_grad=True) for name, change in changes.items()}

    def add(layer, inputs, output, zero):
        return output + F.conv2d(inputs[0], zero, None, layer.stride, layer.padding)

    handles = [
        layer.register_forward_hook(lambda layer, i, o, zero=zeros[name]: add(layer, i, o, zero))
        for name, layer in layers_of(network).items()
    ]
    try:
        products = []
        for image, label in zip(x, y, strict=True):
            loss = F.cross_entropy(network(image[None], decide=all_on, skip=False).logits, label[None])
            gradients = torch.autograd.grad(loss, list(zeros.values()))
            products.append([(g * d).sum() for g, d in zip(gradients, changes.values(), strict=True)])
    finally:
        for handle in handles:
            handle.remove()
    return torch.tensor(products, dtype=torch.float64)


def test_products_equal_those_with_gradients_image_by_image(network):
    x, y = torch.randn(7, 3, 6, 6, dtype=torch.float64), torch.randint(3, (7,))
    layers, changes = layers_of(network), random_changes(network)
    assert len(layers) == 7 and len({type(layer) for layer in layers.values()}) == 2
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    found = predicted_rise(network, layers, changes, given(batches))
    products = products_by_image(network, changes, x, y)
    single = 0.5 * products.square().mean(0)
    assert [found.layers[name] for name in layers] == pytest.approx(single.tolist(), rel=1e-9)
    assert found.together == pytest.approx(0.5 * products.sum(1).square().mean().item(), rel=1e-9)


def test_forms_on_trial_are_predicted_one_by_one(network, monkeypatch):
    """Corners of a core in coordinates of its own and other changes, also where gradients do not fit into memory."""
    x, y = torch.randn(7, 3, 6, 6, dtype=torch.float64), torch.randint(3, (7,))
    corners, tried, changes = [(2, 1), (3, 4), (1, 3)], {}, {}
    for name in layers_of(network):
        core = torch.randn_like(composed(weights_of(network.get_submodule(name))))
        P, Q = (torch.randn(n, n, dtype=torch.float64) for n in core.shape[:2])
        at, others = Coordinates(P, Q, core, (P, Q)), torch.randn(2, *core.shape, dtype=torch.float64)
        tried[name] = Trials(at, corners, others)
        whole = corner(at, core.shape[1], core.shape[0])
        kernels = [corner(at, c, r) - whole for c, r in corners]
        kernels += [torch.einsum("op,pjhw,ij->oihw", P, other, Q) for other in others]
        changes[name] = torch.stack(kernels)
    monkeypatch.setattr(prediction, "ENTRIES", 3 * tried["blocks.2.conv1"].coordinates.core.numel())
    found = try_forms(network, layers_of(network), tried, given([(x[:4], y[:4]), (x[4:], y[4:])]))
    for i in range(5):
        own = {name: several[i] for name, several in changes.items()}
        products = products_by_image(network, own, x, y)
        expected = 0.5 * products.square().mean(0)
        assert [found[name][i].item() for name in changes] == pytest.approx(expected.tolist(), rel=1e-9)


@pytest.mark.parametrize(("inputs", "outputs"), [(5, 3), (3, 5)])
def test_two_factors_are_predicted_at_the_narrower_side(inputs, outputs):
    """Of a strided 1x1 convolution and of a linear layer for every token."""
    conv, linear = nn.Conv2d(inputs, outputs, 1, 2), nn.Linear(outputs, inputs)
    network = Tokens(conv, linear).double()
    x, y = torch.randn(6, inputs, 5, 4, dtype=torch.float64), torch.randint(inputs, (6,))
    layers, tried, changes = {"conv": conv, "linear": linear}, {}, {}
    for name, layer in layers.items():
        W = layer.weight.detach().flatten(1)
        m = min(W.shape)
        P = torch.randn(m, m).double()
        core = torch.linalg.inv(P)
        tried[name] = Trials(Pointwise(W, P, core), [(inputs, 1), (inputs, 2)])
        narrow = [P[:, :r] @ core[:r] - torch.eye(m).double() for r in (1, 2)]
        changes[name] = [n @ W if len(W) <= W.shape[1] else W @ n for n in narrow]
    passes = Passes(lambda: [(x, y)], None, "empirical")
    found = try_forms(network, layers, tried, passes)
    products = []
    for n in range(6):
        loss = F.cross_entropy(network(x[n : n + 1]), y[n : n + 1])
        gradients = torch.autograd.grad(loss, [layer.weight for layer in layers.values()])
        products.append(
            [[(g.flatten(1) * d).sum() for d in changes[k]] for k, g in zip(changes, gradients, strict=True)]
        )
    expected = 0.5 * torch.tensor(products).square().mean(0)
    for name, own in zip(layers, expected, strict=True):
        torch.testing.assert_close(found[name], own, rtol=1e-9, atol=0)


class Tokens(nn.Module):
    def __init__(self, conv: nn.Module, linear: nn.Module):
        super().__init__()
        self.conv, self.linear = conv, linear

    def forward(self, x):
        return self.linear(self.conv(x).flatten(2).transpose(1, 2).tanh()).mean(1)


def expected_rises(network, layers, changes, x) -> list[float]:
    """Of each layer and of all together: the expectation over labels, each class once, weighted by its probability."""
    with torch.no_grad():
        p = network(x, decide=all_on).logits.softmax(1)
    found = torch.zeros(len(changes) + 1, dtype=torch.float64)
    for n, label in itertools.product(range(len(x)), range(3)):
        one = predicted_rise(network, layers, changes, given([(x[n : n + 1], torch.tensor([label]))]))
        found += p[n, label] / len(x) * torch.tensor([*one.layers.values(), one.together], dtype=torch.float64)
    return found.tolist()


def test_random_gradients_predict_the_expectation_over_labels(network):
    """From 1000 for every image."""
    x, labels = torch.randn(5, 3, 6, 6, dtype=torch.float64), torch.zeros(5000, dtype=torch.long)
    layers, changes = layers_of(network), random_changes(network)
    drawn = predicted_rise(network, layers, changes, given([(x.repeat(1000, 1, 1, 1), labels)], "true"))
    found = [*drawn.layers.values(), drawn.together]
    assert found == pytest.approx(expected_rises(network, layers, changes, x), rel=0.1)


def test_it_is_the_second_order_of_the_divergence_from_the_own_prediction(network):
    """All layers changed at once by a share e: the divergence over e^2 goes to what is predicted."""
    x = torch.randn(6, 3, 6, 6, dtype=torch.float64)
    layers = {name: layer for name, layer in layers_of(network).items() if isinstance(layer, nn.Conv2d)}
    changes = {name: 0.3 * change for name, change in random_changes(network).items() if name in layers}
    with torch.no_grad():
        target = network(x, decide=all_on).logits.log_softmax(1)
    *_, together = expected_rises(network, layers, changes, x)
    errors = []
    for e in (1e-3, 1e-4):
        with torch.no_grad():
            for name, layer in layers.items():
                layer.weight += e * changes[name]
            moved = network(x, decide=all_on).logits.log_softmax(1)
            for name, layer in layers.items():
                layer.weight -= e * changes[name]
        divergence = F.kl_div(moved, target, reduction="batchmean", log_target=True).item()
        errors.append(abs(divergence / e**2 / together - 1))
    assert errors[1] < 0.005 and errors[1] < 0.2 * errors[0]


def test_nothing_changed_raises_nothing(network):
    found = predicted_rise(network, layers_of(network), {}, given([]))
    assert found.together == 0 and found.layers == {}
