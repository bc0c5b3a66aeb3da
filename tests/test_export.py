"""Exported files against PyTorch: every logit within 1e-4, every decision equal, for stages, gates and batch sizes."""

import json
import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from commands import call
from networks import NORMALISATION, STAGES, checkpoint_file, lively_network, varied_images
from onnx import numpy_helper
from torch import nn

from deploy import export
from deploy.folding import folded
from deploy.graphs import onnx_model
from deploy.int8 import quantised
from deploy.labels import INT8, LABELS, NETWORK
from deploy.session import AT_ONCE, TOLERANCE, ExportedNetwork, check_exported, open_session, run_session
from models import GATES
from utils.errors import UserError

SWITCHED = [gate for gate in GATES if gate != "none"]


def check_outputs(network, pixels, batches):
    """The exported network's outputs, batch by batch, against PyTorch's on the images that no switch is in doubt about.

    Returns PyTorch's decisions on those of the last batch.
    """
    with torch.no_grad():
        expected = network(NORMALISATION.apply(pixels))
    model = onnx_model(folded(network), NORMALISATION, pixels.shape[-1])
    onnx.checker.check_model(model, full_check=True)
    session = open_session(model, threads=1)
    sure = ((expected.probabilities - 0.5).abs() > TOLERANCE).all(dim=1).numpy()
    assert (~sure).sum() <= 2
    for batch in batches:
        outputs = run_session(session, pixels[:batch].numpy())
        assert all(len(value) == batch for value in outputs.values())
        found = {name: value[sure[:batch]] for name, value in outputs.items()}
        logits, probabilities, decisions = (value[:batch].numpy()[sure[:batch]] for value in expected)
        np.testing.assert_allclose(found["logits"], logits, rtol=1e-4, atol=1e-4)
        if network.switches:
            np.testing.assert_array_equal(found["decisions"], decisions)
            np.testing.assert_allclose(found["probabilities"], probabilities, rtol=1e-4, atol=1e-5)
    return decisions


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("stage", STAGES)
def test_exported_graph_agrees_with_pytorch_in_any_batch(stage, gate):
    network = lively_network(stage, gate)
    batches = range(1, 258) if stage == "rl_pruned" else (1, 2, 3, 5, 8, 31, 32, 33, 127, 128, 256, 257)
    decisions = check_outputs(network, varied_images(257), batches)
    if stage == "rl_pruned" and network.switches:
        shares = decisions.mean(axis=0)
        assert ((shares > 0.1) & (shares < 0.9)).any(), "the test needs images that take different ways"


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 3, AT_ONCE, AT_ONCE + 1, 5 * AT_ONCE])
def test_parts_of_a_batch_give_what_the_batch_gives(batch, threads):
    model = onnx_model(folded(lively_network("rl_pruned", "rnn")), NORMALISATION, 16)
    pixels = varied_images(5 * AT_ONCE)[:batch].numpy()
    expected = run_session(open_session(model, threads=1), pixels)
    outputs = ExportedNetwork(model, threads=threads)(pixels)
    assert outputs.keys() == expected.keys()
    for name, values in outputs.items():
        assert values.shape == expected[name].shape
        np.testing.assert_allclose(values, expected[name], rtol=1e-5, atol=1e-5)


def test_no_images_are_refused_before_onnx_runtime_sees_them():
    exported = ExportedNetwork(onnx_model(folded(lively_network("rl_pruned", "rnn")), NORMALISATION, 16), threads=1)
    with pytest.raises(ValueError, match="no images"):
        exported(varied_images(1)[:0].numpy())


@pytest.mark.parametrize("gate", SWITCHED)
@pytest.mark.parametrize("bias", [-1e3, 1e3])
def test_all_images_may_skip_or_take_every_block(gate, bias):
    network = lively_network("rl_pruned", gate)
    for layer in network.gate.last_layers:
        nn.init.constant_(layer.bias, bias)
    assert (check_outputs(network, varied_images(33), (1, 33)) == (bias > 0)).all()


def test_check_refuses_a_graph_of_another_network():
    network, other = lively_network("sp", "rnn"), lively_network("sp", "rnn", seed=1)
    exported = ExportedNetwork(onnx_model(folded(other), NORMALISATION, 16), threads=1)
    with pytest.raises(UserError, match="deviates"):
        check_exported(exported, network, NORMALISATION, varied_images(8), NETWORK)


@pytest.mark.parametrize("gate", SWITCHED)
def test_blocks_see_only_the_images_that_take_them(gate, tmp_path):
    network, pixels = folded(lively_network("rl_pruned", gate)), varied_images(64)
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "run")
    model = onnx_model(network, NORMALISATION, 16).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    decisions = run_session(session, pixels.numpy())["decisions"]
    events = json.loads(Path(session.end_profiling()).read_text())
    rows = {}
    for event in events:
        if event.get("cat") == "Node" and event["args"]["op_name"] == "GatherND":
            (shape,) = event["args"]["output_type_shape"][0].values()
            rows[int(event["name"].removeprefix("block_").split(".")[0])] = shape[0]
    assert rows == {block: int(taken) for block, taken in enumerate(decisions.sum(axis=0), start=1)}
    assert any(0 < taken < 64 for taken in rows.values())


def test_command_writes_a_folder(tmp_path):
    checkpoint = checkpoint_file(tmp_path / "best.pt", lively_network("rl_pruned", "rnn"))
    call(export, "--checkpoint", checkpoint, "--output", tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {NETWORK, LABELS}
    labels = json.loads((tmp_path / "out" / LABELS).read_text())
    assert labels["classes"] == list("abcdefghij") and labels["image_size"] == 16
    blocks = labels["flops_of_switched_blocks"]
    assert len(blocks) == 2 and 0 < sum(blocks) < labels["flops"]
    assert all(file["deviation"] <= TOLERANCE for file in labels["files"].values())


@pytest.mark.parametrize("killed_at", [0, 1, None])
def test_a_folder_with_labels_holds_a_whole_export(killed_at, tmp_path, monkeypatch):
    """Over an older export with more files, and killed before any of the new ones."""

    def made(name: str, *files: str) -> tuple[dict, dict]:
        return {file: onnx.ModelProto(producer_name=name) for file in files}, {"name": name}

    def replaced(old: Path, new: Path) -> None:
        if len(names) == killed_at:
            raise KeyboardInterrupt
        names.append(new.name)
        rename(old, new)

    export.write_folder(tmp_path, *made("old", NETWORK, INT8))
    names, rename = [], os.replace
    monkeypatch.setattr(os, "replace", replaced)
    with nullcontext() if killed_at is None else pytest.raises(KeyboardInterrupt):
        export.write_folder(tmp_path, *made("new", NETWORK))
    found = {path.name for path in tmp_path.iterdir()}
    assert found == ({NETWORK, LABELS} if killed_at is None else {NETWORK})
    assert onnx.load(tmp_path / NETWORK).producer_name == ("old" if killed_at == 0 else "new")


@pytest.mark.parametrize("closed", [False, True])
def test_int8_version_decides_and_answers_alike(closed):
    network, pixels = lively_network("rl_pruned", "ff2"), varied_images(128).numpy()
    if closed:  # no image says what the values of a block are like that none takes
        for layer, bias in zip(network.gate.last_layers, (-1e3, 1e3), strict=True):
            nn.init.constant_(layer.bias, bias)
    model = onnx_model(folded(network), NORMALISATION, 16)
    smaller = quantised(model, pixels)
    quantised_blocks = {n.name.split(".")[0] for n in smaller.graph.node if "Conv" in n.name and "Quantize" in n.name}
    assert ("block_1" in quantised_blocks) == (not closed) and "block_2" in quantised_blocks
    before, after = (run_session(open_session(m, threads=1), pixels) for m in (model, smaller))
    assert (before["decisions"] == after["decisions"]).mean() > 0.97
    assert (before["logits"].argmax(axis=1) == after["logits"].argmax(axis=1)).mean() > 0.95


@pytest.mark.parametrize("gate", SWITCHED)
def test_int8_version_answers_on_any_cpu_as_its_integers_say(gate):
    """Without optimisations ONNX Runtime multiplies the dequantised numbers in float32, which holds them exactly."""
    pixels = varied_images(128).numpy()
    smaller = quantised(onnx_model(folded(lively_network("rl_pruned", gate)), NORMALISATION, 16), pixels)
    integers = [numpy_helper.to_array(tensor) for tensor in smaller.graph.initializer]
    largest = max(abs(array.astype(int)).max() for array in integers if array.dtype == np.int8)
    assert 2 * 255 * largest < 2**15, "CPUs without VNNI add two products in 16 bits"
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    exact = onnxruntime.InferenceSession(smaller.SerializeToString(), options, providers=["CPUExecutionProvider"])
    expected, outputs = run_session(exact, pixels), run_session(open_session(smaller, threads=1), pixels)
    # Sums in another order round a few activations to the next integer.
    assert (outputs["decisions"] == expected["decisions"]).mean() > 0.99
    same = (outputs["decisions"] == expected["decisions"]).all(axis=1)
    np.testing.assert_allclose(outputs["logits"][same], expected["logits"][same], atol=0.05)


def test_int8_needs_images(tmp_path):
    with pytest.raises(UserError, match="--data_dir"):
        call(export, "--checkpoint", "any.pt", "--output", tmp_path, "--int8")


def test_folder_that_cannot_be_written(tmp_path):
    checkpoint = checkpoint_file(tmp_path / "best.pt", lively_network("sp", "none"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        call(export, "--checkpoint", checkpoint, "--output", tmp_path / "file")
