"""Which network a stage starts from, among runs that fit, that do not, that have not ended and that are damaged."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from networks import checkpoint_of, edits_to, varied_images

import main_cascade
from models import build_network
from utils.data.batches import split_data
from utils.data.folder import DataSet
from utils.data.images import ImageSet
from utils.errors import UserError
from utils.runs.checkpoint import Checkpoint, save_checkpoint
from utils.runs.predecessors import cascade_networks, pruned_network, trained_network
from utils.runs.records import RECORD
from utils.runs.run import BEST, LAST, stage_folder

CLASSES = ("left", "middle", "right")


def images(count: int, seed: int) -> ImageSet:
    return ImageSet(varied_images(count, 8, seed), torch.arange(count) % 3)


def data_of(seed: int) -> DataSet:
    return DataSet("shapes", CLASSES, images(30, seed), None, images(9, seed + 100))


DATA, OTHER_DATA = data_of(1), data_of(2)


def settings(folder: Path, **changed) -> SimpleNamespace:
    given = {"checkpoint": "", "result_dir": str(folder), "network": "resnet", "depth": 8, "width": 4, "resize": 8}
    return SimpleNamespace(**{**given, "max_accuracy_drop": 0.1, "seed": 7, **changed})


def stage_3_settings(folder: Path, **changed) -> SimpleNamespace:
    made = settings(folder, **changed)
    del made.width
    return made


def checkpoint(stage: str, gate="rnn", width=4, size=8, data=DATA, **changed) -> Checkpoint:
    ranks = changed.pop("ranks", {})
    network = build_network("resnet", depth=8, num_classes=3, width=width, gate=gate, edits=edits_to(ranks))
    original = {"accuracy": 0.8, "parameters": 1, "flops": 1}
    made = checkpoint_of(network, stage, size, classes=list(CLASSES), original=original)
    made.data |= {"val_fraction": 0.2, **split_data(data, 0.2, 0).identity}
    made.metrics = {"accuracy": changed.pop("accuracy", 0.8), "computation": 1.0}
    return replace(made, **changed)


def run_of(folder: Path, name: str, best: Checkpoint | None, ended: bool = True, **iterations) -> Path:
    """A run's folder as it is after some of its epochs; the path of its best.pt."""
    run = stage_folder(folder, best.stage if best else "sp", "shapes", "resnet", 8) / name
    run.mkdir(parents=True)
    (run / LAST).touch()
    if ended:
        (run / RECORD).touch()
    for file, saved in {"best": best, **iterations}.items():
        if saved is not None:
            save_checkpoint(run / f"{file}.pt", saved)
    return run / BEST


def source_of(taken: Checkpoint) -> str:
    return Path(taken.source).parent.name


def test_the_newest_finished_run_that_fits_is_taken_whatever_its_accuracy(tmp_path: Path):
    run_of(tmp_path, "1", checkpoint("sp", accuracy=0.99))
    run_of(tmp_path, "2", checkpoint("sp", accuracy=0.7))
    run_of(tmp_path, "3", checkpoint("sp", width=8, accuracy=1.0))
    run_of(tmp_path, "4", checkpoint("sp", size=16, accuracy=1.0))
    run_of(tmp_path, "5", checkpoint("sp", data=OTHER_DATA, accuracy=1.0))
    run_of(tmp_path, "6", checkpoint("sp", accuracy=1.0), ended=False)
    taken, notes = trained_network(settings(tmp_path), DATA)
    assert (source_of(taken), taken.stage, taken.seed) == ("2", "pruned", 7)
    started, fitting, unfitting = notes
    folder = "sp/shapes/resnet8"
    chosen = f"{folder}/2/best.pt (gate rnn, accuracy 70.00%)"
    assert started == f"starting from {chosen}: the newest run of stage 1 that fits"
    assert f"{folder}/6/best.pt (gate rnn, accuracy 100.00%), {folder}/1/best.pt (gate rnn, accuracy 99.00%)" in fitting
    assert [f"{folder}/{run} (" in unfitting for run in range(1, 7)] == [False, False, True, True, True, False]
    for setting, why in ((8, "3"), (4, "2")):
        assert source_of(trained_network(settings(tmp_path, width=setting), DATA)[0]) == why
    assert source_of(trained_network(settings(tmp_path), OTHER_DATA)[0]) == "5"


def test_a_run_that_has_not_ended_is_taken_where_no_other_fits(tmp_path: Path):
    run_of(tmp_path, "1", checkpoint("sp", width=8))
    run_of(tmp_path, "2", checkpoint("sp"), ended=False)
    run_of(tmp_path, "3", checkpoint("sp"), ended=False)
    taken, notes = trained_network(settings(tmp_path), DATA)
    assert source_of(taken) == "3" and "no finished run fits" in notes[0]


def test_what_is_damaged_or_abandoned_is_in_nobodys_way(tmp_path: Path):
    run_of(tmp_path, "1", checkpoint("sp"))
    run_of(tmp_path, "2", checkpoint("sp")).write_bytes(b"PK\x03\x04 no checkpoint")
    run_of(tmp_path, "3", None, ended=False)
    taken, notes = trained_network(settings(tmp_path), DATA)
    assert source_of(taken) == "1" and "2/best.pt cannot be read" in notes[-1]


def test_where_none_fits_the_newest_is_named_and_why(tmp_path: Path):
    with pytest.raises(UserError, match=r"^no checkpoint .*: run main_sp\.py with the same data and network first$"):
        trained_network(settings(tmp_path), DATA)
    run_of(tmp_path, "1", checkpoint("sp", width=8))
    run_of(tmp_path, "2", checkpoint("sp", data=OTHER_DATA))
    message = r"^sp/shapes/resnet8/2 does not fit \(older ones that do not fit either: 1\): the test images of"
    with pytest.raises(UserError, match=message):
        trained_network(settings(tmp_path), DATA)


def test_a_checkpoint_that_is_named_has_to_fit(tmp_path: Path):
    path = str(run_of(tmp_path, "1", checkpoint("sp", data=OTHER_DATA)))
    with pytest.raises(UserError, match="the test images of data shapes are not those"):
        trained_network(settings(tmp_path, checkpoint=path), DATA)
    assert trained_network(settings(tmp_path, checkpoint=path), OTHER_DATA)[1] == []
    with pytest.raises(UserError, match=r"has width 4, the settings say 8"):
        trained_network(settings(tmp_path, checkpoint=path, width=8), OTHER_DATA)


SMALL = {"blocks.2.conv2": (2, 2)}
SMALLER = {**SMALL, "blocks.2.conv1": (2, 2)}


def test_stage_3_takes_the_smallest_of_the_newest_chain_with_switches(tmp_path: Path):
    of = {"first": "sp/shapes/resnet8/1/best.pt", "second": "sp/shapes/resnet8/2/best.pt"}
    run_of(tmp_path, "3", checkpoint("pruned", source=of["first"], ranks=SMALLER))
    run_of(tmp_path, "4", checkpoint("pruned", source=of["second"], ranks=SMALL))
    run_of(tmp_path, "5", checkpoint("pruned", source=of["second"]))
    run_of(tmp_path, "6", checkpoint("pruned", source="sp/shapes/resnet8/3/best.pt", gate="none"))
    run_of(tmp_path, "7", checkpoint("pruned", source="sp/shapes/resnet8/4/best.pt", size=16))
    taken, notes = pruned_network(stage_3_settings(tmp_path), DATA)
    assert source_of(taken) == "4" and len(taken.architecture["edits"]) == len(SMALL)
    assert notes[0].endswith(f"the smallest network within the budget that was made from {of['second']}")
    assert "5/best.pt" in notes[1] and "3/best.pt" in notes[1]
    assert "has no switches to train" in notes[2] and "images of 16 pixels, not 8" in notes[2]


def test_stage_3_falls_back_to_iterations_then_to_another_chain_then_to_runs_that_have_not_ended(tmp_path: Path):
    of = {"first": "sp/shapes/resnet8/1/best.pt", "second": "sp/shapes/resnet8/2/best.pt"}

    def made(origin: str, accuracy: float, **more) -> Checkpoint:
        return checkpoint("pruned", source=of[origin], accuracy=accuracy, **more)

    within, beyond = 0.75, 0.6
    first = run_of(tmp_path, "3", made("first", within, ranks=SMALL))
    second = run_of(
        tmp_path, "4", made("second", beyond, ranks=SMALLER), iteration_01=made("second", within, ranks=SMALL),
        iteration_02=made("second", beyond, ranks=SMALLER),
    )  # fmt: skip
    last = made("second", within, ranks=SMALLER)
    run_of(tmp_path, "5", made("second", within, ranks=SMALL), ended=False, iteration_01=last).unlink()

    def taken() -> str:
        start, _ = pruned_network(stage_3_settings(tmp_path), DATA)
        assert (start.stage, start.seed, start.progress) == ("rl_pruned", 7, {})
        return "/".join(Path(start.source).parts[-2:])

    assert taken() == "4/iteration_01.pt"
    save_checkpoint(first.with_name("iteration_01.pt"), made("first", within, ranks=SMALLER))
    second.with_name("iteration_01.pt").unlink()
    assert taken() == "3/iteration_01.pt", "the smallest within the budget, whatever stage 2 chose"
    first.with_name("iteration_01.pt").unlink()
    assert taken() == "3/best.pt"
    first.unlink()
    assert taken() == "5/iteration_01.pt"
    (second.parent.parent / "5" / "iteration_01.pt").unlink()
    with pytest.raises(UserError, match=r"no network of stage 2 is within 0\.1 of stage 1's accuracy"):
        taken()


def test_stage_3_names_what_is_against_the_only_run(tmp_path: Path):
    run_of(tmp_path, "1", checkpoint("pruned", gate="none", source="sp/shapes/resnet8/1/best.pt"))
    with pytest.raises(UserError, match=r"does not fit: checkpoint .* has no switches to train: train stage 1 with"):
        pruned_network(stage_3_settings(tmp_path), DATA)


def test_a_cascade_takes_the_networks_of_every_depth_that_is_named(tmp_path: Path):
    run_of(tmp_path, "1", checkpoint("sp"))
    deeper = build_network("resnet", depth=14, num_classes=3, width=4)
    path = stage_folder(tmp_path, "sp", "shapes", "resnet", 14) / "1" / BEST
    path.parent.mkdir(parents=True)
    save_checkpoint(path, replace(checkpoint("sp"), architecture=deeper.architecture, weights=deeper.state_dict()))
    given = main_cascade.Settings(data_dir="shapes", result_dir=str(tmp_path), depth=(8, 14), resize=8)
    found, _ = cascade_networks(given, DATA)
    assert [one.architecture["depth"] for _, one in found] == [8, 14]
    with pytest.raises(UserError, match="needs two networks or more, and there are 1"):
        cascade_networks(replace(given, depth=(14,)), DATA)


def test_a_cascade_takes_finished_runs_and_names_what_does_not_fit(tmp_path: Path):
    """Also through a link to a stage's folder, whose runs are named as they lie in the result folder."""
    for name, made in (("1", checkpoint("sp")), ("2", checkpoint("pruned", source="x", ranks=SMALL))):
        run_of(tmp_path / "elsewhere", name, made, iteration_01=made if made.stage == "pruned" else None)
    run_of(tmp_path / "elsewhere", "3", checkpoint("sp", accuracy=0.3), ended=False)
    run_of(tmp_path / "elsewhere", "4", checkpoint("sp", size=16))
    for stage in ("sp", "pruned"):
        (tmp_path / stage).symlink_to(tmp_path / "elsewhere" / stage)
    given = main_cascade.Settings(data_dir="shapes", result_dir=str(tmp_path), depth=(8,), resize=8)
    found, notes = cascade_networks(given, DATA)
    assert [path.parent.name for path, _ in found] == ["1", "2"]
    assert notes[0] == "networks of sp/shapes/resnet8/1, pruned/shapes/resnet8/2"
    assert "images of 16 pixels, not 8" in notes[1]


def test_stage_2_refuses_a_network_without_some_of_its_blocks(tmp_path: Path):
    network = build_network("resnet", depth=8, num_classes=3, width=4, fixed_switches={"blocks.1": 0})
    made = replace(checkpoint("rl_pruned"), architecture=network.architecture, weights=network.state_dict())
    save_checkpoint(tmp_path / "removed.pt", made)
    with pytest.raises(UserError, match=r"has removed blocks, .*or before_fixing\.pt beside it"):
        trained_network(settings(tmp_path, checkpoint=str(tmp_path / "removed.pt")), DATA)
