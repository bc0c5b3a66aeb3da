"""The ONNX graph of a folded network: one for any number of images, in which skipped blocks are not computed."""

from functools import partial
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from models import LOW_RANK, ResNet
from models.gates import RecurrentGate
from models.resnet import BasicBlock
from utils.data.augment import Normalisation
from utils.sizes import Size, height_width

SWITCH, BLOCK = "switch_", "block_"  # starts of the names of a gate's and a block's nodes, its number behind
OPSET, IR_VERSION = 18, 9  # read by ONNX Runtime 1.14 (2023) and later
INTS = partial(np.array, dtype=np.int64)  # sizes and axes
IMAGES, LOGITS, PROBABILITIES, DECISIONS = "images", "logits", "probabilities", "decisions"


class Graph:
    """Nodes and constants in the making; ``prefix`` starts the names of those that are added later."""

    def __init__(self):
        self.prefix, self.nodes, self.initializers = "", [], []

    def add(self, operator: str, *inputs: str | Tensor | np.ndarray, outputs: int = 1, **attributes: Any) -> Any:
        """Append a node, storing those of its inputs that are arrays; the name of its output, or names of several."""
        inputs = [value if isinstance(value, str) else self._constant(value) for value in inputs]
        name = self._name(operator)
        names = [name] if outputs == 1 else [f"{name}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(operator, inputs, names, name=name, **attributes))
        return names[0] if outputs == 1 else names

    def layers(self, module: nn.Module, x: str) -> str:
        """What a folded layer, or one layer after the other, computes of ``x``."""
        if isinstance(module, nn.Conv2d):
            sizes = {"strides": module.stride, "pads": module.padding * 2, "group": module.groups}
            return self.add("Conv", x, *module.parameters(), **sizes)
        if isinstance(module, nn.Linear):
            return self.add("Gemm", x, *module.parameters(), transB=1)
        if isinstance(module, nn.ReLU):
            return self.add("Relu", x)
        if not isinstance(module, (nn.Sequential, nn.Identity, *LOW_RANK)):
            raise TypeError(f"{type(module).__name__} has no translation")
        for child in module.children():
            x = self.layers(child, x)
        return x

    def _constant(self, value: Tensor | np.ndarray) -> str:
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        name = self._name("constant")
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def _name(self, kind: str) -> str:
        return f"{self.prefix}{kind}_{len(self.nodes) + len(self.initializers)}"


def onnx_model(network: ResNet, normalisation: Normalisation, image_size: Size) -> onnx.ModelProto:
    """The graph: uint8 images [N, 3, H, W] to logits [N, classes] and, with K switches, what they decided, [N, K].

    Each switched block is computed only on the images whose decision is 1.  Without such images its convolutions end
    at once: an ``If`` around them would cost what it saves, and ONNX Runtime's quantisation does not enter branches.

    Args:
        network: without batch norms, see ``deploy.folding.folded``.
    """
    graph, columns, state = Graph(), [], []
    mean, std = (255 * torch.tensor(v).view(1, 3, 1, 1) for v in (normalisation.mean, normalisation.std))
    x = graph.add("Div", graph.add("Sub", graph.add("Cast", IMAGES, to=TensorProto.FLOAT), mean), std)
    x = graph.add("Relu", graph.layers(network.stem, x))
    for index, block in enumerate(network.blocks):
        decision, switch = None, index - 1
        if 0 <= switch < network.switches:
            graph.prefix = f"{SWITCH}{index}."
            if network.asks(switch):
                column, state = _gate(graph, network.gate, switch, x, state)
            if switch in network.fixed_switches:
                shape = graph.add("Concat", graph.add("Shape", IMAGES, start=0, end=1), INTS([1]), axis=0)
                value = helper.make_tensor("value", TensorProto.FLOAT, [1], [network.fixed_switches[switch]])
                column = graph.add("ConstantOfShape", shape, value=value)
            else:
                decision = _passes(graph, graph.add("Squeeze", column, INTS([1])))
            columns.append(column)
        graph.prefix = f"{BLOCK}{index}."
        carried = x if block.shortcut is None else graph.layers(block.shortcut, x)
        if not isinstance(block, BasicBlock):  # its switch is fixed closed
            x = x if block.shortcut is None else graph.add("Relu", carried)
            continue
        if decision is not None:
            rows = graph.add("Transpose", graph.add("NonZero", decision), perm=[1, 0])
            x = graph.add("GatherND", x, rows)
        residual = graph.layers(block.conv2, graph.add("Relu", graph.layers(block.conv1, x)))
        if decision is None:
            x = graph.add("Add", carried, residual)
        else:
            x = graph.add("ScatterND", carried, rows, residual, reduction="add")
        x = graph.add("Relu", x)
    graph.prefix = ""
    pooled = graph.add("Flatten", graph.add("GlobalAveragePool", x), axis=1)
    outputs = {LOGITS: (graph.layers(network.classifier, pooled), network.architecture["num_classes"])}
    if columns:
        probabilities = graph.add("Concat", *columns, axis=1)
        decided = graph.add("Cast", _passes(graph, probabilities), to=TensorProto.FLOAT)
        outputs |= {PROBABILITIES: (probabilities, len(columns)), DECISIONS: (decided, len(columns))}
    for output, (name, _) in outputs.items():
        graph.nodes.append(helper.make_node("Identity", [name], [output], name=output))
    body = helper.make_graph(
        graph.nodes,
        "switched_resnet",
        [helper.make_tensor_value_info(IMAGES, TensorProto.UINT8, ["N", 3, *height_width(image_size)])],
        [helper.make_tensor_value_info(o, TensorProto.FLOAT, ["N", n]) for o, (_, n) in outputs.items()],
        graph.initializers,
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def _gate(graph: Graph, gate: nn.Module, switch: int, x: str, state: list[str]) -> tuple[str, list[str]]:
    """Names of the probabilities [N, 1] that a block runs, and of the state for the next switch."""
    if not isinstance(gate, RecurrentGate):
        if gate.pools:
            x = graph.add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)
        pooled = graph.add("ReduceMean", graph.layers(gate.features[switch], x), INTS([2, 3]), keepdims=0)
        return graph.add("Sigmoid", graph.layers(gate.decisions[switch], pooled)), state
    # One step of ONNX's LSTM over sequences of length 1; PyTorch orders the gates i, f, c, o, ONNX i, o, f, c.
    # The projection of the pooled features is multiplied into its weights: docs/notebook.md.
    cell, hidden, projection = gate.lstm, gate.lstm.hidden_size, gate.projections[switch][0]
    order = torch.arange(4 * hidden).view(4, hidden)[[0, 3, 1, 2]].flatten()
    weights = [weight[order][None] for weight in (cell.weight_ih @ projection.weight, cell.weight_hh)]
    bias = torch.cat([(cell.bias_ih + cell.weight_ih @ projection.bias)[order], cell.bias_hh[order]])[None]
    pooled = graph.add("ReduceMean", x, INTS([2, 3]), keepdims=0)
    inputs = [graph.add("Unsqueeze", pooled, INTS([0])), *weights, bias, *(["", *state] if state else [])]
    _, *state = graph.add("LSTM", *inputs, outputs=3, hidden_size=hidden)
    return graph.add("Sigmoid", graph.layers(gate.decision, graph.add("Squeeze", state[0], INTS([0])))), state


def _passes(graph: Graph, probability: str) -> str:
    """Name of a bool for each probability: whether the block runs on the image, as ``models.decisions`` decides."""
    return graph.add("Greater", probability, np.array(0.5, np.float32))
