"""``compress`` on networks that read weights, name arguments, start from words, or switch gradients off."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from models import LowRankConv2d, LowRankLinear
from pruning import compress
from utils.errors import UserError

CLASSES = 5
WORDS = 12
LAYERS = {
    "tucker": lambda: LowRankConv2d(6, 8, 3, 2, 1, 4, 5, bias=True),
    "one side": lambda: LowRankConv2d(6, 8, 3, 1, 1, None, 5),
    "depthwise": lambda: LowRankConv2d(6, 8, 3, 1, 2, 7, 7, depthwise=True, dilation=2),
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


class AsksForTypes(Network):
    def features(self, x):
        return super().features(x.to(self.two.weight.device, self.two.weight.dtype))


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
    smaller = compress(network, images, flops=0.6, round_to=1, decomposition="truncate", objective="saliency")
    assert isinstance(smaller[0].one, LowRankConv2d) and not isinstance(smaller[0].two, LowRankConv2d)


@pytest.mark.parametrize("network", [NamesArguments, GradientsOff, AsksForTypes, Words])
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
    with FlopCounterMode(display=False) as counter:
        assert layer.weight.shape == (5, 6) and layer.weight.device == x.device
    assert counter.get_total_flops() == 0


def test_a_loader_is_passed_over_as_it_is():
    torch.manual_seed(0)
    network = Network()
    found, expected = (compress(network, given, flops=0.6, round_to=4) for given in (images(), images))
    for (name, mine), theirs in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


NOTHING = r"batches\(\) gives nothing: each call has to start a new pass"


@pytest.mark.parametrize(
    ("make", "batches", "settings", "message"),
    [
        (Network, images, {"decomposition": "bst"},
         "decomposition is 'bst', but takes one of best, tucker, depthwise, truncate"),
        (Network, images, {"round_to": 0}, "round_to is 0, out of range"),
        (Network, images, {"criterion": "c_obs"},
         "criterion c_obs removes channels inside the blocks of this program's ResNet"),
        (Network, images, {"flop": 0.5}, "unknown key 'flop'"),
        (Network, images, {"flops": 50}, "flops is 50: give a share above 0 and up to 1, such as 0.5"),
        (Network, images, {"flops": 0}, "flops is 0: give a share above 0"),
        (Network, lambda: [{"pixels": torch.zeros(2, 3, 8, 8)}], {},
         r"batches\(\) gives a dict, where \(inputs, labels\) is"),
        (Network, lambda: [torch.zeros(2, 3, 8, 8)], {}, r"batches\(\) gives a Tensor, where"),
        (Network, [(torch.zeros(3, 8, 8), 4)], {}, r"the labels of a batch are no tensor \[N\] of classes"),
        (Network, [], {}, NOTHING),
        (Network, iter(images()), {}, NOTHING),
        (
            lambda: torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(432, CLASSES))), images, {},
            "TorchScript, which hides its layers: give the module before that",
        ),
        (lambda: torch.compile(Network()), images, {}, r"compiled by torch\.compile: give network\._orig_mod"),
    ],
)  # fmt: skip
def test_what_cannot_be_compressed_is_refused_in_one_sentence(make, batches, settings, message):
    with pytest.raises(UserError, match=message):
        compress(make(), batches, **{"flops": 0.5, **settings})
