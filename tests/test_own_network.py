"""A network of the user's own through the commands: pruned, in a cascade, exported, and what can go wrong."""

import itertools
import json
from pathlib import Path
from unittest import mock

import own_networks
import pytest
import torch
from commands import ROOT, answer_of_both, call, run

import main_cascade
import main_prune
from deploy import export, speeds
from models import OwnNetwork, build_network, own
from pruning.layers import ConvWeights
from pruning.settings import PruneSettings
from pruning.surgery import rebuild
from utils.data.folder import load_data
from utils.errors import UserError
from utils.flops import network_cost
from utils.runs.checkpoint import load_checkpoint

SOURCE = str(ROOT / "tests" / "own_networks.py")


def settings(data: Path, results: Path, function: str = "small", **more: object) -> list[str]:
    given = {
        "network": f"{SOURCE}:{function}", "resize": 8, "data_dir": data, "result_dir": results, "batch_size": 32,
        "num_workers": 1, "max_iter": 2, "max_accuracy_drop": 0.9, "epochs_start": 1, "epochs_end": 1,
        "val_fraction": 0.2, "no_flip": "true", "round_to": 4, "fisher_images": 60, **more,
    }  # fmt: skip
    return ["--config_path", str(ROOT / "config.json"), *(f"--set={key}={value}" for key, value in given.items())]


def fresh(command, *given: object) -> None:
    """As in a process of its own: no function is allowed but those that are given."""
    with mock.patch.object(own, "_allowed", []):
        call(command, *given)


@pytest.fixture(scope="module")
def pruned(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Results of stage 2 on a network of the user's own, and the file with its weights."""
    folder = tmp_path_factory.mktemp("own")
    torch.manual_seed(1)
    weights = {f"module.{name}": value for name, value in own_networks.small().state_dict().items()}
    del weights["module.bn1.num_batches_tracked"]  # as in files of PyTorch before 0.4.1
    torch.save({"state_dict": weights, "epoch": 3}, folder / "small.pth")
    normalisation = {"mean": "[0.5,0.5,0.5]", "std": "[0.2,0.2,0.2]"}
    given = settings(shapes, folder / "results", checkpoint=folder / "small.pth", **normalisation)
    assert "| w/ Static Pruning only |" in run("pruned", given).stdout
    return folder / "results", folder / "small.pth"


def test_the_given_network_is_the_first_row(pruned, monkeypatch):
    results, weights = pruned
    (given,) = results.glob("sp/shapes/small/*/best.pt")
    checkpoint = load_checkpoint(given)
    monkeypatch.setattr(own, "_allowed", [f"{SOURCE}:small"])
    found = checkpoint.network().network.state_dict()
    for name, value in torch.load(weights, weights_only=True)["state_dict"].items():
        assert torch.equal(value, found[name.removeprefix("module.")])
    assert checkpoint.normalisation == {"mean": [0.5] * 3, "std": [0.2] * 3}
    (record,) = results.glob("sp/shapes/small/*/record.json")
    assert json.loads(record.read_text())["parameters"] == sum(p.numel() for p in own_networks.small().parameters())


def test_the_network_that_is_named_is_pruned_also_if_another_was_registered_since(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(own, "_allowed", [f"{SOURCE}:small"])
    data, taken = load_data(str(shapes), "png", 8, 1), []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        torch.save(own_networks.small().state_dict(), tmp_path / f"{seed}.pth")
        given = PruneSettings(
            network=f"{SOURCE}:small", checkpoint=str(tmp_path / f"{seed}.pth"), data_dir=str(shapes), resize=8,
            result_dir=str(tmp_path), val_fraction=0.2,
        )  # fmt: skip
        with mock.patch.object(main_prune, "measured_speeds", lambda files, pixels: {}):
            taken.append(main_prune.first_network(given, data, torch.device("cpu"))[0])
    assert taken[0].source == taken[2].source != taken[1].source
    assert all(torch.equal(weight, taken[2].weights[name]) for name, weight in taken[0].weights.items())


def test_what_comes_out_is_smaller_and_describes_itself(pruned, monkeypatch):
    (best,) = pruned[0].glob("pruned/shapes/small/*/best.pt")
    checkpoint = load_checkpoint(best)
    with pytest.raises(
        UserError, match=r"^loading the checkpoint would run the function \S*: add --network \S* to allow this$"
    ):
        checkpoint.network()
    monkeypatch.setattr(own, "_allowed", ["elsewhere/own_networks.py:small", f"{SOURCE}:small"])
    network = checkpoint.network()
    assert isinstance(network, OwnNetwork) and network.architecture == checkpoint.architecture
    assert checkpoint.architecture["edits"], "some layers have other forms"
    assert sum(p.numel() for p in network.parameters()) < checkpoint.original["parameters"]
    record = json.loads((best.parent / "record.json").read_text())
    assert record["gflops"] < checkpoint.original["flops"] / 1e9 and record["latency_ms"] > 0


def test_an_iteration_is_pruned_further(pruned, shapes, tmp_path, monkeypatch):
    """``checkpoint`` also takes a file of stage 2: its normalisation, validation images and unpruned size are kept."""
    (start,) = pruned[0].glob("pruned/shapes/small/*/iteration_01.pt")
    ignored = json.dumps(["head"])  # the user's name of the layer
    said = run(
        "pruned", settings(shapes, tmp_path, checkpoint=start, max_iter=1, prune_ratio=0.2, ignored_layers=ignored)
    )
    assert "ignored: network.head" in said.stdout
    monkeypatch.setattr(own, "_allowed", [f"{SOURCE}:small"])
    (found,) = tmp_path.glob("pruned/shapes/small/*/iteration_01.pt")
    before, after = load_checkpoint(start), load_checkpoint(found)
    assert (after.original, after.normalisation) == (before.original, before.normalisation)
    costs = [network_cost(checkpoint.network(), 8).flops for checkpoint in (before, after)]
    assert costs[1] <= 0.8 * costs[0]


def test_a_network_that_returns_a_dictionary(shapes, tmp_path, capsys):
    """From weights of a compiled network to an export; a row that was lost is made again."""
    weights = {f"_orig_mod.{name}": value for name, value in own_networks.named().state_dict().items()}
    torch.save(weights, tmp_path / "named.pth")
    given = {"checkpoint": tmp_path / "named.pth", "max_iter": 1}
    fresh(main_prune, *settings(shapes, tmp_path, "named", **given))
    (record,) = tmp_path.glob("sp/shapes/named/*/record.json")
    record.unlink()  # as if the run had been interrupted before it was written
    fresh(main_prune, *settings(shapes, tmp_path, "named", **given, lr=0.001))
    table = (tmp_path / "results.md").read_text()
    assert table.count("| w/o Pruning |") == table.count("| w/ Static Pruning only |") - 1 == 1
    best = max(tmp_path.glob("pruned/shapes/named/*/best.pt"))
    assert all(value.dtype in (torch.float32, torch.int64) for value in load_checkpoint(best).weights.values())
    fresh(export, "--checkpoint", best, "--network", f"{SOURCE}:named", "--output", tmp_path / "exported")
    assert "logits within" in capsys.readouterr().out


def test_a_network_that_onnx_cannot_express_is_pruned_without_times(shapes, tmp_path, capsys):
    fresh(main_prune, *settings(shapes, tmp_path, "smoothed", max_iter=1))
    table = (tmp_path / "results.md").read_text()
    assert table.count("| – | – |") == 2 and "a network that can be exported" in table
    (best,) = tmp_path.glob("pruned/shapes/smoothed/*/best.pt")
    with pytest.raises(UserError, match="cannot translate the network"):
        fresh(export, "--checkpoint", best, "--network", f"{SOURCE}:smoothed", "--output", tmp_path / "exported")


def test_its_int8_version_comes_with_its_accuracy_and_time(pruned, shapes, tmp_path, capsys, monkeypatch):
    times = {"network.onnx": {"latency_ms": 1.0}, "network_int8.onnx": {"latency_ms": 2.0}}
    monkeypatch.setattr(speeds, "speeds", lambda networks, pixels: {name: times[name] for name in networks})
    (best,) = pruned[0].glob("pruned/shapes/small/*/best.pt")
    given = ["--checkpoint", best, "--network", f"{SOURCE}:small", "--data_dir", shapes, "--int8"]
    fresh(export, *given, "--output", tmp_path)
    measured = json.loads((tmp_path / "labels.json").read_text())["files"]["network_int8.onnx"]
    assert abs(measured["int8_accuracy"] - measured["float_accuracy"]) < 0.2 and measured["test_images"] == 30
    said = capsys.readouterr().out
    assert "network_int8.onnx: accuracy" in said
    assert "takes 2.00 ms in network_int8.onnx and 1.00 ms in network.onnx on this machine: use network.onnx" in said


def test_a_cascade_of_it_is_exported_and_predicts(pruned, shapes, tmp_path, capsys):
    place = ["--resize", 8, "--num_workers", 1, "--data_dir", shapes, "--result_dir", pruned[0]]
    function = ["--network", f"{SOURCE}:small", f"{SOURCE}:again"]
    fresh(main_prune, *settings(shapes, pruned[0], "again", max_iter=1))
    fresh(main_cascade, *place, *function, "--max_accuracy_drop", 0.9)
    said = capsys.readouterr().out
    assert "| w/ Static Pruning and Cascade |" in said
    for stage, name in itertools.product(("sp", "pruned"), ("small", "again")):
        assert f"{stage}/shapes/{name}/" in said.split("networks of ")[1].split("\n")[0]
    (best,) = pruned[0].glob("cascade/shapes/small/*/best.pt")
    given = ["--checkpoint", best, "--output", tmp_path]
    with pytest.raises(UserError, match="loading the checkpoint would run the function"):
        fresh(export, *given)
    fresh(export, *given, *function)
    with mock.patch.object(own, "_allowed", []):
        image = next((shapes / "test").glob("*/*.png"))
        assert " answered" in answer_of_both(capsys, best, tmp_path, image, *function)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"network": "nowhere.py:small"}, "nowhere.py cannot be imported (FileNotFoundError"),
        ({"network": "small"}, "it takes resnet, or file.py:function of your own"),
        ({"function": "absent"}, "has no function absent: it has"),
        ({"function": "with_argument"}, "raised TypeError"),
        ({"function": "not_a_module"}, "returned int: it has to return a torch.nn.Module"),
        ({"function": "four_classes"}, "has 4 classes and the data has 3"),
        ({"function": "pair"}, "the network returned a tuple: it has to return scores [images, classes]"),
        ({"function": "frozen"}, "a network without trainable parameters: nothing can be fine-tuned"),
        ({"function": "large"}, "cannot take images of 8x8 pixels"),
        ({"checkpoint": "missing.pth"}, "missing.pth does not exist"),
        ({"checkpoint": SOURCE}, "cannot be read"),
        (
            {"function": "four_classes", "checkpoint": "WEIGHTS"},
            "2 of 11 weights differ, head.weight is [3, 32] in the file",
        ),
        ({"mean": "[0.5,0.5]"}, "mean is [0.5, 0.5]: it takes three numbers"),
        ({"mean": "[0.5,0.5,0.5]"}, "give both, deviations above 0, or neither"),
    ],
)
def test_what_users_get_wrong(change: dict, message: str, pruned, shapes, tmp_path):
    change = {key: str(pruned[1]) if value == "WEIGHTS" else value for key, value in change.items()}
    with pytest.raises(UserError) as raised:
        fresh(main_prune, *settings(shapes, tmp_path, **change))
    assert message in str(raised.value)


def test_a_pruned_layer_with_two_names_is_rebuilt_under_both(monkeypatch):
    monkeypatch.setattr(own, "_allowed", [f"{SOURCE}:twice_named"])
    network = OwnNetwork(f"{SOURCE}:twice_named", 3)
    factors = ConvWeights(torch.randn(2, 32, 1, 1), None, torch.randn(3, 2))
    smaller = rebuild(network, {"network.head": factors})
    again = build_network(**smaller.architecture)
    again.load_state_dict(smaller.state_dict())
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(again(x).logits, smaller(x).logits)
