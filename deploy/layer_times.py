"""How long convolutions in a row take on the machine at hand, measured with ONNX Runtime as they are deployed."""

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from deploy.graphs import IR_VERSION, OPSET
from deploy.session import open_session
from deploy.timing import fastest
from pruning.costs import Chain
from utils import parallel
from utils.files import write_json

SECONDS = 0.01  # spent on each chain, but three runs at least


class LayerTimes:
    """Seconds that chains of convolutions take for one image, on one thread; each is measured once and then known.

    Of several processes one measures, so that all choose alike.  Their saliencies are the same, and so they ask for the
    same chains in the same order.

    Args:
        path: JSON file to keep them in, so that an interrupted run goes on with the same table; none by default.
    """

    def __init__(self, path: Path | None = None):
        self.path = path
        self.known: dict[str, float] = {}
        if path is not None:
            with suppress(OSError, ValueError):  # a table that is not there, or damaged, is measured anew
                self.known = json.loads(path.read_text())
        self.known = parallel.broadcast_object(self.known)

    def seconds(self, chain: Chain, size: int) -> float:
        """The fastest of several runs of ``chain`` on an image of ``size`` x ``size`` pixels."""
        key = f"{size}: " + ", ".join("-".join(map(str, convolution)) for convolution in chain)
        if key not in self.known:
            measured = _measured(chain, size) if parallel.is_main_process() else None
            self.known[key] = parallel.broadcast_object(measured)
        return self.known[key]

    def save(self) -> None:
        """Write the table to ``path``."""
        if self.path is not None:
            write_json(self.path, self.known)


def _measured(chain: Chain, size: int) -> float:
    session = open_session(chain_model(chain, size), threads=1)
    image = np.random.default_rng(0).standard_normal((1, chain[0].inputs, size, size), dtype=np.float32)
    return fastest(lambda: session.run(None, {"x": image}), SECONDS, least=3)


def chain_model(chain: Chain, size: int) -> onnx.ModelProto:
    """The chain with a relu behind it as an ONNX graph, "x" [1, inputs, size, size] in, "y" out; random weights."""
    generator = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for i, c in enumerate(chain):
        shape = (c.outputs, c.inputs // c.groups, c.kernel, c.kernel)
        kernel = generator.standard_normal(shape, dtype=np.float32) / np.sqrt(np.prod(shape[1:]))
        weights.append(numpy_helper.from_array(kernel.astype(np.float32), f"w{i}"))
        weights.append(numpy_helper.from_array(np.zeros(c.outputs, np.float32), f"b{i}"))
        nodes.append(
            helper.make_node(
                "Conv", [last, f"w{i}", f"b{i}"], [f"h{i}"], kernel_shape=[c.kernel] * 2, strides=[c.stride] * 2,
                pads=[c.kernel // 2] * 4, group=c.groups,
            )
        )  # fmt: skip
        last = f"h{i}"
    nodes.append(helper.make_node("Relu", [last], ["y"]))
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, chain[0].inputs, size, size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
