"""The ONNX graph of a cascade, from the graphs of its members: each runs on the images that reach it, or not at all."""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, compose, helper

from deploy.graphs import DECISIONS, IMAGES, INTS, IR_VERSION, LOGITS, OPSET, PROBABILITIES, Graph

TINY, HALF, ZERO = (np.array(value, np.float32) for value in (np.finfo(np.float32).tiny, 0.5, 0))


def cascade_model(members: Sequence[onnx.ModelProto], thresholds: Sequence[float], answer: str) -> onnx.ModelProto:
    """One graph: uint8 images [N, 3, H, W] to logits [N, classes] and, between members, what was decided.

    A member is an ``If``: its branch gathers the images that were handed on, runs the member on them and scatters its
    answers back.  The branch holds the member's weights and names the number of its images: otherwise ONNX Runtime does
    not fuse its convolutions, and it takes three times as long.

    Args:
        members: graphs of uint8 images to logits (``deploy.graphs``), in float32 or int8.
        thresholds, answer: see ``models.cascade.Cascade``.
    """
    graph = Graph()
    first, *others = [compose.add_prefix(model, f"member_{i + 1}.").graph for i, model in enumerate(members)]
    graph.initializers.extend(first.initializer)
    graph.nodes += _run(first, IMAGES)
    so_far = [graph.add("Softmax", _logits(first).name, axis=1)] * 2  # the answers, and the sums of all that ran
    columns, before = {PROBABILITIES: [], DECISIONS: []}, None
    for i, (member, threshold) in enumerate(zip(others, thresholds, strict=True), start=1):
        confidence = graph.add("ReduceMax", so_far[0], INTS([1]), keepdims=0)
        below = graph.add("Sub", np.array(threshold, np.float32), confidence)
        doubt = graph.add("Add", graph.add("Mul", below, HALF), HALF)
        handed_on = graph.add("Greater", doubt, HALF)
        if before is not None:
            doubt, handed_on = graph.add("Where", before, doubt, ZERO), graph.add("And", before, handed_on)
        before = handed_on
        rows = graph.add("Transpose", graph.add("NonZero", handed_on), perm=[1, 0])
        some = graph.add("Greater", graph.add("Size", rows), INTS(0))
        run, leave = _run_branch(member, i, answer, rows, *so_far), _leave_branch(i, so_far)
        so_far = graph.add("If", some, outputs=2, then_branch=run, else_branch=leave)
        columns[PROBABILITIES].append(doubt)
        columns[DECISIONS].append(graph.add("Cast", handed_on, to=TensorProto.FLOAT))
    outputs = {LOGITS: graph.add("Log", graph.add("Clip", so_far[0], TINY))}
    for name, found in columns.items():
        outputs[name] = graph.add("Concat", *(graph.add("Unsqueeze", c, INTS([1])) for c in found), axis=1)
    graph.nodes += [helper.make_node("Identity", [found], [name], name=name) for name, found in outputs.items()]
    classes = _logits(first).type.tensor_type.shape.dim[1].dim_value
    widths = {LOGITS: classes, PROBABILITIES: len(others), DECISIONS: len(others)}
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", n]) for name, n in widths.items()]
    images = helper.make_tensor_value_info(IMAGES, TensorProto.UINT8, ["N", *_image_shape(first)])
    body = helper.make_graph(graph.nodes, "cascade", [images], infos, graph.initializers)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def _run_branch(member: onnx.GraphProto, i: int, answer: str, rows: str, answers: str, totals: str) -> onnx.GraphProto:
    """The branch of an ``If`` with images handed on: answers and totals of all images."""
    graph = Graph()
    graph.prefix = f"run_{i}."
    images = graph.add("GatherND", IMAGES, rows)
    graph.nodes += _run(member, images)
    graph.initializers.extend(member.initializer)
    own = graph.add("Softmax", _logits(member).name, axis=1)
    total = graph.add("Add", graph.add("GatherND", totals, rows), own)
    if answer == "mean":
        own = graph.add("Div", total, np.array(i + 1, np.float32))
    outputs = [graph.add("ScatterND", before, rows, new) for before, new in ((answers, own), (totals, total))]
    known = [helper.make_tensor_value_info(images, TensorProto.UINT8, [f"handed_on_{i}", *_image_shape(member)])]
    return helper.make_graph(graph.nodes, f"run_{i}", [], _floats(outputs), graph.initializers, value_info=known)


def _leave_branch(i: int, so_far: Sequence[str]) -> onnx.GraphProto:
    """The same without images handed on."""
    graph = Graph()
    graph.prefix = f"leave_{i}."
    outputs = [graph.add("Identity", name) for name in so_far]
    return helper.make_graph(graph.nodes, f"leave_{i}", [], _floats(outputs))


def _floats(names: Sequence[str]) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]


def _run(member: onnx.GraphProto, images: str) -> list[NodeProto]:
    """The nodes of a member, reading ``images``."""
    return [helper.make_node("Identity", [images], [member.input[0].name]), *member.node]


def _image_shape(member: onnx.GraphProto) -> list[int]:
    return [d.dim_value for d in member.input[0].type.tensor_type.shape.dim[1:]]


def _logits(member: onnx.GraphProto) -> onnx.ValueInfoProto:
    return next(output for output in member.output if output.name.endswith(f".{LOGITS}"))
