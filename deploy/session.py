"""ONNX Runtime sessions, and the check of an exported graph against the network it came from."""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import (
    Fail,
    InvalidArgument,
    InvalidGraph,
    InvalidProtobuf,
    NoSuchFile,
    RuntimeException,
)
from torch import Tensor

from deploy.graphs import DECISIONS, IMAGES, LOGITS
from models import ResNet, RoutedOutput
from utils.data.augment import Normalisation
from utils.errors import UserError

TOLERANCE = 1e-4
RUN_ERRORS = (Fail, InvalidArgument, RuntimeException)  # of a graph that does not fit its inputs
# Features of more images do not fit into the cache, and gathering and scattering become slow: docs/notebook.md.
AT_ONCE = 16
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def open_session(model: onnx.ModelProto | Path, device: str = "cpu", threads: int = 0) -> onnxruntime.InferenceSession:
    """A session on ``device`` ("cpu" or "cuda"); ``threads`` 0 means ONNX Runtime's choice.

    Raises:
        UserError: if the file is missing or no ONNX model.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Spinning threads of an idle session would take the cores from other work.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 4  # errors are raised, too
    source, name = (str(model), model) if isinstance(model, Path) else (model.SerializeToString(), "the graph")
    try:
        return onnxruntime.InferenceSession(source, options, providers=[PROVIDERS[device]])
    except NoSuchFile:
        raise UserError(f"{name} does not exist: make it with python -m deploy.export") from None
    except (Fail, InvalidArgument, InvalidGraph, InvalidProtobuf) as error:
        reason = str(error).strip().split("\n")[0][:120]
        raise UserError(f"{name} cannot be read ({reason}): export it again with python -m deploy.export") from None


def run_session(session: onnxruntime.InferenceSession, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """The outputs by name for uint8 images [N, 3, H, W]."""
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {IMAGES: pixels}), strict=True))


class ExportedNetwork:
    """An exported network, run the fastest way: single images on all threads, batches in parts with one thread each.

    On the CPU a part holds at most ``AT_ONCE`` images.  Separate parts keep all threads busy; with a single part they
    would wait for each other at small operators (gates, gathered rows).

    Args:
        model: graph, or file.
        device: "cpu" or "cuda", on which batches are computed whole.
        threads: CPU threads, 0 for one per core.

    Raises:
        UserError: if the file is missing or no ONNX model.
    """

    def __init__(self, model: onnx.ModelProto | Path, device: str = "cpu", threads: int = 0):
        self.model, self.device = model, device
        self.threads = threads or _cores()
        self.session = open_session(model, device, threads)

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs by name for uint8 images [N, 3, H, W].

        Raises:
            ValueError: if there is no image: ONNX Runtime would end the program.
        """
        if len(pixels) == 0:
            raise ValueError("an exported network was given no images: it takes one or more")
        if len(pixels) == 1 or self.device != "cpu":
            return run_session(self.session, pixels)
        step = min(AT_ONCE, math.ceil(len(pixels) / self.threads))
        parts = [pixels[i : i + step] for i in range(0, len(pixels), step)]
        run = self._workers.map if self.threads > 1 else map
        outputs = list(run(lambda part: run_session(self._part_session, part), parts))
        return {name: np.concatenate([output[name] for output in outputs]) for name in outputs[0]}

    @property
    def decides(self) -> bool:
        """Whether the network spends more on some images than on others."""
        return any(output.name == DECISIONS for output in self.session.get_outputs())

    @cached_property
    def _part_session(self) -> onnxruntime.InferenceSession:
        return self.session if self.threads == 1 else open_session(self.model, self.device, threads=1)

    @cached_property
    def _workers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.threads)


def _cores() -> int:
    """Cores that this process may use, or those of the machine if the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@torch.no_grad()
def check_exported(
    exported: ExportedNetwork, network: ResNet, normalisation: Normalisation, pixels: Tensor, name: str
) -> float:
    """The largest deviation of the logits from those of ``network``, relative where logits exceed 1.

    Images on which a switch is undecided (its probability within the tolerance of one half) are left out: there the
    last bit of a sum decides whether a block runs.

    Args:
        network: the original, before folding.
        pixels: uint8 [N, 3, H, W].

    Raises:
        UserError: if a logit deviates by more than ``TOLERANCE``, a decision differs, or no image is left.
    """
    parts = pixels.split(AT_ONCE)  # all at once, large images would fill the memory
    expected = RoutedOutput(*map(torch.cat, zip(*(network(normalisation.apply(part)) for part in parts), strict=True)))
    decided = ((expected.probabilities - 0.5).abs() > TOLERANCE).all(dim=1)
    if not decided.any():
        raise UserError(
            f"{name} cannot be checked, because a switch is too close to its threshold on every image: add --data_dir"
        )
    outputs = {name: torch.from_numpy(values)[decided] for name, values in exported(pixels.numpy()).items()}
    logits = expected.logits[decided]
    shares = (outputs[LOGITS] - logits).abs() / logits.abs().clamp(min=1)
    deviation = torch.where(outputs[LOGITS] == logits, 0.0, shares).max().item()  # infinities may mask a class
    found = outputs.get(DECISIONS, expected.decisions[decided, :0])
    same = torch.equal(found, expected.decisions[decided, : found.shape[1]])  # those between members of a cascade first
    if not same or not deviation <= TOLERANCE:
        differently = "" if same else " and its switches decide differently"
        raise UserError(
            f"{name} deviates from the network by {deviation:.2g}{differently}, more than {TOLERANCE:g}: nothing was "
            "written; report it with the versions of torch and onnxruntime"
        )
    return deviation
