"""What TensorBoard is given of a run, read back by TensorBoard's own reader."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from networks import checkpoint_file, lively_network
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata
from tensorboard.util.tensor_util import make_ndarray

from utils.runs.checkpoint import load_checkpoint
from utils.runs.run import LAST, LastRun, Run
from utils.runs.tensorboard import hyperparameters, settings_table

SETTINGS = {"lr": 0.1, "bs": 64, "compile": False, "gate": "rnn", "target": None, "schedule": {"steps": [0.5, 0.75]}}
CHARTS = {"Overview": {"accuracy": ["Overview/accuracy_.*"], "alpha": ["Overview/alpha"]}}
LAYOUT = "custom_scalars__config__"


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The folder of a run that has ended after three steps, and was reopened to report again."""
    with Run.new(tmp_path / "sp" / "shapes" / "resnet8", SETTINGS, CHARTS) as run:
        for step in (1, 2, 3):
            run.record(step, {"Overview/accuracy_val": step / 10}, **{"Layers/parameters/stem.0": 432})
        report(run, 0.7)
    checkpoint = load_checkpoint(checkpoint_file(run.path / LAST, lively_network("sp", "rnn"), "sp"))
    checkpoint.progress = {"step": 3}
    with Run.reopened(LastRun(run.path, checkpoint)) as again:
        report(again, 0.8)
    return run.path


def report(run: Run, accuracy: float) -> None:
    run.picture("results", Figure(figsize=(1, 1)))
    run.results("| method |\n|---|\n| none |", {"accuracy": accuracy})


def points(events: EventAccumulator, tag: str) -> list[tuple[int, object]]:
    """Step and value of every event of a tag, the first value of a text or picture."""
    return [(event.step, make_ndarray(event.tensor_proto).flat[0]) for event in events.Tensors(tag)]


def test_every_text_and_picture_is_there_once(finished: Path):
    events = EventAccumulator(str(finished)).Reload()
    assert set(events.Tags()["tensors"]) == {
        *(LAYOUT, metadata.SESSION_START_INFO_TAG, "settings/text_summary", "results/text_summary"),
        *("Overview/accuracy_val", "Overview-results/accuracy", "Pictures/results"),  # and nothing of layers
    }
    ((begun, settings),) = points(events, "settings/text_summary")
    assert begun == 0 and "| lr | 0.1 |" in settings.decode()
    ((ended, table),) = points(events, "results/text_summary")
    assert ended == 4 and table.decode().startswith("| method |")
    assert [step for step, _ in points(events, "Pictures/results")] == [4]
    assert [step for step, _ in points(events, "Overview/accuracy_val")] == [1, 2, 3]
    assert points(events, "Overview-results/accuracy") == [(4, pytest.approx(0.8))]
    assert len(points(events, LAYOUT)) == 1
    assert [path for path in finished.iterdir() if path.is_dir()] == [], "TensorBoard shows one run, not several"
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 1, "Layers/parameters/stem.0": 432, "Overview/accuracy_val": 0.1}


def test_the_overview_is_a_layout_of_charts(finished: Path):
    ((_, content),) = points(EventAccumulator(str(finished)).Reload(), LAYOUT)
    layout = layout_pb2.Layout.FromString(content)
    charts = {c.title: {chart.title: list(chart.multiline.tag) for chart in c.chart} for c in layout.category}
    assert charts == CHARTS


def test_settings_are_hyperparameters(finished: Path):
    events = EventAccumulator(str(finished)).Reload()
    content = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    start = metadata.parse_session_start_info_plugin_data(content)
    values = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    assert values == {"lr": 0.1, "bs": 64, "compile": False, "gate": "rnn", "schedule": '{"steps": [0.5, 0.75]}'}
    assert type(values["compile"]) is bool
    assert start.group_name == f"{finished.name} sp/shapes/resnet8", "equal settings or not, each run is its own trial"
    # A list of one stage's hyperparameters would hide those of the others.
    with pytest.raises(KeyError):
        events.SummaryMetadata(metadata.EXPERIMENT_TAG)


def test_types_of_hyperparameters():
    assert hyperparameters({"a": 1, "b": None, "c": [1, 2], "d": {}}) == {"a": 1, "c": "[1, 2]", "d": "{}"}
    table = settings_table({"name": "a|b\nc", "none": None})
    assert table.splitlines() == ["| setting | value |", "|---|---|", "| name | a\\|b c |", "| none | null |"]
