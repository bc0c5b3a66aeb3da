"""Run folders: their order, what a full disk does to them, what killed runs leave, and what TensorBoard is given."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata
from tensorboard.util.tensor_util import make_ndarray
from test_checkpoint import files_of_at_most

from utils.errors import UserError, run_command
from utils.files import write_json
from utils.runs.run import ARGUMENTS, FINISHED, LAST, METRICS, Run, age, choose_run
from utils.runs.tensorboard import hyperparameters, settings_table
from utils.settings import setting


@dataclass(frozen=True, kw_only=True)
class Two:
    lr: float = setting(0.1, "")
    num_workers: int = setting(1, "")


def folder(parent: Path, name: str, started: str | None = None, finished: tuple[str, ...] = (), **arguments) -> Path:
    """The folder of a run that can go on."""
    path = parent / name
    path.mkdir(parents=True)
    (path / LAST).touch()
    write_json(path / ARGUMENTS, arguments | ({} if started is None else {"started": started}))
    for last in finished:
        (path / last).touch()
    return path


def test_runs_are_ordered_by_when_they_were_started(tmp_path: Path):
    """In UTC, whatever their names say; those that do not say it come first, by their names."""
    expected = [
        folder(tmp_path, "20270101-000000"),
        folder(tmp_path, "20270102-000000"),
        folder(tmp_path, "20260701-110000-10", "2026-07-01T09:00:00+00:00"),
        folder(tmp_path, "20260701-060000", "2026-07-01T06:00:00-04:00"),
        folder(tmp_path, "20260701-100000-2", "2026-07-01T10:30:00.5+00:00"),
    ]
    assert sorted(reversed(expected), key=age) == expected


def test_a_run_that_has_not_ended_goes_on_first(tmp_path: Path):
    folder(tmp_path, "20260101-000000", lr=0.1)
    killed = folder(tmp_path, "20260102-000000", lr=0.1, num_workers=4)  # which may differ
    folder(tmp_path, "20260103-000000", lr=0.2)
    folder(tmp_path, "20260104-000000", lr=0.1, finished=FINISHED)
    newest = folder(tmp_path, "20260105-000000", lr=0.3, finished=FINISHED)
    unrecorded = folder(tmp_path, "20260106-000000", lr=0.5, finished=FINISHED[1:])
    folder(tmp_path, "20260107-000000", lr=0.5, finished=FINISHED)
    assert choose_run(tmp_path, Two(lr=0.5)) == unrecorded
    assert choose_run(tmp_path, Two()) == killed
    assert choose_run(tmp_path, Two(lr=0.3)) == newest
    assert choose_run(tmp_path, Two(lr=0.4)) is None


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path):
    with Run(tmp_path) as run:
        run.record(1, {"a": 1.0})
    with files_of_at_most(0), pytest.raises(UserError, match=f"run folder {tmp_path} cannot be written"):
        Run(tmp_path, purge_after=1)
    Run(tmp_path, purge_after=1).close()  # and the folder is free again


def test_whatever_else_cannot_be_written_is_one_sentence(tmp_path: Path, capsys):
    with files_of_at_most(0), pytest.raises(SystemExit) as ended:
        run_command(lambda: write_json(tmp_path / "x.json", {}))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert "cannot be written (File too large): free disk space or fix permissions; what was saved is kept" in said


def test_a_resumed_run_purges_what_it_repeats(tmp_path: Path):
    """And a line that was cut short when the run was killed."""
    with Run(tmp_path) as run:
        run.record(1, {"a": 1.0})
        run.record(2, {"a": 2.0})
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 3, "a')
    with Run(tmp_path, purge_after=1) as run:
        run.record(2, {"a": 3.0})
    assert run.recorded() == [{"step": 1, "a": 1.0}, {"step": 2, "a": 3.0}]
    scalars = EventAccumulator(str(tmp_path)).Reload().Tensors("a")
    assert [(event.step, event.tensor_proto.float_val[0]) for event in scalars] == [(1, 1.0), (2, 3.0)]


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
    with Run(run.path, purge_after=3) as again:
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
