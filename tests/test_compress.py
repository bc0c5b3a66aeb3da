"""``compress`` on networks that are not ours: torchvision's, and small ones that do what tracers stumble over."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from examples.cifar_resnet import resnet20
from models import LowRankConv2d, LowRankLinear
from pruning import apply_edits, compress, edits_of, prune_forms
from pruning.capture import some_images
from pruning.layers import composed, weights_of
from pruning.survey import survey
from utils.errors import UserError
from utils.flops import cost_on

NAMES = ["resnet18", "vgg11", "densenet121", "googlenet", "mobilenet_v3_small", "squeezenet1_1"]


def labelled(count=8, size=64, classes=10):
    x = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    return lambda: [(x[i : i + 4], torch.arange(len(x[i : i + 4])) % classes) for i in range(0, count, 4)]


def flops_of(network, size=64) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.zeros(1, 3, size, size))
    return counter.get_total_flops()


def torchvision_network(name: str) -> nn.Module:
    torch.manual_seed(0)
    given = {"init_weights": False} if name in ("googlenet", "vgg11") else {}
    network = torchvision.models.get_model(name, num_classes=10, **given)
    if (
        name == "vgg11"
    ):  # the same pooling to 7x7, with two small linear layers behind it instead of 119 million parameters
        network.classifier = nn.Sequential(nn.Linear(512 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10))
    return network


@pytest.mark.parametrize("name", NAMES)
def test_networks_of_torchvision_are_compressed_as_they_are(name):
    network = torchvision_network(name)
    before, whole = copy.deepcopy(network.state_dict()), cost_on(network, torch.zeros(1, 3, 64, 64))
    # All forms for the small network; depthwise ones of hundreds of channels take their time.
    decomposition = "best" if name == "squeezenet1_1" else "tucker"
    smaller = compress(network.train(), labelled(), flops=0.7, decomposition=decomposition)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert network.training and all(module.training for module in smaller.modules())
    assert all(p.requires_grad for net in (network, smaller) for p in net.parameters())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    assert not any(getattr(m, hook) for net in (network, smaller) for m in net.modules() for hook in hooks)
    found = flops_of(smaller)
    assert whole.flops == flops_of(network) and smaller.report.flops == (whole.flops, found)
    assert found <= 0.7 * whole.flops and (name == "mobilenet_v3_small" or found >= 0.98 * 0.7 * whole.flops)
    assert smaller.report.parameters[1] == sum(p.numel() for p in smaller.parameters())
    changes = smaller.report.changes
    parameters = sum(c.parameters_before - c.parameters_after for c in changes)
    assert whole.parameters - smaller.report.parameters[1] == parameters
    assert whole.flops - found == sum(c.flops_before - c.flops_after for c in changes)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        outputs = smaller.eval()(x)
        assert outputs.shape == (2, 10) and outputs.isfinite().all()
        again = apply_edits(torchvision_network(name), edits_of(smaller))
        again.load_state_dict(smaller.state_dict())
        torch.testing.assert_close(again.eval()(x), outputs)


class Odd(nn.Module):
    """Everything that is left alone, and layers of every shape that are not."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, (3, 5), padding="same", dilation=2)
        self.even = nn.Conv2d(16, 24, 4, padding="same", bias=False)
        self.tall = nn.Conv2d(24, 24, (5, 1), stride=(2, 1), padding=(2, 0), bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.down = nn.Conv2d(24, 32, 1, stride=2)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.reflect = nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect")
        self.twice = nn.Conv2d(32, 32, 3, padding=1)
        self.unused = nn.Conv2d(32, 32, 3)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.tokens = nn.Linear(32, 48)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(48, 10)

    def forward(self, x):
        x.mul_(1.5)  # in place, on the input itself
        x = F.relu(self.stem(x), inplace=True)
        x = F.relu_(self.norm(self.tall(F.relu_(self.even(x)))))
        x = self.grouped(self.down(x))
        x = self.twice(F.relu(self.twice(self.reflect(x))))
        x = x.flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return {"scores": self.head(self.dropout(F.gelu(self.tokens(x))).mean(1)), "tokens": x}


def scores(outputs: dict) -> torch.Tensor:
    return outputs["scores"]


def test_what_cannot_be_replaced_is_left_alone_and_said():
    network = Odd()
    found = survey(network, torch.randn(2, 3, 16, 16), nn.Module.__call__)
    assert found.norms == {"stem": None, "even": None, "tall": "norm", "down": None, "tokens": None, "head": None}
    assert found.left_alone == {
        "grouped": "grouped",
        "reflect": "padding mode reflect",
        "twice": "used twice",
        "unused": "never run",
        "attention.out_proj": "never run",
    }
    with pytest.raises(UserError, match=r"the network returns a dict, but classification needs .* logits="):
        compress(network, labelled(size=16), flops=0.6)
    assert network.training and network.head.weight.requires_grad and not network.head._forward_hooks
    smaller = compress(network, labelled(40, 16), flops=0.6, logits=scores, round_to=1)
    assert 0.98 * 0.6 <= smaller.report.flops[1] / smaller.report.flops[0] <= 0.6
    assert smaller.report.left_alone.items() >= found.left_alone.items() and "used twice: twice" in str(smaller.report)
    assert cost_on(smaller, torch.zeros(1, 3, 16, 16)).flops == smaller.report.flops[1]
    with torch.no_grad():
        assert smaller(torch.randn(2, 3, 16, 16))["scores"].isfinite().all()


class Caching(nn.Module):
    """Keeps what it has made of its weights for evaluation, as the attention of LeViT does, until it is trained."""

    def __init__(self):
        super().__init__()
        self.conv, self.head, self.cached = nn.Conv2d(3, 32, 3), nn.Linear(32, 10), None
        self.table, self.given = nn.Parameter(torch.randn(32)), nn.Identity()

    def train(self, mode: bool = True) -> "Caching":
        if mode:
            self.cached = None
        return super().train(mode)

    def forward(self, x):
        scale = self.given(self.table).exp() if self.training or self.cached is None else self.cached
        if not self.training:
            self.cached = scale
        return self.head(F.relu(self.conv(x) * scale[:, None, None]).mean((2, 3)))


@pytest.mark.parametrize("training", [True, False])
def test_what_a_network_caches_for_evaluation_goes_when_training_goes_on(training: bool):
    network = Caching().train(training)
    smaller = compress(network, labelled(), flops=0.6)
    assert (network.cached is None) == (smaller.cached is None) == training
    copy.deepcopy(smaller), copy.deepcopy(network)  # without a graph of gradients in what is cached


@pytest.mark.parametrize("training", [True, False])
def test_products_of_attention_are_counted(training: bool):
    width, tokens, hidden = 32, 10, 64
    layer = nn.TransformerEncoderLayer(width, 4, hidden, batch_first=True).train(training)
    linear = tokens * width * (3 * width + width + 2 * hidden)  # into the attention, out of it, and behind it
    attention = 2 * tokens * tokens * width  # of queries and keys, and of these with the values
    assert cost_on(layer, torch.zeros(1, tokens, width)).flops == 2 * (linear + attention)


def test_layers_count_as_wide_by_the_side_that_their_factors_have(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pruning.survey.WIDEST", 24)
    network = nn.Sequential(
        nn.Conv2d(3, 25, 3), nn.Conv2d(25, 24, 1), nn.Conv2d(24, 24, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(96, 25), nn.Linear(25, 24), nn.Linear(24, 97),
    )  # fmt: skip
    found = survey(network, torch.zeros(2, 3, 12, 12), nn.Module.__call__)
    assert found.left_alone == {"0": "too wide", "5": "too wide", "7": "too wide"}
    assert found.names == ["1", "2", "6"]


def test_ignored_layers_stay_as_they_are():
    network = Odd()
    smaller = compress(network, labelled(40, 16), flops=0.8, logits=scores, round_to=1, ignored_layers=["tall", "head"])
    for name in ("tall", "head"):
        assert smaller.report.left_alone[name] == "ignored"
        assert torch.equal(smaller.get_submodule(name).weight, network.get_submodule(name).weight)
    assert smaller.report.flops[1] < smaller.report.flops[0]
    found = survey(network, torch.randn(2, 3, 16, 16), nn.Module.__call__, ignored=["attention"])
    assert found.left_alone["attention.out_proj"]


def test_layers_of_every_shape_equal_their_composed_kernels():
    network = Odd().eval()
    smaller = compress(network, labelled(40, 16), flops=0.5, logits=scores, round_to=1)
    forms = {edit["name"]: edit["form"] for edit in edits_of(smaller)}
    assert len(forms) >= 3 and "two_factors" in forms.values()
    plain = copy.deepcopy(smaller)
    for name in forms:
        whole, layer = copy.deepcopy(network.get_submodule(name)), smaller.get_submodule(name)
        whole.weight.data = composed(weights_of(smaller.get_submodule(name))).float().reshape(whole.weight.shape)
        whole.bias = nn.Parameter(layer.bias.detach().clone()) if layer.bias is not None else None
        setattr(plain, name, whole)
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        expected, found = plain.eval()(x.clone())["scores"], smaller.eval()(x.clone())["scores"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_labels_in_a_dictionary_count_as_the_images_they_belong_to():
    torch.manual_seed(0)
    network, loss_fn = Network(), lambda outputs, labels: F.cross_entropy(outputs, labels["of"], reduction="none")
    plain = compress(network, images, flops=0.6, round_to=4, loss_fn=lambda y, labels: loss_fn(y, {"of": labels}))
    named = lambda: [(x, {"of": labels, "unused": None}) for x, labels in images()]  # noqa: E731
    found = compress(network, named, flops=0.6, round_to=4, loss_fn=loss_fn)
    assert str(found.report) == str(plain.report)


def test_a_network_of_which_nothing_can_be_saved_comes_back_as_it_was():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1, padding_mode="reflect"), nn.Flatten(), nn.Linear(8 * 64, 2))
    smaller = compress(network, labelled(size=8, classes=2), flops=0.5, prune_ratio_limit=0.0)
    assert not edits_of(smaller) and "the network is unchanged" in str(smaller.report)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), smaller.parameters(), strict=True))


def test_a_compressed_network_trains_and_is_compressed_again():
    first = compress(resnet20(), labelled(64, 16), flops=0.6, decomposition="tucker")
    images, labels = labelled(8, 16)()[0]
    F.cross_entropy(first(images), labels).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in first.parameters())
    second = compress(first, labelled(64, 16), flops=0.7, decomposition="tucker")
    whole = cost_on(resnet20(), torch.zeros(1, 3, 16, 16)).flops
    assert 0.98 * 0.42 * whole <= flops_of(second, 16) <= 0.42 * whole
    assert sum(isinstance(m, nn.Conv2d) for m in second.modules()) <= 3 * 19


def test_layers_predicted_one_by_one_rise_as_much_as_together(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    network, batches = resnet20(), labelled(16, 16)
    given = {"flops": 0.6, "decomposition": "tucker", "fisher_type": "empirical"}
    reports = [compress(network, batches, **given).report]
    monkeypatch.setattr(prune_forms, "_entries", lambda *_: 1)
    reports.append(compress(network, batches, **given).report)
    (together, alone) = ([(c.name, c.form, c.ranks_after) for c in report.changes] for report in reports)
    assert together == alone
    rises = [torch.tensor([c.predicted_rise for c in report.changes]) for report in reports]
    torch.testing.assert_close(*rises, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("fails_in_pass", [1, 2])
def test_after_an_exception_the_network_is_as_it_was(fails_in_pass: int):
    """In the survey and in the factors."""
    network, passes = Network().train(), []
    network.one.weight.requires_grad_(False)
    network.two.eval()
    before = copy.deepcopy(network.state_dict())

    def loss_fn(outputs, labels):
        passes.append(len(labels))
        if len(passes) == fails_in_pass:
            raise ValueError("no loss")
        return F.cross_entropy(outputs, labels, reduction="none")

    with pytest.raises(ValueError, match="no loss"):
        compress(network, images, flops=0.6, round_to=4, loss_fn=loss_fn)
    assert network.training and network.one.training and not network.two.training
    assert [name for name, p in network.named_parameters() if not p.requires_grad] == ["one.weight"]
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in network.modules())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


def test_a_compressed_network_is_compiled_in_one_graph():
    smaller = compress(Network(), images, flops=0.6, round_to=4).eval()
    x = images()[0][0]
    compiled = torch.compile(smaller, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), smaller(x), rtol=0, atol=0)


def test_edits_that_do_not_fit_are_one_sentence():
    edit = {"name": "layer1.0.conv1", "form": "tucker", "ranks": [4, 4], "bias": False}
    with pytest.raises(ValueError, match="the edits name the layer 'layer9'"):
        apply_edits(resnet20(), [{**edit, "name": "layer9"}])
    with pytest.raises(ValueError, match="do not fit the layer 'linear'"):
        apply_edits(resnet20(), [{**edit, "name": "linear"}])
    with pytest.raises(ValueError, match="the form 'cp', which is unknown"):
        apply_edits(resnet20(), [{**edit, "form": "cp"}])


CLASSES = 5
WORDS = 12
LAYERS = {
    "tucker": lambda: LowRankConv2d(nn.Conv2d(6, 8, 3, 2, 1), (4, 5), bias=True),
    "one side": lambda: LowRankConv2d(nn.Conv2d(6, 8, 3, 1, 1), (None, 5)),
    "depthwise": lambda: LowRankConv2d(nn.Conv2d(6, 8, 3, 1, 2, dilation=2), (7, 7), depthwise=True),
}


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x):
        return self.head(self.features(x).mean(dim=(2, 3)))

    def features(self, x):
        return F.relu(self.two(F.relu(self.one(x))))


class NamesArguments(Network):
    def features(self, x):
        return F.relu(self.two(input=F.relu(self.one(input=x))))


class GradientsOff(Network):
    def features(self, x):
        with torch.no_grad():
            x = self.one(x)
        return F.relu(self.two(F.relu(x)))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x):
        return self.head(self.encoder(self.words(x), src_key_padding_mask=x == 0).mean(dim=1))


def images():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 3, 12, 12, generator=generator), torch.arange(8) % CLASSES) for _ in range(2)]


def sentences():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(1, WORDS, (16, 9), generator=generator)
    x[::3, 6:] = 0
    return [(part, torch.arange(8) % CLASSES) for part in x.split(8)]


def test_single_directions_of_any_network():
    torch.manual_seed(0)
    network = nn.Sequential(Network(), nn.Identity())
    network[0].two.padding_mode = "circular"
    smaller = compress(network, images, flops=0.97, round_to=1, decomposition="truncate", objective="saliency")
    assert isinstance(smaller[0].one, LowRankConv2d) and not isinstance(smaller[0].two, LowRankConv2d)


@pytest.mark.parametrize("network", [NamesArguments, GradientsOff, Words])
def test_unusual_networks_are_compressed(network):
    torch.manual_seed(0)
    batches = sentences if network is Words else images
    whole, x = network().eval(), batches()[0][0]
    smaller = compress(whole, batches, flops=0.6, round_to=4)
    before, after = smaller.report.flops
    assert 0.5 < after / before <= 0.6
    usual = smaller(x)  # of a transformer: layer by layer, since gradients are needed
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        torch.testing.assert_close(smaller(x), usual)
    assert network is Words or counter.get_total_flops() == len(x) * after, "attention is not counted layer by layer"
    assert torch.backends.mha.get_fastpath_enabled()


class TwoHeads(Network):
    """As networks for segmentation have an auxiliary one, which runs in evaluation mode, too."""

    def __init__(self):
        super().__init__()
        self.other = nn.Conv2d(64, 64, 3, padding=1)

    def forward(self, x):
        x = self.features(x)
        return {"out": self.head(x.mean(dim=(2, 3))), "other": self.other(x)}


@pytest.mark.parametrize("flops", [0.7, 0.01])
def test_a_head_that_the_loss_does_not_reach_is_left_alone(flops):
    torch.manual_seed(0)
    network, x = TwoHeads(), images()[0][0]
    loss_fn = lambda outputs, labels: F.cross_entropy(outputs["out"], labels, reduction="none")  # noqa: E731
    smaller = compress(network, images, flops=flops, round_to=4, loss_fn=loss_fn)
    assert smaller.report.left_alone["other"] == "reaches no output"
    assert smaller(x)["other"].shape == network(x)["other"].shape
    before, after = smaller.report.flops
    assert after <= 0.8 * before


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_the_weight_of_a_rebuilt_convolution_is_what_it_multiplies_out_to(layer):
    torch.manual_seed(0)
    layer, x = layer().double(), torch.randn(2, 6, 9, 9, dtype=torch.float64)
    weight, twin = layer.weight, nn.Conv2d(6, 8, 3, layer.stride, layer.padding, layer.dilation, bias=False)
    assert (weight.shape, weight.dtype, weight.ndim) == (twin.weight.shape, torch.float64, 4)
    assert all(getattr(layer, name) == getattr(twin, name) for name in nn.Conv2d.__constants__)
    found = F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation)
    torch.testing.assert_close(found, layer(x), rtol=1e-12, atol=1e-12)
    assert type(found) is type(weight + 1) is torch.Tensor
    (gradient,) = torch.autograd.grad(found.square().sum(), layer.core.weight)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), layer.core.weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)


def test_the_weight_of_a_rebuilt_linear_layer():
    layer, x = LowRankLinear(6, 5, 3, bias=True), torch.randn(4, 6)
    torch.testing.assert_close(F.linear(x, layer.weight, layer.bias), layer(x))
    assert layer.weight.shape == (5, 6) and layer.weight.device == x.device


@pytest.mark.parametrize(
    ("count", "taken"), [(8, [0, 5]), (9, [0, 4, 7]), (28, [0, 2, 3, 5, 6, 8, 9]), (40, list(range(10))), (1, [0])]
)
def test_images_that_are_sorted_by_class_are_taken_from_all_classes(count, taken):
    batches = [(torch.zeros(4, 3), torch.full((4,), label)) for label in range(10)]
    assert [labels[0].item() for _, labels in some_images(batches, count)] == taken
    unknown = (batch for batch in batches)
    assert [labels[0].item() for _, labels in some_images(unknown, count)] == list(range(len(taken)))


def test_a_share_goes():
    torch.manual_seed(0)
    flops, directions = (
        compress(Network(), images, prune_ratio=0.4, round_to=1, **more).report
        for more in ({}, {"decomposition": "truncate", "objective": "saliency"})
    )
    assert 0.55 < flops.flops[1] / flops.flops[0] <= 0.6
    assert directions.flops[1] < directions.flops[0]


@pytest.mark.parametrize("reestimated", [True, False])
def test_without_the_refit_norms_are_measured_again(reestimated: bool):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(1600, CLASSES))
    smaller = compress(network, images, flops=0.6, round_to=1, refit=False, reestimate_batch_norm=reestimated)
    features = torch.cat([smaller[0](x) for x, _ in images()])
    mean = features.mean(dim=(0, 2, 3)) if reestimated else torch.zeros(16)
    torch.testing.assert_close(smaller[1].running_mean, mean, rtol=1e-4, atol=1e-6)
    assert smaller.training and network[1].running_mean.abs().max() == 0
