"""The scripts as a user meets them: what a whole chain leaves behind, and how each mistake is reported."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import EPOCHS, FINE_TUNING, ROOT, SCRIPTS, arguments, call_stage, metrics, run, run_folder, source_of
from conftest import write_shapes
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode

from gating.fixing import with_fixed_switches
from models import all_on
from training.evaluate import Evaluator
from utils.errors import UserError, run_command
from utils.runs.checkpoint import load_checkpoint, load_network, save_checkpoint
from utils.runs.run import BEST, LAST

METHODS = ["w/o Pruning", "w/ Static Pruning only", "w/ Static and Dynamic Pruning"]
ROUTING = {"accuracy_against_flops", "easy_and_hard", "executed_flops", "runs_by_class"}
OVERVIEW = {f"Overview/{figure}_{part}" for part in ("train", "val") for figure in ("loss", "accuracy")}
OVERVIEW |= {f"Overview/{name}" for name in ("computation_percentage", "executed_flops", "learning_rate")}
SIZE = {f"Size/{name}" for name in ("flops", "parameters", "prune_ratio")}
SWITCHES = {f"Switches/{name}" for name in ("accuracy_val_every_block", "runs_01", "runs_02")}
EVERY_EPOCH = OVERVIEW | SIZE | SWITCHES
RESULTS = {"accuracy", "compression", "computation", "gflops", "latency_ms", "parameters", "throughput"}


def records(results: Path) -> list[dict]:
    return json.loads((results / "results.json").read_text())


@pytest.mark.parametrize("stage", SCRIPTS)
def test_files_of_a_run(chain: Path, stage: str):
    folder = run_folder(chain, stage)
    names = {path.name for path in folder.iterdir() if not path.name.startswith("events.out.tfevents.")}
    iterations = {f"iteration_{i:02d}.pt" for i in range(1, FINE_TUNING["iterations"] + 1)}
    bases = {f"eigenvalues_{i:02d}.png" for i in range(1, FINE_TUNING["iterations"] + 1)}
    expected = {"arguments.json", "log.txt", "metrics.jsonl", "record.json", "results.png", ".lock", BEST, LAST}
    routing = {f"{picture}.png" for picture in ROUTING}
    own = {"sp": set(), "pruned": iterations | bases | {"ranks.png"}, "rl_pruned": routing | {"routing.json"}}
    settled = {"before_fixing.pt"} if load_checkpoint(folder / "best.pt").architecture.get("fixed_switches") else set()
    assert names == expected | own[stage] | settled
    asked = json.loads((folder / "arguments.json").read_text())
    assert (asked["depth"], asked["seed"], asked["result_dir"]) == (8, 0, str(chain))
    log = (folder / "log.txt").read_text()
    assert METHODS[list(SCRIPTS).index(stage)] in log and "gate.lstm" not in log, "gates are not named one by one"


@pytest.mark.parametrize("stage", SCRIPTS)
def test_scalars_in_metrics_and_in_tensorboard(chain: Path, stage: str):
    folder = run_folder(chain, stage)
    lines = metrics(folder)
    epochs = [line for line in lines if "Overview/accuracy_val" in line]
    count = FINE_TUNING["iterations"] * FINE_TUNING["epochs"] if stage == "pruned" else EPOCHS[stage]
    assert len(epochs) == count and all(line.keys() >= EVERY_EPOCH for line in epochs)
    # In stage 3's last epoch the switches stay as they are.
    assert ["Overview/alpha" in line for line in epochs] == [
        stage == "rl_pruned" and i < count - 1 for i in range(count)
    ]

    events = EventAccumulator(str(folder)).Reload()
    recorded = {key for line in lines for key in line} - {"step", "iteration"}
    recorded = {tag for tag in recorded if not tag.startswith("Layers/")}
    results = {f"Overview-results/{name}" for name in RESULTS}
    assert set(events.Tags()["scalars"]) == recorded | results
    assert min(tag.partition("/")[0] for tag in recorded) == "Overview", "TensorBoard shows the first in order first"
    assert set(sorted(recorded | results)[: len(results)]) == results, "and the first metrics beside hyperparameters"
    for tag in recorded:
        expected = [(line["step"], pytest.approx(line[tag], rel=1e-6)) for line in lines if tag in line]
        assert [(event.step, event.value) for event in events.Scalars(tag)] == expected, tag  # kept in float32
    pictures = {"sp": set(), "pruned": {"eigenvalues", "ranks"}, "rl_pruned": ROUTING}[stage] | {"results"}
    assert {tag.removeprefix("Pictures/") for tag in events.Tags()["images"]} == pictures


def test_of_epochs_with_the_same_accuracy_the_one_with_the_lowest_loss_is_kept(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As on few validation images, where accuracies are the same for many epochs."""
    measured = Evaluator.__call__
    same = lambda *given: replace(measured(*given), accuracy=0.5)  # noqa: E731
    monkeypatch.setattr(Evaluator, "__call__", same)
    call_stage("sp", arguments("sp", shapes, tmp_path))
    losses = [line["Overview/loss_val"] for line in metrics(run_folder(tmp_path, "sp"))]
    assert load_checkpoint(run_folder(tmp_path, "sp") / BEST).progress["step"] == 1 + int(np.argmin(losses)) > 1


def test_keys_and_types_of_the_results(chain: Path):
    kinds = {
        "method": str, "stage": str, "dataset": str, "network": str, "depth": int, "width": int, "num_classes": int,
        "accuracy": float, "gflops": float, "gflops_all": float, "gflops_executed": float, "parameters": int,
        "compression": float, "computation": float, "seed": int, "checkpoint": str, "selected_on": str,
        "image_size": int, "chain_speeds": dict,
    }  # fmt: skip
    found = records(chain)
    assert [(r["method"], r["stage"]) for r in found] == list(zip(METHODS, SCRIPTS, strict=True))
    for record in found:
        assert {key: type(record[key]) for key in kinds} == kinds
        assert record.keys() - kinds.keys() == {
                "gate", "accuracy_every_block", "source", "points", "latency_ms", "throughput", "within_budget"
            }  # fmt: skip
        subject = [record[key] for key in ("dataset", "network", "depth", "width", "num_classes", "seed")]
        assert subject == ["shapes", "resnet", 8, 4, 3, 0]
        assert record["selected_on"] == "validation"
        assert record["checkpoint"] == str((run_folder(chain, record["stage"]) / "best.pt").relative_to(chain))
    assert [r["source"] for r in found] == [None, found[0]["checkpoint"], found[1]["checkpoint"]]
    for number, record in enumerate(found, start=1):
        assert list(record["chain_speeds"]) == [r["checkpoint"] for r in found[:number]]
    assert [(p["iteration"], p["measured_on"]) for p in found[1]["points"]] == [(1, "validation"), (2, "validation")]


@pytest.mark.parametrize("index", range(3))
def test_recorded_figures_come_out_again(chain: Path, shapes: Path, index: int):
    """Images read by Pillow, normalised by NumPy, FLOPs counted by PyTorch: nothing of the program but its network."""
    record = records(chain)[index]
    path = chain / record["checkpoint"]
    network = load_network(path)
    normalisation = torch.load(path, weights_only=True)["normalisation"]
    files = sorted((shapes / "test").glob("*/*.png"))
    labels = torch.tensor([["left", "middle", "right"].index(file.parent.name) for file in files])
    pixels = np.stack([np.asarray(Image.open(file)) for file in files]) / 255
    pixels = (pixels - np.array(normalisation["mean"])) / np.array(normalisation["std"])
    images = torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float()

    with torch.no_grad(), FlopCounterMode(display=False) as executed:
        predicted = network(images).logits.argmax(dim=1)
    with torch.no_grad(), FlopCounterMode(display=False) as everything:
        with_every_block = network(images, decide=all_on).logits.argmax(dim=1)
    assert record["accuracy"] == pytest.approx((predicted == labels).double().mean().item(), abs=1e-12)
    assert record["accuracy_every_block"] == pytest.approx((with_every_block == labels).double().mean().item())
    gflops, gflops_all = (counter.get_total_flops() / len(files) / 1e9 for counter in (executed, everything))
    if network.architecture["fixed_switches"]:  # what they have removed counts as skipped, though it is gone
        with torch.no_grad(), FlopCounterMode(display=False) as before:
            load_network(path.with_name("before_fixing.pt"))(images, decide=all_on)
        gflops_all = before.get_total_flops() / len(files) / 1e9
    assert record["gflops_executed"] == pytest.approx(gflops, rel=1e-9)
    assert record["gflops_all"] == pytest.approx(gflops_all, rel=1e-9)
    assert record["gflops"] == record["gflops_executed" if index == 2 else "gflops_all"]
    assert record["computation"] == pytest.approx(gflops / gflops_all, rel=1e-9)

    parameters = sum(p.numel() for p in network.parameters())
    assert record["parameters"] == parameters
    assert record["compression"] == pytest.approx(1 - parameters / records(chain)[0]["parameters"], rel=1e-9)


def test_each_stage_saves_something(chain: Path):
    first, second, third = records(chain)
    assert first["compression"] == 0 and second["compression"] > 0.1 and third["parameters"] <= second["parameters"]
    assert first["gflops"] > second["gflops"] > third["gflops"] and third["computation"] < 0.99


def test_table_and_picture(chain: Path):
    rows = [line.split("|")[1:-1] for line in (chain / "results.md").read_text().splitlines() if line.startswith("| w")]
    for row, record in zip(rows, records(chain), strict=True):
        method, accuracy, gflops, compression, parameters, computation, *speeds = (cell.strip() for cell in row)
        assert method == record["method"]
        shown = [float(share.rstrip("%")) / 100 for share in (accuracy, compression, computation)]
        assert shown == pytest.approx([record[k] for k in ("accuracy", "compression", "computation")], abs=5.1e-4)
        assert float(gflops) == pytest.approx(record["gflops"], rel=5.1e-3)  # three digits
        assert int(parameters.replace(",", "")) == record["parameters"]
        measured = records(chain)[-1]["chain_speeds"][record["checkpoint"]]
        assert speeds == [f"{measured['latency_ms']:.2f} ms", f"{measured['throughput']:,.0f}/s"]
    with Image.open(chain / "results.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20, "the picture is not blank"


def exit_code(stage: str, given: list[str]) -> object:
    """Run a stage in this process, errors reported as the script does; its exit code."""
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: call_stage(stage, given))
    return ended.value.code


def error_line(stage: str, given: list[str], capsys) -> str:
    assert exit_code(stage, given) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.mark.parametrize(
    ("stage", "changed", "message"),
    [
        ("sp", ["--data_dir", "/no/data"], "data folder /no/data does not exist"),
        ("pruned", ["--set=data_dir=/no/data"], "data folder /no/data does not exist"),
        ("sp", ["--depth", "9"], "depth 9 is not of the form 6n+2"),
        ("rl_pruned", ["--depth", "14"], "run main_prune.py with the same data and network first"),
        ("pruned", ["--set=resize=16"], "was trained on images of 8 pixels, not 16"),
        ("rl_pruned", ["--resize", "16"], "was trained on images of 8 pixels, not 16"),
        ("pruned", ["--set=prune_ratio=1.5"], "prune_ratio is 1.5, out of range"),
        ("pruned", ["--config_path", "/no/config.json"], "settings file /no/config.json does not exist"),
        ("rl_pruned", ["--checkpoint", "/no/best.pt"], "checkpoint /no/best.pt does not exist"),
        ("sp", ["--img_type", "bmp"], "holds no .bmp file"),
    ],
)
def test_mistakes_are_reported_in_one_line(stage, changed, message, chain, shapes, capsys):
    assert message in error_line(stage, [*arguments(stage, shapes, chain), *changed], capsys)


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_result_folder_that_cannot_be_written(stage, chain, shapes, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")  # refuses every user, root included
    given = arguments(stage, shapes, tmp_path / "file", source_of(chain, stage))
    assert "cannot be written" in error_line(stage, given, capsys)


@pytest.mark.parametrize(
    ("stage", "resumed"),
    [(stage, resumed) for stage in SCRIPTS for resumed in (True, False) if resumed or stage != "sp"],
)
def test_other_data_of_the_same_name_and_classes(stage, resumed, chain, shapes, tmp_path, capsys):
    """A finished run is not opened again for it, and no stage goes on with it."""
    before = [path.stat().st_mtime_ns for path in sorted(chain.glob("*/*/*/*/*"))]
    data = write_shapes(tmp_path / shapes.name, {"train": 40, "test": 10}, seed=1)
    given = [*arguments(stage, data, chain), *(["--resume"] if resumed else [])]
    line = error_line(stage, given, capsys)
    assert "the test images of data shapes are not those that the checkpoint's run had" in line
    assert [path.stat().st_mtime_ns for path in sorted(chain.glob("*/*/*/*/*"))] == before


@pytest.mark.parametrize(
    ("gate", "message"),
    [("none", "has no switches to train"), ("rnn", "has no switch that still decides: give the before_fixing.pt")],
)
def test_where_no_switch_decides_none_can_be_taught(gate, message, chain, shapes, tmp_path, capsys):
    pruned = load_checkpoint(source_of(chain, "rl_pruned"))
    fixed = with_fixed_switches(pruned.network(), {0: 1, 1: 0})
    architecture, weights = {**fixed.architecture, "gate": gate}, fixed.state_dict()
    if gate == "none":
        architecture["fixed_switches"] = {}
        weights = {name: weight for name, weight in pruned.weights.items() if not name.startswith("gate.")}
    save_checkpoint(tmp_path / "fixed.pt", replace(pruned, architecture=architecture, weights=weights))
    given = arguments("rl_pruned", shapes, chain, str(tmp_path / "fixed.pt"))
    assert message in error_line("rl_pruned", given, capsys)


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(stage, chain, shapes, tmp_path, capsys):
    given = arguments(stage, shapes, tmp_path, source_of(chain, stage))
    rate = ["--set=lr=1e30"] if stage == "pruned" else ["--lr", "1e30"]
    assert "the loss is not finite" in error_line(stage, [*given, *rate], capsys)
    last = torch.load(run_folder(tmp_path, stage) / "last.pt", weights_only=True)
    assert all(torch.isfinite(tensor).all() for tensor in last["weights"].values())
    assert last["progress"].get("epoch", last["progress"]["step"]) == 0, "as it was before the epoch that failed"


def test_the_last_step_of_an_epoch_may_ruin_the_network(shapes: Path, tmp_path: Path, capsys):
    """One step an epoch: its loss is finite, and only the network that it leaves is not."""
    given = [*arguments("sp", shapes, tmp_path), "--bs", "500", "--lr", "1e38", "--val_fraction", "0"]
    assert "the loss is not finite (epoch 1/5)" in error_line("sp", given, capsys)
    assert not (run_folder(tmp_path, "sp") / "best.pt").exists()


@pytest.mark.parametrize("stage", SCRIPTS)
def test_unknown_and_abbreviated_flags_are_refused(stage: str, shapes: Path, tmp_path: Path, capsys):
    long, short = ("--config_path", "--config") if stage == "pruned" else ("--weight_decay", "--weight")
    for flag in ("--speed", short):
        assert exit_code(stage, [*arguments(stage, shapes, tmp_path), f"{flag}=0"]) == 2
        assert f"unrecognized arguments: {flag}" in capsys.readouterr().err
    assert exit_code(stage, ["--help"]) == 0
    assert long in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--depth=2.5", "--bs=1", "--lr=nan", "--momentum=1", "--img_type=gif", "--resize=4"])
def test_wrong_values_of_flags(flag: str, shapes: Path, tmp_path: Path, capsys):
    assert exit_code("sp", [*arguments("sp", shapes, tmp_path), flag]) == 2
    assert f"argument {flag.partition('=')[0]}: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_error_of_a_real_process(shapes: Path, tmp_path: Path):
    """Through the interpreter: exit code, one line, no traceback, although all images are read before."""
    data = tmp_path / "shapes"
    shutil.copytree(shapes, data)
    broken = data / "test" / "right" / "009.png"
    broken.write_bytes(broken.read_bytes()[:100])
    done = run("sp", arguments("sp", data, tmp_path / "results"), code=2)
    assert done.stderr.startswith(f"error: image {broken} cannot be read") and done.stderr.count("\n") == 1
    done = run("pruned", arguments("pruned", shapes, tmp_path / "results"), code=2)
    assert done.stderr.startswith("error: no checkpoint ") and done.stderr.count("\n") == 1


def test_an_error_of_many_lines_is_reported_in_one(capsys):
    def fails() -> None:
        raise UserError("first\n  second\r\nthird")

    with pytest.raises(SystemExit):
        run_command(fails)
    assert capsys.readouterr().err == "error: first second third\n"


def test_without_validation_images_the_table_has_its_footnote(shapes: Path, tmp_path: Path, monkeypatch):
    """The last epoch of stage 1 counts; stage 2 then chooses on the test images and says so.  "~" is expanded."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for stage, more in (("sp", ["--val_fraction", "0"]), ("pruned", ["--set=max_iter=1"])):
        call_stage(stage, [*arguments(stage, shapes, Path("~/results")), *more])
    results = tmp_path / "results"
    assert [r["selected_on"] for r in records(results)] == ["last epoch", "test"]
    assert torch.load(run_folder(results, "sp") / "best.pt", weights_only=True)["progress"]["step"] == EPOCHS["sp"]
    table = (results / "results.md").read_text()
    assert "| w/o Pruning |" in table and "| w/ Static Pruning only[^test] |" in table
    assert "[^test]: chosen on the test images" in table
    assert not (ROOT / "~").exists()
