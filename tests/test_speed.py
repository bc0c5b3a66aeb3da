"""Timing in turns, and the columns and the panel made from it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from networks import checkpoint_file, lively_network, varied_images
from test_records import record

from deploy import speeds, timing
from deploy.timing import Timing, alternated
from utils.runs import records as run_records
from utils.runs import results


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
    assert timings["slow"] == Timing(10.0, 10.0, 10.0, rounds=3, items=3)  # items of 0, 10 and 20 s
    assert timings["fast"] == Timing(1.0, 1.0, 1.0, rounds=3, items=3)
    assert runs.count("f") == runs.count("s") == 12, "three rounds of three items, and one that is not counted"
    assert all(set(runs[i : i + 2]) == {"f", "s"} for i in range(0, len(runs), 2)), "competitors take turns"


@pytest.fixture
def chain(tmp_path):
    records, source = [], None
    for stage in ("sp", "pruned", "rl_pruned"):
        (tmp_path / stage).mkdir()
        checkpoint_file(tmp_path / stage / "best.pt", lively_network(stage, "rnn"), stage)
        records.append(record(stage, "", source, checkpoint=f"{stage}/best.pt"))
        source = f"{stage}/best.pt"
    return records


def with_speeds(chain: list[dict], folder: Path) -> list[dict]:
    """The records with what is measured of their checkpoints, as a report joins them."""
    files = {made["checkpoint"]: folder / made["checkpoint"] for made in chain}
    measured = speeds.measured_speeds(files, varied_images(20))
    return [made | measured.get(made["checkpoint"], run_records.NOT_MEASURED) for made in chain]


def test_checkpoint_that_is_gone_has_a_dash(chain, tmp_path, monkeypatch):
    (tmp_path / "sp" / "best.pt").unlink()
    records = with_speeds(chain, tmp_path)
    assert [made["latency_ms"] is None for made in records] == [True, False, False]
    table = results.results_table(records)
    assert table.count("| – | – |") == 1 and "not measured; it needs the row's checkpoint" in table
    results.results_picture(records)


def test_a_chain_that_leads_back_to_itself_ends(chain):
    chain[0]["source"] = chain[-1]["checkpoint"]
    assert run_records.latest_chain(chain) == chain
    chain[-1]["source"] = chain[-1]["checkpoint"]
    assert run_records.latest_chain(chain) == chain[-1:]
