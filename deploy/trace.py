"""A piece of a network as ONNX nodes: traced to a list of operators, each translated by one entry of a table.

``torch.onnx.export`` takes seconds for each graph, and cannot gather images before a piece and scatter them after it.
This covers the operators of the network and its gates.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from utils.errors import UserError

# The batch size of the tracing run.  A shape that starts with it means "as many as there are images".
TRACED_BATCH = 5


class Graph:
    """An ONNX graph that is being written: nodes and the weights they read.

    Args:
        images: name of the graph input whose first axis counts the images.

    ``prefix`` starts the names of nodes that are added later; it may be changed at any time.
    """

    def __init__(self, images: str):
        self.images = images
        self.prefix = ""
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._resized: dict[tuple, str] = {}

    def name(self, kind: str) -> str:
        return f"{self.prefix}{kind}_{len(self.nodes) + len(self.initializers)}"

    def add(self, operator_type: str, *inputs: str | Tensor, outputs: int = 1, **attributes: Any) -> Any:
        """Append a node, storing those of its inputs that are tensors; the name of its output, or names of several."""
        inputs = [self.constant(value) if isinstance(value, Tensor) else value for value in inputs]
        name = self.name(operator_type)
        names = [name] if outputs == 1 else [f"{name}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(operator_type, inputs, names, name=name, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, value: Any, dtype: Any = None) -> str:
        """Store an array; its name."""
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value, dtype)
        name = self.name("constant")
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def resized(self, operator_type: str, x: str, *axes: int) -> str:
        """Squeeze or unsqueeze; undoing the other adds no node (each takes about as long as a small layer)."""
        opposite = "Unsqueeze" if operator_type == "Squeeze" else "Squeeze"
        if (opposite, axes, x) in self._resized:
            return self._resized[opposite, axes, x]
        output = self.add(operator_type, x, self.constant(axes, np.int64))
        self._resized[operator_type, axes, output] = x
        return output

    def batch(self) -> str:
        """Name of the number of images, int64 [1]."""
        return self.add("Shape", self.images, start=0, end=1)

    def traced(self, function: Callable, *arguments: tuple[str, Tensor] | Any) -> tuple[Any, Any]:
        """Append what ``function`` computes.

        Args:
            function: of tensors [TRACED_BATCH, ...]; the weights that it closes over are stored.
            arguments: pytrees whose leaves are (name in the graph, tensor of the tracing run) or None.

        Returns:
            the names of its outputs and the outputs of the tracing run, in the structure of its result.

        Raises:
            UserError: for an operator that has no translation.
        """
        leaves, structure = pytree.tree_flatten(arguments, is_leaf=_is_named)
        examples = [leaf[1] for leaf in leaves if leaf is not None]

        def flat(*tensors: Tensor) -> list[Tensor]:
            nonlocal result_structure
            values = iter(tensors)
            filled = [None if leaf is None else next(values) for leaf in leaves]
            result = function(*pytree.tree_unflatten(filled, structure))
            outputs, result_structure = pytree.tree_flatten(result)
            return outputs

        result_structure = None
        with torch.no_grad():
            program = make_fx(flat, pre_dispatch=True)(*examples)
            outputs = program(*examples)
        known: dict[fx.Node, Any] = {}
        names = iter([leaf[0] for leaf in leaves if leaf is not None])
        for node in program.graph.nodes:
            if node.op == "placeholder":
                known[node] = next(names)
            elif node.op == "get_attr":
                known[node] = getattr(program, node.target).detach()
            elif node.op == "call_function":
                known[node] = self._translate(node, known)
            else:
                names_out = [output and known[output] for output in node.args[0]]
        return tuple(pytree.tree_unflatten(values, result_structure) for values in (names_out, outputs))

    def keep(self, outputs: Iterable[str]) -> None:
        """Drop the nodes and weights that none of ``outputs`` needs."""
        needed, kept = set(outputs), []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                kept.append(node)
                needed.update(node.input)
        self.nodes = kept[::-1]
        self.initializers = [tensor for tensor in self.initializers if tensor.name in needed]

    def _translate(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        translation = TRANSLATIONS.get(_operator_name(node.target))
        if translation is None:
            raise UserError(f"the network uses {node.target}, which the export cannot translate: add it to {__file__}")
        arguments, options = fx.node.map_arg((node.args, node.kwargs), lambda n: known.get(n))
        return translation(self, *arguments, **options)


def named(names: Any, examples: Any) -> Any:
    """A pytree of names and one of tensors as one of pairs, the form that ``Graph.traced`` takes."""
    return pytree.tree_map(lambda name, example: None if name is None else (name, example), names, examples)


def _is_named(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str)


def _operator_name(target: Any) -> str:
    return target._schema.name.removeprefix("aten::") if isinstance(target, torch._ops.OpOverload) else target.__name__


def _convolution(graph, x, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1) -> str:
    inputs = [x, weight] if bias is None else [x, weight, bias]
    return graph.add(
        "Conv", *inputs, strides=_pair(stride), pads=_pair(padding) * 2, dilations=_pair(dilation), group=groups
    )


def _linear(graph, x, weight, bias=None) -> str:
    return graph.add("Gemm", *([x, weight] if bias is None else [x, weight, bias]), transB=1)


def _batch_norm(graph, x, weight, bias, mean, variance, training, momentum, eps, *_) -> str:
    return graph.add("BatchNormalization", x, weight, bias, mean, variance, epsilon=eps)


def _max_pool(graph, x, kernel, stride=(), padding=(0, 0), dilation=(1, 1), ceil_mode=False) -> str:
    return graph.add(
        "MaxPool", x, kernel_shape=_pair(kernel), strides=_pair(stride or kernel), pads=_pair(padding) * 2,
        dilations=_pair(dilation), ceil_mode=int(ceil_mode),
    )  # fmt: skip


def _average_pool(
    graph, x, kernel, stride=(), padding=(0, 0), ceil_mode=False, count_padding=True, divisor=None
) -> str:
    if divisor is not None:
        raise UserError("the network uses avg_pool2d with a divisor, which ONNX does not have: use its mean")
    return graph.add(
        "AveragePool", x, kernel_shape=_pair(kernel), strides=_pair(stride or kernel), pads=_pair(padding) * 2,
        ceil_mode=int(ceil_mode), count_include_pad=int(count_padding),
    )  # fmt: skip


def _adaptive_pool(graph, x, size) -> str:
    if _pair(size) != [1, 1]:
        raise UserError(f"the network pools to {size} positions, which ONNX does not have: pool to 1")
    return graph.add("GlobalAveragePool", x)


def _mean(graph, x, axes, keepdim=False, **_) -> str:
    if keepdim and sorted(axis % 4 for axis in axes) == [2, 3]:  # after a convolution this keeps its memory layout
        return graph.add("GlobalAveragePool", x)
    return graph.add("ReduceMean", x, graph.constant(axes, np.int64), keepdims=int(keepdim))


def _reshape(graph, x, shape) -> str:
    return graph.add("Reshape", x, graph.constant([0 if n == TRACED_BATCH else n for n in shape[:1]] + shape[1:]))


def _flatten(graph, x, start=0, end=-1) -> str:
    if (start, end) == (1, -1):
        return graph.add("Flatten", x, axis=1)
    if (start, end) == (0, -1):
        return graph.add("Reshape", x, graph.constant([-1], np.int64))
    raise UserError(f"the network flattens axes {start} to {end}, which the export cannot translate: flatten from 1")


def _squeeze(graph, x, axis) -> str:
    return graph.resized("Squeeze", x, axis)


def _unsqueeze(graph, x, axis) -> str:
    return graph.resized("Unsqueeze", x, axis)


def _zeros(graph, shape, dtype=torch.float32, **_) -> str:
    sizes = [
        graph.batch() if i == 0 and n == TRACED_BATCH else graph.constant([n], np.int64) for i, n in enumerate(shape)
    ]
    value = helper.make_tensor("value", _onnx_type(dtype), [1], [0])
    return graph.add("ConstantOfShape", graph.add("Concat", *sizes, axis=0), value=value)


def _lstm_cell(graph, x, state, weight_ih, weight_hh, bias_ih, bias_hh) -> list[str]:
    """One step of ONNX's LSTM over sequences of length 1; PyTorch orders the gates i, f, c, o, ONNX i, o, f, c."""
    hidden = weight_hh.shape[1]
    order = torch.cat([torch.arange(gate * hidden, (gate + 1) * hidden) for gate in (0, 3, 1, 2)])
    weights = [weight[order][None] for weight in (weight_ih, weight_hh)]
    bias = torch.cat([bias_ih[order], bias_hh[order]])[None]
    sequence, h, c = (graph.resized("Unsqueeze", name, 0) for name in (x, *state))
    _, h, c = graph.add("LSTM", sequence, *weights, bias, "", h, c, outputs=3, hidden_size=hidden)
    return [graph.resized("Squeeze", name, 0) for name in (h, c)]


def _cast(graph, x, dtype, *_, **__) -> str:
    return graph.add("Cast", x, to=_onnx_type(dtype))


def _elementwise(operator_type: str) -> Callable:
    def translate(graph, *operands, **_) -> str:
        return graph.add(
            operator_type, *(graph.constant(o, np.float32) if isinstance(o, int | float) else o for o in operands)
        )

    return translate


def _unchanged(graph, x=None, *_, **__) -> Any:
    return x


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value) * (2 // len(value))


def _onnx_type(dtype: torch.dtype) -> int:
    return helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=dtype).numpy().dtype)


TRANSLATIONS: dict[str, Callable] = {
    "conv2d": _convolution,
    "linear": _linear,
    "batch_norm": _batch_norm,
    "max_pool2d": _max_pool,
    "avg_pool2d": _average_pool,
    "adaptive_avg_pool2d": _adaptive_pool,
    "mean": _mean,
    "lstm_cell": _lstm_cell,
    "view": _reshape,
    "reshape": _reshape,
    "flatten": _flatten,
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    "zeros": _zeros,
    "to": _cast,
    "getitem": lambda graph, values, index: values[index],
    **{name: _elementwise(name.capitalize()) for name in ("add", "sub", "mul", "div", "relu", "sigmoid", "tanh")},
    # No-ops: they act through the recorded dtypes, or not at all in evaluation mode.
    **dict.fromkeys(("_enter_autocast", "_exit_autocast", "dropout", "detach", "contiguous"), _unchanged),
}
