"""The predicted rise of the loss against gradients image by image, in float64, and against the rise itself."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models import all_on, build_network
from pruning import prediction
from pruning.layers import competing_layers, read_weights
from pruning.prediction import predicted_rise, predicted_rises
from pruning.surgery import composed


@pytest.fixture
def network():
    torch.manual_seed(0)
    ranks = {"blocks.1.conv1": (3, 4), "blocks.2.conv2": (5, 5)}
    network = build_network(
        "resnet", depth=8, num_classes=3, width=4, gate="none", ranks=ranks, depthwise=["blocks.2.conv2"]
    ).double()
    for _ in range(3):
        network(torch.randn(8, 3, 6, 6, dtype=torch.float64))
    return network.eval()


def layers_of(network):
    """All 3x3 layers: plain, of low rank and depthwise separable, the last two as a whole."""
    return {name: network.get_submodule(name) for name in competing_layers(network)}


def random_changes(network, *shape: int):
    """In the shape of each layer's kernel, multiplied out."""
    return {
        name: torch.randn(*shape, *composed(read_weights(network, name)).shape, dtype=torch.float64)
        for name in competing_layers(network)
    }


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
    found = predicted_rise(network, layers, changes, batches, "empirical", torch.Generator())
    products = products_by_image(network, changes, x, y)
    single = 0.5 * products.square().mean(0)
    assert [found.layers[name] for name in layers] == pytest.approx(single.tolist(), rel=1e-9)
    assert found.together == pytest.approx(0.5 * products.sum(1).square().mean().item(), rel=1e-9)


def test_many_changes_of_a_layer_are_predicted_one_by_one(network, monkeypatch):
    """Also where the images' gradients do not fit into memory at once."""
    monkeypatch.setattr(prediction, "CHUNK", 3)
    x, y = torch.randn(7, 3, 6, 6, dtype=torch.float64), torch.randint(3, (7,))
    changes = random_changes(network, 4)
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    found = predicted_rises(network, layers_of(network), changes, batches, "empirical", torch.Generator())
    for i in range(4):
        own = {name: several[i] for name, several in changes.items()}
        expected = 0.5 * products_by_image(network, own, x, y).square().mean(0)
        assert [found[name][i].item() for name in changes] == pytest.approx(expected.tolist(), rel=1e-9)


def test_every_draw_counts_on_its_own(network):
    x, y = torch.randn(5, 3, 6, 6, dtype=torch.float64), torch.zeros(5, dtype=torch.long)
    layers, changes = layers_of(network), random_changes(network)

    def rise(draws: int, images: int):
        batch = (x.repeat(images, 1, 1, 1), y.repeat(images))
        return predicted_rise(network, layers, changes, [batch], "true", torch.Generator().manual_seed(0), draws)

    # Two estimates of one expectation, each from 1000 labels for every image.
    many, repeated = rise(1000, 1), rise(1, 1000)
    assert many.together == pytest.approx(repeated.together, rel=0.1)
    assert list(many.layers.values()) == pytest.approx(list(repeated.layers.values()), rel=0.1)


def test_it_is_the_second_order_of_the_divergence_from_the_own_prediction(network):
    """All layers changed at once by a share e: the divergence over e^2 goes to what is predicted."""
    x = torch.randn(6, 3, 6, 6, dtype=torch.float64)
    layers = {name: layer for name, layer in layers_of(network).items() if isinstance(layer, nn.Conv2d)}
    changes = {name: 0.3 * change for name, change in random_changes(network).items() if name in layers}
    draws = torch.Generator().manual_seed(0)
    # The expectation over labels, written out: each class once, weighted by its probability.
    with torch.no_grad():
        target = network(x, decide=all_on).logits.log_softmax(1)
    together = 0.0
    for n in range(6):
        for label in range(3):
            one = predicted_rise(network, layers, changes, [(x[n : n + 1], torch.tensor([label]))], "empirical", draws)
            together += target[n, label].exp().item() * one.together / 6
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
    found = predicted_rise(network, layers_of(network), {}, [], "true", torch.Generator())
    assert found.together == 0 and found.layers == {}
