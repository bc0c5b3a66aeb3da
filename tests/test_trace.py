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
    shapes = {"x": [channels, size, size], "y": example.shape[1:]}
    values = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", *s])] for n, s in shapes.items()]
    body = helper.make_graph(graph.nodes, "piece", *values, graph.initializers)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    return open_session(model, threads=1)


def test_piece_gives_the_same_numbers_for_any_batch():
    conv, norm, linear = nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4).eval(), nn.Linear(4, 1)

    def gate(x):
        with torch.autocast("cpu", enabled=False):
            x = F.relu(norm(conv(F.max_pool2d(x, 2))))
            x = F.avg_pool2d(x, x.shape[-1]).view(x.shape[0], -1)
            return torch.sigmoid(linear(x)).squeeze(1)

    session = traced_session(gate)
    for batch in (1, TRACED_BATCH, 8):
        x = torch.randn(batch, 3, 9, 9)
        with torch.no_grad():
            expected = gate(x)
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected.numpy(), rtol=1e-6, atol=1e-6)


def test_unknown_operator_is_named():
    with pytest.raises(UserError, match="cumsum"):
        traced_session(lambda x: x.cumsum(1))
