"""Pieces of networks as ONNX nodes: the same numbers for every batch size, 1e-6."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn
from torch.nn import functional as F

from deploy.graphs import IR_VERSION, OPSET
from deploy.session import open_session
from deploy.trace import TRACED_BATCH, Graph
from utils.errors import UserError


def traced_session(function, channels: int = 3, size: int = 9):
    graph = Graph("x")
    name, example = graph.traced(function, ("x", torch.zeros(TRACED_BATCH, channels, size, size)))
    graph.nodes.append(helper.make_node("Identity", [name], ["y"]))
    graph.keep(["y"])
    body = helper.make_graph(
        graph.nodes,
        "piece",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", channels, size, size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", *example.shape[1:]])],
        graph.initializers,
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    return open_session(model, threads=1)


def convolutional_gate() -> nn.Module:
    return nn.Sequential(
        nn.MaxPool2d(3, 2, 1), nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(4, 1), nn.Sigmoid(),
    ).eval()  # fmt: skip


def functional_gate():
    conv, norm, linear = nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4).eval(), nn.Linear(4, 1)

    def gate(x):
        with torch.autocast("cpu", enabled=False):
            x = F.relu(norm(conv(F.max_pool2d(x, 2))))
            x = F.avg_pool2d(x, x.shape[-1]).view(x.shape[0], -1)
            return torch.sigmoid(linear(x)).squeeze(1)

    return gate


def two_lstm_steps():
    cell, linear = nn.LSTMCell(3, 6), nn.Linear(6, 1)
    for parameter in cell.parameters():
        nn.init.normal_(parameter)

    def steps(x):
        state = cell(x.mean((2, 3)), None)
        return linear(cell(2 * x.mean((2, 3)), state)[0]).flatten()

    return steps


@pytest.mark.parametrize("make", [convolutional_gate, functional_gate, two_lstm_steps])
def test_piece_gives_the_same_numbers_for_any_batch(make):
    torch.manual_seed(0)
    function = make()
    session = traced_session(function)
    for batch in (1, TRACED_BATCH, 8):
        x = torch.randn(batch, 3, 9, 9)
        with torch.no_grad():
            expected = function(x)
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected.numpy(), rtol=1e-6, atol=1e-6)


def test_unknown_operator_is_named():
    with pytest.raises(UserError, match="cumsum"):
        traced_session(lambda x: x.cumsum(1))
