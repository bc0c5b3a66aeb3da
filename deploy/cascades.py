"""The ONNX graph of a cascade, from the graphs of its members: each runs on the images that reach it, or not at all."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, compose, helper

from deploy.graphs import DECISIONS, IMAGES, INTS, IR_VERSION, LOGITS, OPSET, Graph

TINY = np.array(np.finfo(np.float32).tiny, np.float32)


def cascade_model(members: Sequence[onnx.ModelProto], thresholds: Sequence[float], answer: str) -> onnx.ModelProto:
    """One graph: uint8 images [N, 3, H, W] to logits [N, classes] and decisions [N, members - 1].

    Every member but the first is the branch of an ``If``, inside of the branch of the member before it.  So an image
    that the first member answers passes few operators.  A branch gathers the images that were handed on, runs the
    member on them and scatters its answers back.  It holds the member's weights and names the number of its images:
    otherwise ONNX Runtime does not fuse its convolutions, and it takes three times as long.

    Args:
        members: graphs of uint8 images to logits (``deploy.graphs``), in float32 or int8.
        thresholds, answer: see ``models.cascade.Cascade``.
    """
    graphs = [compose.add_prefix(model, f"member_{i + 1}.").graph for i, model in enumerate(members)]
    graph = Graph()
    answers, handed_on = _Members(graphs, thresholds, answer).run(graph, 0, IMAGES)
    decisions = graph.add("Unsqueeze", handed_on, INTS([1]))
    if len(thresholds) > 1:
        times = np.arange(len(thresholds), dtype=np.float32)
        decisions = graph.add("Cast", graph.add("Greater", decisions, times), to=TensorProto.FLOAT)
    outputs = {LOGITS: graph.add("Log", graph.add("Clip", answers, TINY)), DECISIONS: decisions}
    graph.nodes += [helper.make_node("Identity", [found], [name], name=name) for name, found in outputs.items()]
    classes = _logits(graphs[0]).type.tensor_type.shape.dim[1].dim_value
    widths = {LOGITS: classes, DECISIONS: len(thresholds)}
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", n]) for name, n in widths.items()]
    images = helper.make_tensor_value_info(IMAGES, TensorProto.UINT8, ["N", *_image_shape(graphs[0])])
    body = helper.make_graph(graph.nodes, "cascade", [images], infos, graph.initializers)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


@dataclass(frozen=True)
class _Members:
    graphs: Sequence[onnx.GraphProto]
    thresholds: Sequence[float]
    answer: str

    def run(self, graph: Graph, i: int, images: str, before: str = "") -> tuple[str, str]:
        """Add member ``i`` and all behind it.

        Args:
            images: name of the images that reach it, [n, 3, H, W].
            before: name of the sum of the answers of all members before it, where the mean is asked.

        Returns:
            names of the answers, [n, classes], and of how often each image is handed on from here, float [n]; empty for
            the last member, which hands nothing on.
        """
        member = self.graphs[i]
        graph.nodes.append(helper.make_node("Identity", [images], [member.input[0].name]))
        graph.nodes.extend(member.node)
        graph.initializers.extend(member.initializer)
        total = answer = graph.add("Softmax", _logits(member).name, axis=1)
        if before:
            total = graph.add("Add", before, answer)
            answer = graph.add("Div", total, np.array(i + 1, np.float32))
        if i == len(self.thresholds):
            return answer, ""
        confidence = graph.add("ReduceMax", answer, INTS([1]), keepdims=0)
        handed_on = graph.add("Less", confidence, np.array(self.thresholds[i], np.float32))
        rows = graph.add("Transpose", graph.add("NonZero", handed_on), perm=[1, 0])
        times = graph.add("Cast", handed_on, to=TensorProto.FLOAT)
        # The images handed on once more are counted inside of the branch, unless it holds the last member.
        known = [answer] if i + 1 == len(self.thresholds) else [answer, times]
        some = graph.add("Greater", graph.add("Size", rows), INTS(0))
        run = self._branch(i + 1, images, rows, total if self.answer == "mean" else "", known)
        merged = graph.add("If", some, outputs=len(known), then_branch=run, else_branch=_unchanged(i + 1, known))
        return (merged, times) if len(known) == 1 else tuple(merged)

    def _branch(self, i: int, images: str, rows: str, total: str, known: Sequence[str]) -> onnx.GraphProto:
        """Member ``i`` and all behind it on some rows of the images: ``known`` with what they find in these rows."""
        graph = Graph()
        graph.prefix = f"run_{i}."
        reached = graph.add("GatherND", images, rows)
        answer, times = self.run(graph, i, reached, graph.add("GatherND", total, rows) if total else "")
        outputs = [graph.add("ScatterND", known[0], rows, answer)]
        if times:
            outputs.append(graph.add("ScatterND", known[1], rows, times, reduction="add"))
        shape = [f"handed_on_{i}", *_image_shape(self.graphs[i])]
        sizes = [helper.make_tensor_value_info(reached, TensorProto.UINT8, shape)]
        return helper.make_graph(graph.nodes, f"run_{i}", [], _floats(outputs), graph.initializers, value_info=sizes)


def _unchanged(i: int, known: Sequence[str]) -> onnx.GraphProto:
    """The other branch, where no image reaches member ``i``."""
    graph = Graph()
    graph.prefix = f"leave_{i}."
    outputs = [graph.add("Identity", name) for name in known]
    return helper.make_graph(graph.nodes, f"leave_{i}", [], _floats(outputs))


def _floats(names: Sequence[str]) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]


def _image_shape(member: onnx.GraphProto) -> list[int]:
    return [d.dim_value for d in member.input[0].type.tensor_type.shape.dim[1:]]


def _logits(member: onnx.GraphProto) -> onnx.ValueInfoProto:
    return next(output for output in member.output if output.name.endswith(f".{LOGITS}"))
