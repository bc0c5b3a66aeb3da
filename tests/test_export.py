"""Exported files against PyTorch: every logit within 1e-4 on 256 images, every decision equal, for stages and gates."""

import json

import numpy as np
import onnx
import pytest
import torch
from networks import NORMALISATION, STAGES, lively_network, varied_images
from torch import nn

from deploy import export
from deploy.folding import deployable
from deploy.graphs import batch_model, routed_model
from deploy.labels import INT8, LABELS, NETWORK, ROUTED
from deploy.session import TOLERANCE, check_session, open_session, run_session
from models import GATES, build_network
from utils.checkpoint import Checkpoint, describe, save_checkpoint
from utils.errors import UserError

SWITCHED = [gate for gate in GATES if gate != "none"]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("stage", STAGES)
def test_exported_graphs_agree_with_pytorch(stage, gate):
    network = lively_network(stage, gate)
    pixels = varied_images(256)
    with torch.no_grad():
        expected = network(NORMALISATION.apply(pixels))
    deployed = deployable(network, NORMALISATION)
    graphs = {NETWORK: batch_model(deployed, 16)} | ({ROUTED: routed_model(deployed, 16)} if network.switches else {})
    for name, model in graphs.items():
        onnx.checker.check_model(model, full_check=True)
        session = open_session(model, threads=1)
        outputs = run_session(session, pixels.numpy())
        undecided = ((expected.probabilities - 0.5).abs() <= TOLERANCE).any(dim=1)
        assert undecided.sum() <= 2
        sure = ~undecided.numpy()
        np.testing.assert_allclose(outputs["logits"][sure], expected.logits.numpy()[sure], rtol=1e-4, atol=1e-4)
        assert check_session(session, network, NORMALISATION, pixels, name) <= TOLERANCE
        if network.switches:
            np.testing.assert_array_equal(outputs["decisions"][sure], expected.decisions.numpy()[sure])
    if stage == "rl_pruned" and network.switches:
        passing = expected.decisions.mean(dim=0)
        assert ((passing > 0.1) & (passing < 0.9)).any(), "the test needs images that take different ways"


class ConvolutionalGate(nn.Module):
    """A gate without a state, of convolutions, batch norms and pooling."""

    def __init__(self, channels):
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Sequential(
                nn.MaxPool2d(2), nn.Conv2d(c, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                nn.Flatten(), nn.Linear(6, 1),
            )
            for c in channels
        )  # fmt: skip

    def forward(self, switch, features, state):
        return torch.sigmoid(20 * self.parts[switch](features)).squeeze(1), state


def test_gate_of_another_kind_is_exported():
    torch.manual_seed(0)
    network = lively_network("pruned", "rnn")
    network.gate = ConvolutionalGate([8, 16]).eval()
    for part in network.gate.parts:
        nn.init.normal_(part[2].running_mean)
        part[2].running_var.uniform_(0.5, 2)
    pixels = varied_images(64)
    deployed = deployable(network, NORMALISATION)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in deployed.modules())
    for model in (batch_model(deployed, 16), routed_model(deployed, 16)):
        onnx.checker.check_model(model, full_check=True)
        assert check_session(open_session(model, threads=1), network, NORMALISATION, pixels, NETWORK) <= TOLERANCE


def test_check_refuses_a_graph_of_another_network():
    network, other = lively_network("sp", "rnn"), lively_network("sp", "rnn", seed=1)
    session = open_session(batch_model(deployable(other, NORMALISATION), 16), threads=1)
    with pytest.raises(UserError, match="deviates"):
        check_session(session, network, NORMALISATION, varied_images(8), NETWORK)


@pytest.mark.parametrize("gate", SWITCHED)
def test_fewer_nodes_run_when_switches_close(gate, tmp_path):
    network = lively_network("rl_pruned", gate)
    deployed = deployable(network, NORMALISATION)
    pixels = varied_images(256)
    with torch.no_grad():
        blocks_on = deployed(pixels).decisions.sum(dim=1)
    executed = {}
    for image in (blocks_on.argmin().item(), blocks_on.argmax().item()):
        session = open_session(routed_model(deployed, 16), threads=1, profile=tmp_path / f"image_{image}")
        run_session(session, pixels[image : image + 1].numpy())
        with open(session.end_profiling()) as file:
            events = json.load(file)
        ran = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("kernel_time")]
        executed[int(blocks_on[image])] = sum(event["args"]["op_name"] == "Conv" for event in ran)
    fewest, most = min(executed), max(executed)
    assert most > fewest
    assert executed[most] >= executed[fewest] + 2 * (most - fewest)  # a block has two layers or more


def checkpoint_file(path, network, classes, stage="rl_pruned", size=16):
    save_checkpoint(
        path,
        Checkpoint(
            stage=stage,
            architecture=network.architecture,
            weights=network.state_dict(),
            normalisation=describe(NORMALISATION),
            classes=classes,
            data={"name": "shapes", "image_size": size, "flip": True, "val_fraction": 0.1, "split_seed": 0},
            metrics={"accuracy": 0.5, "computation": 0.5},
            original={"accuracy": 0.5, "parameters": 1, "flops": 1},
            seed=0,
        ),
    )
    return path


def run_main(monkeypatch, module, *arguments):
    monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
    module.main()


def test_command_writes_a_folder(tmp_path, monkeypatch):
    checkpoint = checkpoint_file(tmp_path / "best.pt", lively_network("rl_pruned", "rnn"), list("abcdefghij"))
    run_main(monkeypatch, export, "--checkpoint", checkpoint, "--output", tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {NETWORK, ROUTED, LABELS}
    labels = json.loads((tmp_path / "out" / LABELS).read_text())
    assert labels["classes"] == list("abcdefghij") and labels["image_size"] == 16
    assert (
        len(labels["flops_of_switched_blocks"]) == 2 and 0 < sum(labels["flops_of_switched_blocks"]) < labels["flops"]
    )
    assert all(file["deviation"] <= TOLERANCE for file in labels["files"].values())

    plain = checkpoint_file(tmp_path / "plain.pt", lively_network("pruned", "none"), list("abcdefghij"))
    run_main(monkeypatch, export, "--checkpoint", plain, "--output", tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {NETWORK, LABELS}, "no file of the earlier export is left"


def test_int8_version_comes_with_its_accuracy(tmp_path, monkeypatch, shapes):
    network = build_network("resnet", depth=8, num_classes=3, width=8)
    checkpoint = checkpoint_file(tmp_path / "best.pt", network, ["left", "middle", "right"], "sp", 8)
    arguments = ("--checkpoint", checkpoint, "--output", tmp_path / "out", "--data_dir", shapes, "--int8")
    run_main(monkeypatch, export, *arguments)
    measured = json.loads((tmp_path / "out" / LABELS).read_text())["files"][INT8]
    assert measured["test_images"] == 30
    assert abs(measured["int8_accuracy"] - measured["float_accuracy"]) < 0.2
    session = open_session(tmp_path / "out" / INT8)
    assert run_session(session, np.zeros((3, 3, 8, 8), np.uint8))["logits"].shape == (3, 3)


def test_int8_needs_images(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--data_dir"):
        run_main(monkeypatch, export, "--checkpoint", "any.pt", "--output", tmp_path, "--int8")


def test_folder_that_cannot_be_written(tmp_path, monkeypatch):
    checkpoint = checkpoint_file(tmp_path / "best.pt", lively_network("sp", "none"), list("abcdefghij"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        run_main(monkeypatch, export, "--checkpoint", checkpoint, "--output", tmp_path / "file")
