"""Results of runs that end at the same moment, of damaged files, without locks; their tables; timing in turns."""

import errno
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import holding
from networks import checkpoint_file, lively_network, varied_images

from deploy import speeds, timing
from deploy.timing import Timing, alternated
from training import report as reporting
from utils.data.images import ImageSet
from utils.errors import UserError
from utils.runs import records, results
from utils.runs.checkpoint import load_checkpoint
from utils.runs.run import BEST, Run, stage_folder

RUN_NAMES = ("20250101-000000", "20250101-000000-2")


def record(stage: str, name: str, source: str | None = None, **changed: object) -> dict:
    return {
        "method": records.METHODS[stage], "stage": stage, "dataset": "shapes", "network": "resnet", "depth": 8,
        "width": 8, "accuracy": 0.9, "gflops": 0.1, "compression": 0.5, "parameters": 10, "computation": 0.5,
        "checkpoint": f"{stage}/shapes/resnet8/{name}/best.pt", "source": source, "selected_on": "validation",
        "points": [], "within_budget": True, "seed": 0, "image_size": 8, "latency_ms": None, "throughput": None,
        "accuracy_every_block": changed.get("accuracy", 0.9), **changed,
    }  # fmt: skip


def folder_of(result_dir: Path, made: dict) -> Path:
    folder = (result_dir / made["checkpoint"]).parent
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def saved(result_dir: Path, made: dict) -> dict:
    (folder_of(result_dir, made) / "record.json").write_text(json.dumps(made))
    return made


def finished_run(result_dir: Path, name: str) -> Run:
    """A run of stage 1 with its network, as it is before its report."""
    folder = stage_folder(result_dir, "sp", "shapes", "resnet", 8) / name
    folder.mkdir(parents=True)
    checkpoint_file(folder / BEST, lively_network("sp", "rnn"), "sp")
    return Run(folder)


def reported(result_dir: Path, run: Run, measure_speeds: reporting.MeasureSpeeds) -> dict:
    test = ImageSet(varied_images(8), torch.arange(8) % 10)
    best = load_checkpoint(run.path / BEST)
    with run:
        return reporting.report(result_dir, run, reporting.Chosen(best, "validation"), test, measure_speeds)


def test_runs_that_end_at_the_same_moment_lose_nothing(tmp_path):
    """Both measure, which takes seconds, before either writes what it measured."""
    measuring = threading.Barrier(2, timeout=60)

    def measure_speeds(files, pixels):
        measuring.wait()
        numbers = {name: 1.0 + RUN_NAMES.index(Path(name).parent.name) for name in files}
        return {name: {"latency_ms": number, "throughput": 9.0} for name, number in numbers.items()}

    runs = [finished_run(tmp_path, name) for name in RUN_NAMES]
    with ThreadPoolExecutor(2) as both:
        assert len(list(both.map(lambda run: reported(tmp_path, run, measure_speeds), runs))) == 2
    content = json.loads((tmp_path / "results.json").read_text())
    assert [Path(r["checkpoint"]).parent.name for r in content] == list(RUN_NAMES)
    assert [(r["latency_ms"], r["throughput"]) for r in content] == [(1.0, 9.0), (2.0, 9.0)]
    assert [json.loads((run.path / "record.json").read_text()) for run in runs] == content
    assert "2.00 ms" in (tmp_path / "results.md").read_text(), "the table shows the newest run"


def test_speeds_of_the_chain_go_into_the_record(tmp_path):
    """No speed of another measurement stands beside them; records of other runs stay as they are."""
    start = saved(tmp_path, record("sp", "20240101-000000"))
    pruned = saved(tmp_path, record("pruned", "20240102-000000", start["checkpoint"], latency_ms=7.0))
    run = finished_run(tmp_path, RUN_NAMES[0])
    best = load_checkpoint(run.path / BEST)
    best.source = pruned["checkpoint"]
    speeds = {start["checkpoint"]: {"latency_ms": 3.0, "throughput": 4.0}}
    with run:
        own = reporting.report(
            tmp_path, run, reporting.Chosen(best, "validation"), ImageSet(varied_images(8), torch.arange(8)),
            lambda files, pixels: speeds | {list(files)[-1]: {"latency_ms": 5.0, "throughput": 6.0}},
        )  # fmt: skip
    assert [json.loads((folder_of(tmp_path, r) / "record.json").read_text()) for r in (start, pruned, own)] == [
        start,
        pruned,
        own,
    ]
    assert [measured["latency_ms"] for measured in own["chain_speeds"].values()] == [3.0, None, 5.0]
    rows = [line.split(" | ")[6] for line in (run.path / "log.txt").read_text().splitlines() if line.startswith("| w")]
    assert rows == ["3.00 ms", "–", "5.00 ms"] and own["latency_ms"] == 5.0


def test_the_oldest_run_comes_first(tmp_path):
    """Runs that do not say when they started by name, stage and file, whatever the file system's order."""
    names = {"rl_pruned": ["20250101-000000"], "pruned": ["20250101-000000", "20241231-235959-name"]}
    names["sp"] = ["20250101-000000-2", "20250101-000000"]
    made = [saved(tmp_path, record(stage, name)) for stage, own in names.items() for name in own]
    assert records.read_records(tmp_path) == [made[i] for i in (2, 4, 1, 0, 3)]
    assert records.read_records(tmp_path / "none") == []


@pytest.mark.parametrize("content", ["", "{"])
def test_a_damaged_record_is_named(tmp_path, content):
    file = folder_of(tmp_path, record("sp", RUN_NAMES[0])) / "record.json"
    file.write_text(content)
    message = rf"^{file} cannot be read \(.*\): move it away, then .* --resume, which makes a new one$"
    with pytest.raises(UserError, match=message):
        records.read_records(tmp_path)


def test_a_run_whose_folder_was_renamed_keeps_its_place(tmp_path):
    """In the chain of runs that were made from it before and after."""
    start = saved(tmp_path, record("sp", "20240101-000000"))
    before = saved(tmp_path, record("pruned", "20240102-000000", start["checkpoint"]))
    folder_of(tmp_path, start).rename(tmp_path / "sp/shapes/resnet8/baseline")
    after = saved(tmp_path, record("pruned", "20240103-000000", "sp/shapes/resnet8/baseline/best.pt"))
    found = records.read_records(tmp_path)
    for made in (before, after):
        last = next(r for r in found if r["checkpoint"] == made["checkpoint"])
        chain = [r["checkpoint"] for r in records.latest_chain(found, last)]
        assert chain == ["sp/shapes/resnet8/baseline/best.pt", made["checkpoint"]]


def test_a_damaged_record_of_another_run_keeps_none_from_being_saved(tmp_path):
    (folder_of(tmp_path, record("sp", RUN_NAMES[0])) / "record.json").write_text("{")
    run = finished_run(tmp_path, RUN_NAMES[1])
    with pytest.raises(UserError, match=f"{RUN_NAMES[0]}/record.json cannot be read"):
        reported(tmp_path, run, lambda files, pixels: {})
    assert json.loads((run.path / "record.json").read_text())["stage"] == "sp"


def table_rows(table: str) -> list[list[str]]:
    """The accuracies of each table in turn."""
    sections = table.split("## ")[1:]
    return [[line.split(" | ")[1] for line in part.splitlines() if line.startswith("| w")] for part in sections]


def two_chains(**changed: object) -> list[dict]:
    """Two of one data set and network, whose runs took turns, and a run of stage 1 that is newer than both."""
    first = record("sp", "1", accuracy=0.91, gate="rnn", **changed)
    second = record("sp", "2", accuracy=0.92, gate="none")
    pruned = [record("pruned", "3", second["checkpoint"], accuracy=0.82)]
    pruned.append(record("pruned", "4", first["checkpoint"], accuracy=0.81))
    switched = record("rl_pruned", "5", pruned[1]["checkpoint"], accuracy=0.71)
    return [first, second, *pruned, switched, record("sp", "6", accuracy=0.96)]


def test_every_chain_has_a_table_of_its_own_the_newest_first():
    table = results.results_table(two_chains())
    assert table_rows(table) == [["96.00%"], ["91.00%", "81.00%", "71.00%"], ["92.00%", "82.00%"]]
    assert "width 8, gate none, seed 0" in table and "width 8, gate rnn, seed 0" in table
    assert "Runs: `sp/shapes/resnet8/2`, `pruned/shapes/resnet8/3`" in table
    assert table.count("Accuracy is that on the test images.") == 1


def test_two_networks_of_one_network_are_two_chains():
    start = record("sp", "1", accuracy=0.9)
    later = [record("pruned", str(i), start["checkpoint"], accuracy=0.8 + i / 100) for i in (2, 3)]
    assert table_rows(results.results_table([start, *later])) == [["90.00%", "83.00%"], ["90.00%", "82.00%"]]


@pytest.mark.parametrize(("stage", "shown"), [("sp", 0.7), ("pruned", 0.7), ("rl_pruned", 0.6), ("cascade", 0.6)])
def test_a_row_has_the_accuracy_of_the_flops_that_it_shows(stage, shown):
    assert results.shown_accuracy({"stage": stage, "accuracy": 0.6, "accuracy_every_block": 0.7}) == shown


def test_footnotes_of_many_tables():
    """Each is written once; those that name a source have a mark of their own for each."""
    made = two_chains(selected_on="test")
    made[2] |= {"source": "sp/shapes/resnet8/2/other.pt", "selected_on": "test"}
    made[3] |= {"source": "sp/shapes/resnet8/1/iteration_01.pt", "within_budget": False}
    table = results.results_table(made)
    assert [table.count(f"[^{mark}]") for mark in ("test", "budget", "source", "source2")] == [3, 2, 2, 2]
    assert [table.count(f"[^{mark}]:") for mark in ("test", "budget", "source", "source2")] == [1, 1, 1, 1]


def test_a_table_shows_the_speeds_that_were_measured_together():
    """Of a run of stage 1 that two chains have, the later chain's measurement is in its record."""
    start = record("sp", "1", latency_ms=3.0, throughput=3.0)
    chains = []
    for name, speed in (("2", 2.0), ("3", 3.0)):
        end = record("pruned", name, start["checkpoint"], latency_ms=speed / 2, throughput=2 * speed)
        speeds = {start["checkpoint"]: {"latency_ms": speed, "throughput": speed}}
        speeds[end["checkpoint"]] = {"latency_ms": speed / 2, "throughput": 2 * speed}
        chains.append(end | {"chain_speeds": speeds})
    table = results.results_table([start, *chains])
    latencies = [line.split(" | ")[6] for line in table.splitlines() if line.startswith("| w")]
    assert latencies == ["3.00 ms", "1.50 ms", "2.00 ms", "1.00 ms"]


@pytest.mark.parametrize("images", ["validation", "test"])
def test_the_picture_says_which_images_the_iterations_were_measured_on(images):
    points = [{"iteration": 1, "gflops": 0.05, "accuracy": 0.8, "measured_on": images}]
    (axis,) = results.results_picture([record("pruned", "1", points=points)]).axes
    assert any(f"iterations, on the {images} images" in text.get_text() for text in axis.get_legend().get_texts())


def test_another_process_waits_and_a_dead_one_lets_go(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(records, "PATIENCE", 0.1)
    held = "from utils.runs.records import results_locked\nlock = results_locked(path, print)\nlock.__enter__()"
    with holding(held, tmp_path), records.results_locked(tmp_path, said.append):
        assert len(said) == 1 and f"{tmp_path} cannot be locked" in said[0], "it goes on when patience ends"
    with records.results_locked(tmp_path, said.append):
        assert len(said) == 1


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")])
def test_a_file_system_without_locks(tmp_path, monkeypatch, error):
    def acquire(self):
        raise error

    monkeypatch.setattr(records.FileLock, "acquire", acquire)
    run = finished_run(tmp_path, RUN_NAMES[0])
    reported(tmp_path, run, lambda files, pixels: {})
    assert len(json.loads((tmp_path / "results.json").read_text())) == 1
    assert f"{tmp_path} cannot be locked ({error})" in (run.path / "log.txt").read_text()


def test_times_are_averages_over_items_that_differ(monkeypatch):
    """By a clock that the competitors move themselves."""
    runs, clock = [], [0.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def takes(name, seconds):
        def run(item):
            runs.append(name)
            clock[0] += seconds(item)

        return run

    competitors = {"fast": takes("f", lambda i: 1.0), "slow": takes("s", lambda i: 10.0 * i)}
    timings = alternated(competitors, items=3, seconds=0, least=3)
    assert timings["slow"] == Timing(10.0, 10.0, 10.0)  # items of 0, 10 and 20 s
    assert timings["fast"] == Timing(1.0, 1.0, 1.0)
    assert runs.count("f") == runs.count("s") == 12, "three rounds of three items, and one that is not counted"
    assert all(set(runs[i : i + 2]) == {"f", "s"} for i in range(0, len(runs), 2)), "competitors take turns"


@pytest.fixture
def chain(tmp_path):
    made, source = [], None
    for stage in ("sp", "pruned", "rl_pruned"):
        (tmp_path / stage).mkdir()
        checkpoint_file(tmp_path / stage / "best.pt", lively_network(stage, "rnn"), stage)
        made.append(record(stage, "", source, checkpoint=f"{stage}/best.pt"))
        source = f"{stage}/best.pt"
    return made


def test_checkpoint_that_is_gone_has_a_dash(chain, tmp_path):
    (tmp_path / "sp" / "best.pt").unlink()
    chain[-1]["chain_speeds"] = speeds.measured_speeds(
        {made["checkpoint"]: tmp_path / made["checkpoint"] for made in chain}, varied_images(20)
    )
    table = results.results_table(chain)
    assert table.count("| – | – |") == 1 and "not measured; it needs the row's checkpoint" in table
    results.results_picture(chain)
