"""The ONNX graphs of a folded network: one for batches, one for single images that skips blocks."""

from collections.abc import Callable

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor
from torch.nn import functional as F

from deploy.trace import TRACED_BATCH, Graph, named
from models import ResNet
from models.resnet import BasicBlock

SWITCH = "switch_"  # start of the names of a gate's nodes
OPSET, IR_VERSION = 18, 9  # read by ONNX Runtime 1.14 (2023) and later
IMAGES, LOGITS, PROBABILITIES, DECISIONS = "images", "logits", "probabilities", "decisions"

# Writes a block into a graph: (graph, block, name of its input, example of it, name of decisions [N, 1] of type bool,
# or None where there is no switch) -> name of its output.
BlockWriter = Callable[[Graph, BasicBlock, str, Tensor, str | None], str]


def batch_model(network: ResNet, image_size: int) -> onnx.ModelProto:
    """Any number of images; every block computed on all of them and masked by the decisions."""
    return _model(network, image_size, "N", _masked)


def routed_model(network: ResNet, image_size: int) -> onnx.ModelProto:
    """One image; each switched block in the branch of an ``If`` that is not entered where the switch is off."""
    return _model(network, image_size, 1, _branched)


@torch.no_grad()
def _model(network: ResNet, image_size: int, batch: int | str, write_block: BlockWriter) -> onnx.ModelProto:
    """The graph: uint8 images [N, 3, H, W] to logits [N, classes] and, with K switches, what they decided.

    Args:
        network: takes uint8 images, see ``deploy.folding.taking_pixels``.
    """
    graph = Graph(IMAGES)
    pixels = torch.zeros(TRACED_BATCH, 3, image_size, image_size, dtype=torch.uint8)
    x, example = graph.traced(lambda x: F.relu(network.stem(x)), (IMAGES, pixels))
    probabilities, decisions, state = [], [], None
    for index, block in enumerate(network.blocks):
        decision = None
        if index > 0 and network.gate is not None:
            graph.prefix = f"{SWITCH}{index}."
            (probability, names), (_, examples) = graph.traced(
                lambda x, state, switch=index - 1: network.gate(switch, x, state), (x, example), state
            )
            state = named(names, examples)
            probabilities.append(graph.resized("Unsqueeze", probability, 1))
            decision = graph.add("Greater", probabilities[-1], graph.constant(0.5, np.float32))
            decisions.append(decision)
        graph.prefix = f"block_{index}."
        x = write_block(graph, block, x, example, decision)
        example = block(example)
    graph.prefix = ""
    logits, example = graph.traced(lambda x: network.classifier(x.mean(dim=(2, 3))), (x, example))
    outputs = {LOGITS: (logits, example.shape[1])}
    if decisions:
        outputs[PROBABILITIES] = (graph.add("Concat", *probabilities, axis=1), len(decisions))
        taken = graph.add("Cast", graph.add("Concat", *decisions, axis=1), to=TensorProto.FLOAT)
        outputs[DECISIONS] = (taken, len(decisions))
    for output, (name, _) in outputs.items():
        graph.nodes.append(helper.make_node("Identity", [name], [output], name=output))
    graph.keep(outputs)
    body = helper.make_graph(
        graph.nodes,
        "switched_resnet",
        [helper.make_tensor_value_info(IMAGES, TensorProto.UINT8, [batch, 3, image_size, image_size])],
        [helper.make_tensor_value_info(o, TensorProto.FLOAT, [batch, n]) for o, (_, n) in outputs.items()],
        graph.initializers,
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def _plain(graph: Graph, block: BasicBlock, x: str, example: Tensor) -> str:
    return graph.traced(block, (x, example))[0]


def _masked(graph: Graph, block: BasicBlock, x: str, example: Tensor, decision: str | None) -> str:
    if decision is None:
        return _plain(graph, block, x, example)
    mask = graph.resized("Unsqueeze", graph.add("Cast", decision, to=TensorProto.FLOAT), 2, 3)
    ones = torch.ones(TRACED_BATCH, 1, 1, 1)
    masked = lambda x, z: F.relu(block.carried(x) + z * block.residual(x))  # noqa: E731
    return graph.traced(masked, (x, example), (mask, ones))[0]


def _branched(graph: Graph, block: BasicBlock, x: str, example: Tensor, decision: str | None) -> str:
    if decision is None:
        return _plain(graph, block, x, example)
    carried, carried_example = graph.traced(block.carried, (x, example))
    run, skip = (Graph(graph.images, f"{decision}.{branch}.") for branch in ("run", "skip"))
    add = lambda c, x: F.relu(c + block.residual(x))  # noqa: E731
    total, _ = run.traced(add, (carried, carried_example), (x, example))
    # The input of an identity shortcut comes out of a relu, which a second one would not change.
    passed = skip.add("Identity" if block.shortcut is None else "Relu", carried)
    branches = {
        f"{branch}_branch": helper.make_graph(
            part.nodes, part.prefix, [], [onnx.ValueInfoProto(name=output)], part.initializers
        )
        for branch, part, output in (("then", run, total), ("else", skip, passed))
    }
    return graph.add("If", decision, **branches)
