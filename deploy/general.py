"""Any network as an ONNX graph: ``torch.onnx.export`` behind the normalisation, checked against PyTorch.

The graphs of the switched ResNet, which gather the images that a block runs on, are those of ``deploy.graphs``.
"""

import io
import warnings
from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from deploy.aligned import aligned, vector_channels
from deploy.graphs import IMAGES, LOGITS, OPSET
from deploy.session import RUN_ERRORS, TOLERANCE, open_session, run_session
from models import picked_logits
from utils.data.augment import Normalisation
from utils.errors import UserError
from utils.modes import copied, evaluation_mode, plain_attention

TRACED_BATCH = 2
MASK = 1e4  # a logit above this, and this many times the median of all, is no score
CHECKED_BATCHES = (1, 3, 1)  # differ from the tracing run, so that a graph with a fixed batch size is detected


def general_model(
    network: nn.Module, normalisation: Normalisation, height: int, width: int
) -> tuple[onnx.ModelProto, float]:
    """The graph of a network in evaluation mode: uint8 images [N, 3, height, width] to logits [N, classes].

    Args:
        network: of normalised images [N, 3, height, width] to logits, or to an object or dictionary with ``logits``;
            left as it was, on any device.

    Returns:
        the graph, and the largest deviation of its logits from PyTorch's on random images, as a share of the largest.

    Raises:
        UserError: if the network does not run on such images, cannot be translated, or the graph deviates by more than
            ``TOLERANCE``.
    """
    if next(network.parameters(), torch.empty(0)).device.type != "cpu":
        network = copied(network).cpu()
    whole = _Normalised(aligned(network, vector_channels()), normalisation)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (sum(CHECKED_BATCHES), 3, height, width), generator=generator, dtype=torch.uint8)
    dark, several, bright = noise.split(CHECKED_BATCHES)
    batches = [dark // 4, several, 192 + bright // 4]  # a branch that depends on brightness shows
    with torch.no_grad(), evaluation_mode(whole), plain_attention():
        try:
            outputs = [whole.network(normalisation.apply(batch)) for batch in batches]
        except Exception as error:
            raise UserError(f"the network cannot run on {height}x{width} images: {_reason(error)}") from None
        try:
            expected = torch.cat([picked_logits(output) for output in outputs])
        except ValueError as error:
            raise UserError(f"{error}: wrap it in a module that returns the scores") from None
        try:
            model = _translated(whole, noise[:TRACED_BATCH])
        except Exception as error:
            raise UserError(f"torch.onnx.export cannot translate the network: {_reason(error)}") from None
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = expected.shape[1]  # also where it was not known
    onnx.checker.check_model(model, full_check=True)
    session = open_session(model)
    try:
        found = torch.cat([torch.from_numpy(run_session(session, batch.numpy())[LOGITS]) for batch in batches])
        if found.shape != expected.shape:
            raise ValueError(f"its scores are {list(found.shape)}, not {list(expected.shape)}")
    except (*RUN_ERRORS, RuntimeError, ValueError) as error:
        raise UserError(
            f"the exported graph does not run on other numbers of images than {TRACED_BATCH} ({_reason(error)}): in "
            f"the network's forward pass, use x.shape[0] instead of len(x) or int(), and no loop over images"
        ) from error
    deviation = deviation_of(found, expected)
    if not deviation <= TOLERANCE:
        raise UserError(
            f"the exported graph deviates from the network by {deviation:.2g}, more than {TOLERANCE:g}: look for "
            "branches in its forward pass that depend on the images, which an exported graph cannot take"
        )
    return model, deviation


def deviation_of(found: Tensor, expected: Tensor) -> float:
    """The largest difference of logits, as a share of the largest logit; of those that mask a class, of its own size.

    Masks are far larger than the rest, such as -1e9, and would hide every difference.
    """
    size = expected.abs()
    masks = (size > MASK * size.median()) & (size > MASK)
    rest = size[~masks].max().clamp(min=torch.finfo(expected.dtype).tiny)  # all zero in a network never trained, say
    shares = torch.where(found == expected, 0.0, (found - expected).abs() / torch.where(masks, size, rest))
    return shares.max().item()


class _Normalised(nn.Module):
    def __init__(self, network: nn.Module, normalisation: Normalisation):
        super().__init__()
        self.network, self.normalisation = network, normalisation

    def forward(self, pixels: Tensor) -> Tensor:
        return picked_logits(self.network(self.normalisation.apply(pixels)))


class _Translatable(TorchFunctionMode):
    """Functions that ONNX lacks, or that would slow the graph down.

    ONNX has no adaptive pooling to sizes that do not divide the input's, as in VGG on small images.  Shortcuts without
    parameters, as in ``examples.cifar_resnet``, take every second pixel and add channels of zeros.  ONNX Runtime has
    no blocked layout for either, and then adds no shortcut of this group of blocks within a convolution.  As a pooling
    and a convolution they stay in that layout.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        own = {F.adaptive_avg_pool2d: _adaptive_pool, F.pad: _pad, Tensor.__getitem__: _selected}
        return own.get(function, function)(*args, **(kwargs or {}))


def _pad(input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    """``F.pad``; channels of zeros come from a 1x1 convolution."""
    if not any(pad):
        return input.clone()
    only_channels = input.dim() == 4 and len(pad) == 6 and not any(pad[:4]) and min(pad) >= 0
    if not only_channels or not input.is_floating_point() or mode != "constant" or value:
        return F.pad(input, pad, mode, value)
    before, channels, after = int(pad[4]), int(input.shape[1]), int(pad[5])
    # Made by NumPy: the graph then holds the numbers, not how they are made.
    copies = np.eye(before + channels + after, channels, -before, dtype=np.float32)
    return F.conv2d(input, torch.from_numpy(copies[:, :, None, None]).to(input.dtype))


def _selected(x: Tensor, index: Any) -> Tensor:
    """``x[index]``; every n-th row and column of images [N, C, H, W] comes from a pooling of single pixels."""
    if not x.is_floating_point() or x.dim() != 4 or not isinstance(index, tuple) or len(index) != 4:
        return x[index]
    steps = [of.step or 1 if isinstance(of, slice) else 0 for of in index]
    if steps[:2] != [1, 1] or min(steps) < 1 or any(of != slice(None, None, of.step) for of in index):
        return x[index]
    return F.max_pool2d(x, 1, steps[2:]) if max(steps) > 1 else x


def _adaptive_pool(x: Tensor, output_size: int | tuple[int | None, int | None]) -> Tensor:
    inputs = [int(n) for n in x.shape[-2:]]
    pair = [output_size] * 2 if isinstance(output_size, int) else output_size
    sizes = [n if size is None else size for n, size in zip(inputs, pair, strict=True)]
    if all(n % size == 0 for n, size in zip(inputs, sizes, strict=True)):
        return F.adaptive_avg_pool2d(x, sizes)
    rows, columns = (_averages(n, size).to(x) for n, size in zip(inputs, sizes, strict=True))
    return rows @ x @ columns.T


def _averages(inputs: int, outputs: int) -> Tensor:
    """[outputs, inputs]: each row averages the inputs from floor(i n / m) to ceil((i + 1) n / m), as PyTorch does."""
    matrix = torch.zeros(outputs, inputs)
    for i in range(outputs):
        first, last = i * inputs // outputs, -(-(i + 1) * inputs // outputs)
        matrix[i, first:last] = 1 / (last - first)
    return matrix


def _translated(network: nn.Module, pixels: Tensor) -> onnx.ModelProto:
    # The exporter of TorchScript needs no further package and is in every PyTorch from 2.6 to 2.11.  It warns that
    # another is newer, and prints pages of what it could not translate.
    content = io.BytesIO()
    silent = mock.patch.object(torch._C, "_jit_onnx_log", create=True)
    with warnings.catch_warnings(), silent, _Translatable():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, (pixels,), content, dynamo=False, opset_version=OPSET, input_names=[IMAGES],
            output_names=[LOGITS], dynamic_axes={IMAGES: {0: "N"}, LOGITS: {0: "N"}},
        )  # fmt: skip
    return onnx.load_from_string(content.getvalue())


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
