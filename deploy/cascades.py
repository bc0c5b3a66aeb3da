"""The ONNX graph of a cascade, from the graphs of its members: each runs on the images that reach it, or not at all."""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, compose, helper, numpy_helper

from deploy.graphs import DECISIONS, IMAGES, IR_VERSION, LOGITS, OPSET, PROBABILITIES

TINY = float(np.finfo(np.float32).tiny)


def cascade_model(members: Sequence[onnx.ModelProto], thresholds: Sequence[float], answer: str) -> onnx.ModelProto:
    """One graph: uint8 images [N, 3, H, W] to logits [N, classes] and, between members, what was decided.

    A member is an ``If``: its branch gathers the images that were handed on, runs the member on them and scatters its
    answers back.  The branch holds the member's weights and names the number of its images: otherwise ONNX Runtime does
    not fuse its convolutions, and it takes three times as long.

    Args:
        members: graphs of uint8 images to logits (``deploy.graphs``), in float32 or int8.
        thresholds, answer: see ``models.cascade.Cascade``.
    """
    graph = _Graph()
    own = [compose.add_prefix(model, f"member_{i + 1}.").graph for i, model in enumerate(members)]
    graph.initializers.extend(own[0].initializer)
    graph.nodes += [*_run(own[0], IMAGES)]
    graph.add("Softmax", [_logits(own[0])], "answer_1", axis=1)
    graph.add("Identity", ["answer_1"], "total_1")
    columns = {PROBABILITIES: [], DECISIONS: []}
    for i, (member, threshold) in enumerate(zip(own[1:], thresholds, strict=True), start=1):
        doubt, handed_on = _switch(graph, i, threshold)
        rows = graph.add("Transpose", [graph.add("NonZero", [handed_on], f"found_{i}")], f"rows_{i}", perm=[1, 0])
        some = graph.add("Greater", [graph.add("Size", [rows], f"size_{i}"), graph.constant(0, np.int64)], f"some_{i}")
        run, leave = _branches(member, i, answer, graph)
        outputs = [f"answer_{i + 1}", f"total_{i + 1}"]
        graph.nodes.append(helper.make_node("If", [some], outputs, f"hand_on_{i}", then_branch=run, else_branch=leave))
        columns[PROBABILITIES].append(doubt)
        columns[DECISIONS].append(graph.add("Cast", [handed_on], f"decided_{i}", to=TensorProto.FLOAT))
    last = f"answer_{len(own)}"
    graph.add("Log", [graph.add("Clip", [last, graph.constant(TINY, np.float32)], "clipped")], LOGITS)
    for name, found in columns.items():
        axis = graph.constant([1], np.int64)
        graph.add("Concat", [graph.add("Unsqueeze", [c, axis], f"{c}_column") for c in found], name, axis=1)
    return _model(graph, own[0], len(thresholds))


def _switch(graph: "_Graph", i: int, threshold: float) -> tuple[str, str]:
    """Names of the uncertainty of the answers so far, and of whether each image is handed on."""
    axis, half = graph.constant([1], np.int64), graph.constant(0.5, np.float32)
    confidence = graph.add("ReduceMax", [f"answer_{i}", axis], f"confidence_{i}", keepdims=0)
    below = graph.add("Sub", [graph.constant(threshold, np.float32), confidence], f"below_{i}")
    doubt = graph.add("Add", [graph.add("Mul", [below, half], f"half_{i}"), half], f"doubt_{i}")
    unsure = graph.add("Greater", [doubt, half], f"unsure_{i}")
    if i == 1:
        return doubt, unsure
    before = f"handed_on_{i - 1}" if i > 2 else "unsure_1"
    reached = graph.add("Where", [before, doubt, graph.constant(0, np.float32)], f"reached_{i}")
    return reached, graph.add("And", [before, unsure], f"handed_on_{i}")


def _branches(member: onnx.GraphProto, i: int, answer: str, outer: "_Graph") -> tuple[onnx.GraphProto, onnx.GraphProto]:
    """The branches of an ``If``, with and without images handed on: answers and totals of all images."""
    run, leave, names = _Graph(), _Graph(), (f"run_{i}.answer", f"run_{i}.total")
    images = run.add("GatherND", [IMAGES, f"rows_{i}"], f"run_{i}.images")
    run.nodes += _run(member, images)
    run.initializers.extend(member.initializer)
    own = run.add("Softmax", [_logits(member)], f"run_{i}.own", axis=1)
    sum_ = run.add("Add", [run.add("GatherND", [f"total_{i}", f"rows_{i}"], f"run_{i}.before"), own], f"run_{i}.sum")
    if answer == "mean":
        own = run.add("Div", [sum_, outer.constant(i + 1, np.float32)], f"run_{i}.mean")
    run.add("ScatterND", [f"answer_{i}", f"rows_{i}", own], names[0])
    run.add("ScatterND", [f"total_{i}", f"rows_{i}", sum_], names[1])
    kept = [leave.add("Identity", [f"{what}_{i}"], f"leave_{i}.{what}") for what in ("answer", "total")]
    known = [helper.make_tensor_value_info(images, TensorProto.UINT8, [f"handed_on_{i}", *_image_shape(member)])]
    graphs = []
    for name, graph, outputs, shapes in (("run", run, names, known), ("leave", leave, kept, [])):
        infos = [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs]
        graphs.append(helper.make_graph(graph.nodes, f"{name}_{i}", [], infos, graph.initializers, value_info=shapes))
    return graphs[0], graphs[1]


def _run(member: onnx.GraphProto, images: str) -> list[NodeProto]:
    """The nodes of a member, reading ``images``."""
    return [helper.make_node("Identity", [images], [member.input[0].name]), *member.node]


def _image_shape(member: onnx.GraphProto) -> list[int]:
    return [d.dim_value for d in member.input[0].type.tensor_type.shape.dim[1:]]


def _logits(member: onnx.GraphProto) -> str:
    return next(output.name for output in member.output if output.name.endswith(f".{LOGITS}"))


class _Graph:
    """Nodes and constants in the making."""

    def __init__(self):
        self.nodes, self.initializers = [], []

    def add(self, operator: str, inputs: list[str], output: str, **attributes: object) -> str:
        """A node with one output, whose name is returned."""
        self.nodes.append(helper.make_node(operator, inputs, [output], output, **attributes))
        return output

    def constant(self, value: float | list[int], kind: type) -> str:
        name = f"constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.array(value, kind), name))
        return name


def _model(graph: _Graph, first: onnx.GraphProto, switches: int) -> onnx.ModelProto:
    classes = next(o for o in first.output if o.name == _logits(first)).type.tensor_type.shape.dim[1].dim_value
    images = helper.make_tensor_value_info(IMAGES, TensorProto.UINT8, ["N", *_image_shape(first)])
    shapes = {LOGITS: classes, PROBABILITIES: switches, DECISIONS: switches}
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", n]) for name, n in shapes.items()]
    body = helper.make_graph(graph.nodes, "cascade", [images], outputs, graph.initializers)
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_model(body, opset_imports=opsets, ir_version=IR_VERSION)
