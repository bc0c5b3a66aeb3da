"""The ONNX graph of a folded network: one for any number of images, in which skipped blocks are not computed."""

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor
from torch.nn import functional as F

from deploy.trace import TRACED_BATCH, Graph, named
from models import ResNet
from models.resnet import BasicBlock
from utils.sizes import Size, height_width

SWITCH, BLOCK = "switch_", "block_"  # starts of the names of a gate's and a block's nodes, its number behind
OPSET, IR_VERSION = 18, 9  # read by ONNX Runtime 1.14 (2023) and later
IMAGES, LOGITS, PROBABILITIES, DECISIONS = "images", "logits", "probabilities", "decisions"


@torch.no_grad()
def onnx_model(network: ResNet, image_size: Size) -> onnx.ModelProto:
    """The graph: uint8 images [N, 3, H, W] to logits [N, classes] and, with K switches, what they decided, [N, K].

    Each switched block is computed only on the images whose decision is 1.

    Args:
        network: takes uint8 images, see ``deploy.folding.taking_pixels``.
    """
    graph = Graph(IMAGES)
    pixels = torch.zeros(TRACED_BATCH, 3, *height_width(image_size), dtype=torch.uint8)
    x, example = graph.traced(lambda x: F.relu(network.stem(x)), (IMAGES, pixels))
    constants = {on: _constant_column(graph, on) for on in set(network.fixed_switches.values())}
    probabilities, state = [], None
    for index, block in enumerate(network.blocks):
        decision, switch = None, index - 1
        if 0 <= switch < network.switches:
            graph.prefix = f"{SWITCH}{index}."
            if network.asks(switch):
                (probability, names), (_, examples) = graph.traced(
                    lambda x, state, switch=switch: network.gate(switch, x, state), (x, example), state
                )
                state = named(names, examples)
            if switch in network.fixed_switches:
                probabilities.append(constants[network.fixed_switches[switch]])
            else:
                probabilities.append(graph.resized("Unsqueeze", probability, 1))
                decision = _passes(graph, probability)
        graph.prefix = f"{BLOCK}{index}."
        if decision is None:
            x, _ = graph.traced(block, (x, example))
        else:
            x = _switched(graph, block, x, example, decision)
        example = block(example)
    graph.prefix = ""
    logits, example = graph.traced(
        lambda x: network.classifier(x.mean(dim=(2, 3), keepdim=True).flatten(1)), (x, example)
    )
    outputs = {LOGITS: (logits, example.shape[1])}
    if probabilities:
        columns = graph.add("Concat", *probabilities, axis=1)
        outputs[PROBABILITIES] = (columns, len(probabilities))
        outputs[DECISIONS] = (graph.add("Cast", _passes(graph, columns), to=TensorProto.FLOAT), len(probabilities))
    for output, (name, _) in outputs.items():
        graph.nodes.append(helper.make_node("Identity", [name], [output], name=output))
    graph.keep(outputs)
    body = helper.make_graph(
        graph.nodes,
        "switched_resnet",
        [helper.make_tensor_value_info(IMAGES, TensorProto.UINT8, ["N", 3, *height_width(image_size)])],
        [helper.make_tensor_value_info(o, TensorProto.FLOAT, ["N", n]) for o, (_, n) in outputs.items()],
        graph.initializers,
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def _constant_column(graph: Graph, value: float) -> str:
    """Name of [N, 1] in float32, the same value for every image."""
    shape = graph.add("Concat", graph.batch(), graph.constant([1], np.int64), axis=0)
    return graph.add("ConstantOfShape", shape, value=helper.make_tensor("value", TensorProto.FLOAT, [1], [value]))


def _passes(graph: Graph, probability: str) -> str:
    """Name of a bool for each probability: whether the block runs on the image, as ``models.decisions`` decides."""
    return graph.add("Greater", probability, graph.constant(0.5, np.float32))


def _switched(graph: Graph, block: BasicBlock, x: str, example: Tensor, decision: str) -> str:
    """The block on the images whose decision, [N] of type bool, is true; the name of the output, of all images.

    The rows with a true decision are gathered, and their residual is added to them.  Without such rows the convolutions
    end at once.  An ``If`` around them would cost what it saves, and ONNX Runtime's quantisation does not enter
    branches.
    """
    carried, _ = graph.traced(block.carried, (x, example))
    passing = graph.add("Transpose", graph.add("NonZero", decision), perm=[1, 0])
    residual, _ = graph.traced(block.residual, (graph.add("GatherND", x, passing), example))
    return graph.add("Relu", graph.add("ScatterND", carried, passing, residual, reduction="add"))
