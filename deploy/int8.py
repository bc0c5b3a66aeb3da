"""An int8 version of an exported network: static quantisation with ONNX Runtime's own tools."""

import logging
import tempfile
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from deploy.graphs import BLOCK, DECISIONS, IMAGES, SWITCH
from deploy.session import ExportedNetwork
from utils.data.images import Images

CALIBRATION_IMAGES, CALIBRATION_BATCH = 512, 64


def calibration_pixels(train: Images) -> np.ndarray:
    """Training images to measure the ranges of activations on, drawn from all: uint8 [N, 3, H, W]."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    return train[order[:CALIBRATION_IMAGES]].pixels.numpy()


def quantised(model: onnx.ModelProto, pixels: np.ndarray) -> onnx.ModelProto:
    """Convolutions and additions in int8, weights scaled for each channel; gates and classifier stay in float32.

    So do blocks that never run on these images: the ranges of their activations are unknown.

    Weights take 7 of the 8 bits.  x86 CPUs without VNNI add two products of an activation and a weight in 16 bits,
    which hold 2 * 255 * 64 and not 2 * 255 * 127: with all 8 bits the same file would give other answers there.

    Args:
        pixels: of ``calibration_pixels``.
    """
    with tempfile.TemporaryDirectory() as folder:
        prepared, result = Path(folder, "prepared.onnx"), Path(folder, "int8.onnx")
        try:
            quant_pre_process(model, str(prepared))
        except Exception:  # its symbolic inference of shapes does not know every attention or norm
            onnx.save(onnx.shape_inference.infer_shapes(model), prepared)
        kept = tuple([SWITCH, *_unseen(model, pixels)])
        excluded = [node.name for node in onnx.load(prepared).graph.node if node.name.startswith(kept)]
        logging.disable(logging.WARNING)  # it advises the preparation above
        try:
            quantize_static(
                str(prepared), str(result), _Images(pixels),
                quant_format=QuantFormat.QDQ, op_types_to_quantize=["Conv", "Add"], nodes_to_exclude=excluded,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, per_channel=True,
                reduce_range=True,
            )  # fmt: skip
        finally:
            logging.disable(logging.NOTSET)
        return onnx.load(result)


def _unseen(model: onnx.ModelProto, pixels: np.ndarray) -> list[str]:
    """Prefixes of the node names of blocks that never run on the images."""
    decisions = ExportedNetwork(model)(pixels).get(DECISIONS, np.empty((1, 0)))
    return [f"{BLOCK}{block}." for block, runs in enumerate(decisions.any(axis=0), start=1) if not runs]


class _Images(CalibrationDataReader):
    def __init__(self, pixels: np.ndarray):
        self._batches = iter(np.split(pixels, range(CALIBRATION_BATCH, len(pixels), CALIBRATION_BATCH)))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {IMAGES: batch}
