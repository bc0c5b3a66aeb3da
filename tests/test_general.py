"""Networks of other people as ONNX graphs: PyTorch's logits to 1e-4 for any number of images."""

import math

import onnx
import onnxruntime
import pytest
import torch
import torchvision
from networks import NORMALISATION
from test_compress import NAMES, torchvision_network
from torch import nn
from torch.nn import functional as F

from deploy.general import general_model
from deploy.int8 import quantised
from deploy.session import ExportedNetwork, check_exported, open_session, run_session
from examples.cifar_resnet import resnet20
from models import LowRankConv2d, LowRankLinear, RoutedOutput
from pruning import compress
from utils.errors import UserError


def agrees(network: nn.Module, height: int, width: int) -> None:
    """Against the network on images that the export has not seen."""
    model, deviation = general_model(network, NORMALISATION, height, width)
    assert deviation <= 1e-4
    session = open_session(model, threads=1)
    for batch in (1, 2, 7):
        pixels = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8)
        with torch.no_grad():
            expected = network(NORMALISATION.apply(pixels))
        logits = torch.from_numpy(run_session(session, pixels.numpy())["logits"])
        assert logits.shape == expected.shape
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("name", NAMES)
def test_networks_of_torchvision(name):
    agrees(torchvision_network(name).eval(), 64, 64)


def test_transformers_and_images_that_are_no_squares():
    network = torchvision.models.VisionTransformer(16, 4, 2, 2, 8, 16, num_classes=5).eval()
    nn.init.normal_(network.heads.head.weight)
    agrees(network, 16, 16)
    pooled = (nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d((7, None)), nn.Flatten(), nn.LazyLinear(5))
    agrees(nn.Sequential(*pooled).eval(), 12, 20)


@pytest.mark.parametrize(("inputs", "outputs"), [((2, 2), 7), ((5, 9), (3, 4)), ((8, 8), (4, 2)), ((6, 5), (None, 3))])
def test_adaptive_pooling_of_any_sizes(inputs, outputs):
    agrees(Applied(lambda x: F.adaptive_avg_pool2d(x, outputs).flatten(1)), *inputs)


def test_shortcuts_are_added_within_convolutions(tmp_path):
    """All nine in ONNX Runtime's own graph: it has no node for one, and one change of layout at each end."""
    model, _ = general_model(resnet20().eval(), NORMALISATION, 32, 32)
    assert not {node.op_type for node in model.graph.node} & {"Pad", "Slice"}
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options)
    operators = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    assert not {"Add", "Relu"} & {*operators}
    assert operators.count("ReorderOutput") == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)),
        lambda x: F.pad(x, pad=[0, 0, 0, 0, 0, 3], mode="constant", value=0.0),
        lambda x: F.pad(x, (0, 0, 0, 0, 1, 2), value=0.5),
        lambda x: F.pad(x, (0, 0, 0, 0, 1, -1)),
        lambda x: F.pad(x, (1, 2, 0, 0, 1, 1)),
        lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
        lambda x: F.pad(x.flatten(2), (0, 0, 1, 1)),
        lambda x: x[:, :, ::2, ::3],
        lambda x: x[:, :, 1::2, ::2],
        lambda x: x[:, ::2, ::2, ::2],
        lambda x: x[:, :, ::2, :5],
        lambda x: x[:, :, ::2],
        lambda x: x[:, 1, ::2, ::2],
    ],
)
def test_padding_and_every_nth_pixel(function):
    agrees(Applied(lambda x: function(x).flatten(1)), 7, 10)


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_a_compressed_network_whose_classifier_has_two_factors():
    network = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 64),
    )  # fmt: skip
    with torch.no_grad():  # a classifier of rank 4
        network[-1].weight.copy_(torch.randn(64, 4) @ torch.randn(4, 128))
    batches = [(torch.randn(16, 3, 8, 8), torch.randint(64, (16,)))]
    smaller = compress(network.eval(), lambda: batches, parameters=0.5, round_to=4)
    assert isinstance(smaller[-1], LowRankLinear) and isinstance(smaller[3], LowRankConv2d)
    agrees(smaller, 8, 8)


class Attention(nn.Module):
    """Attention, a norm of vectors and a convolution, which ONNX Runtime's inference of shapes does not follow."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.encoder(self.conv(x).flatten(2).transpose(1, 2))
        return self.head(nn.functional.normalize(x.mean(dim=1)))


def test_attention_in_int8(capfd):
    torch.manual_seed(0)
    network = Attention().eval()
    pixels = torch.randint(0, 256, (32, 3, 8, 8), dtype=torch.uint8)
    model, _ = general_model(network, NORMALISATION, 8, 8)
    smaller = quantised(model, pixels.numpy())
    assert "QuantizeLinear" in {node.op_type for node in smaller.graph.node}
    found = run_session(open_session(smaller), pixels.numpy())["logits"]
    with torch.no_grad():
        expected = network(NORMALISATION.apply(pixels)).numpy()
    assert abs(found - expected).max() < 0.05 * abs(expected).max()
    assert capfd.readouterr() == ("", "")


def test_every_second_pixel_of_a_mask():
    agrees(Applied(lambda x: (x > 0)[:, :, ::2, ::2].float().flatten(1)), 8, 8)


def test_the_network_is_left_in_its_modes():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 3))
    network[1].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    general_model(network, NORMALISATION, 8, 8)
    assert [module.training for module in network.modules()] == [True, True, False, True, True, True]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.view(-1, 7), "cannot run on 8x8 images"),
        (lambda x: {"scores": x}, "returned a dict: it has to return scores"),
        (lambda x: {"logits": x}, "returned a dict: it has to return scores"),
        (lambda x: x, r"returned a tensor of shape \[1, 3, 8, 8\]: it has to return scores"),
        (lambda x: torch.linalg.svdvals(x[:, 0]), "torch.onnx.export cannot translate"),
        (lambda x: x.flatten(1) * (1 if len(x) == 2 else 2), "deviates from the network"),
        (lambda x: x.flatten(1) if x.mean() > 0 else -x.flatten(1), "deviates from the network"),
        (lambda x: x.flatten(1) if x.max() > 1 else -x.flatten(1), "deviates from the network"),
        (
            lambda x: torch.cat([x.flatten(1), torch.ones(1, 1).expand(len(x), 1)], dim=1),
            r"does not run on other numbers of images than 2 .*use x.shape\[0\] instead of len",
        ),
    ],
)
def test_what_cannot_be_exported_is_said_in_a_sentence(function, message, capfd):
    with pytest.raises(UserError, match=message) as raised:
        general_model(Applied(function), NORMALISATION, 8, 8)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


class Masked(nn.Module):
    """Never answers one class, by a logit that is far below all others."""

    def __init__(self, branches: bool, mask: float):
        super().__init__()
        self.head, self.branches, self.mask = nn.Linear(3 * 64, 4), branches, mask

    def forward(self, x):
        y = self.head(x.flatten(1))
        if self.branches and x.mean() > 0:
            y = -y
        return y.masked_fill(torch.tensor([False, False, False, True]), self.mask)


@pytest.mark.parametrize("mask", [-1e9, -math.inf])
def test_a_masked_class_hides_no_difference(mask: float):
    network, none = Masked(False, mask), torch.empty(20, 0)
    model, deviation = general_model(network, NORMALISATION, 8, 8)
    assert 0 <= deviation < 1e-5
    pixels = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)
    as_ours = lambda x: RoutedOutput(network(x), none[: len(x)], none[: len(x)])  # noqa: E731
    assert 0 <= check_exported(ExportedNetwork(model), as_ours, NORMALISATION, pixels, "network.onnx") < 1e-5
    with pytest.raises(UserError, match="look for branches in its forward pass"):
        general_model(Masked(True, mask), NORMALISATION, 8, 8)


class Flipped(nn.Module):
    """The mean of the answers for an image and its mirror image, of which the exporter does not know the width."""

    def __init__(self, by_length: bool):
        super().__init__()
        self.head, self.by_length = nn.Linear(3 * 64, 4), by_length

    def forward(self, x):
        both = self.head(torch.cat([x, x.flip(3)]).flatten(1))
        return both.view(2, len(x) if self.by_length else x.shape[0], -1).mean(dim=0)


def test_the_number_of_classes_is_in_the_graph():
    model, _ = general_model(Flipped(by_length=False), NORMALISATION, 8, 8)
    assert open_session(model).get_outputs()[0].shape[1] == 4
    with pytest.raises(UserError, match=r"other numbers of images than 2 .*use x.shape\[0\] instead of len"):
        general_model(Flipped(by_length=True), NORMALISATION, 8, 8)
