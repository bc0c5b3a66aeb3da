"""Aligned networks compute what the original computes: 1e-12 in float64."""

import pytest
import torch
from networks import NORMALISATION, lively_network
from onnx import numpy_helper
from torch import nn

from deploy import exported, general
from deploy.aligned import aligned, vector_channels
from models import LowRankConv2d, LowRankLinear

LAYERS = {
    "tucker": (lambda: LowRankConv2d(nn.Conv2d(6, 24, 3, 2, 1), (4, 17), bias=True), [4, 32]),
    "input side": (lambda: LowRankConv2d(nn.Conv2d(6, 8, 3, 1, 1), (21, None), bias=True), [32, None]),
    "output side": (lambda: LowRankConv2d(nn.Conv2d(6, 8, 3, 1, 1), (None, 5)), [None, 5]),
    "two factors": (lambda: LowRankConv2d(nn.Conv2d(6, 8, 1, 2, bias=False), (None, 3), bias=True), [None, 16]),
    "depthwise": (lambda: LowRankConv2d(nn.Conv2d(6, 8, (1, 3), 1, 2, dilation=2), (7, 7), True, bias=True), [16, 16]),
    "aligned before": (lambda: LowRankConv2d(nn.Conv2d(6, 8, 3), (16, 32)), [16, 32]),
    "linear": (lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), LowRankLinear(6, 8, 3, True)), None),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_form_gives_the_same_answers(name):
    make, ranks = LAYERS[name]
    network = nn.Sequential(make()).double()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    wider, x = aligned(network, 16), torch.randn(3, 6, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(wider(x), network(x), rtol=1e-12, atol=1e-12)
    assert ranks is None or wider[0].ranks == ranks
    assert (wider is network) == (ranks is None or network[0].ranks == ranks)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_a_layer_with_two_names_stays_one():
    layer = LowRankConv2d(nn.Conv2d(8, 8, 3, 1, 1), (9, 12))
    wider = aligned(nn.Sequential(layer, nn.ReLU(), layer), 8)
    assert wider[0] is wider[2] and wider[0].ranks == [16, 16]


def test_exported_files_are_aligned(monkeypatch: pytest.MonkeyPatch):
    network = lively_network("pruned", "none")
    of_layers = {layer.core.out_channels for layer in network.modules() if isinstance(layer, LowRankConv2d)}
    assert any(rank % 4 for rank in of_layers)
    monkeypatch.setattr(exported, "vector_channels", lambda: 4)
    graph = exported.exported_model(network, NORMALISATION, 16).graph
    outputs = {len(array) for array in map(numpy_helper.to_array, graph.initializer) if array.ndim == 4}
    assert all(count % 4 == 0 or count < 4 for count in outputs)


def test_networks_of_ones_own_are_aligned(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(general, "vector_channels", lambda: 16)
    layer = LowRankConv2d(nn.Conv2d(3, 24, 3, 1, 1), (7, 7), depthwise=True)
    network = nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    graph, deviation = general.general_model(network, NORMALISATION, 8, 8)
    kernels = [numpy_helper.to_array(own).shape for own in graph.graph.initializer if len(own.dims) == 4]
    assert kernels == [(16, 3, 1, 1), (16, 1, 3, 3), (24, 16, 1, 1)] and deviation < 1e-5
    assert network[0].ranks == [7, 7]


@pytest.mark.parametrize(("capability", "channels"), [("AVX2", 8), ("AVX512", 16), ("DEFAULT", 16)])
def test_blocks_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch, capability: str, channels: int):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert vector_channels() == channels
