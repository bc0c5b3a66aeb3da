"""Timing in turns, and the columns and the panel made from it."""

import sys
import time

import pytest
import torch
from networks import lively_network, varied_images
from test_export import checkpoint_file

from deploy import speeds
from deploy.timing import alternated
from utils import results


def test_times_are_averages_over_items_that_differ():
    runs = []
    fast, slow = lambda i: (runs.append("f"), time.sleep(0.001)), lambda i: (runs.append("s"), time.sleep(0.01 * i))
    timings = alternated({"fast": fast, "slow": slow}, items=3, seconds=0, least=3)
    assert timings["slow"].median == pytest.approx(0.01, rel=0.5)  # sleeps of 0, 10 and 20 ms
    assert timings["slow"].lower_quartile <= timings["slow"].upper_quartile
    assert (timings["slow"].rounds, timings["slow"].items) == (3, 3)
    assert timings["fast"].median < timings["slow"].median
    assert runs.count("f") == runs.count("s") == 12
    assert all(set(runs[i : i + 2]) == {"f", "s"} for i in range(0, len(runs), 2)), "competitors take turns"


@pytest.fixture
def chain(tmp_path):
    records, source = [], None
    for stage in ("sp", "pruned", "rl_pruned"):
        (tmp_path / stage).mkdir()
        checkpoint_file(tmp_path / stage / "best.pt", lively_network(stage, "rnn"), list("abcdefghij"), stage)
        records.append(
            {
                "method": results.METHODS[stage], "stage": stage, "dataset": "shapes", "network": "resnet", "depth": 8,
                "width": 8, "accuracy": 0.9, "gflops": 0.1, "compression": 0.5, "parameters": 10, "computation": 0.5,
                "checkpoint": f"{stage}/best.pt", "source": source, "selected_on": "validation", "points": [],
            }
        )  # fmt: skip
        source = f"{stage}/best.pt"
    return records


def measure(records, folder, pixels):
    """Fill in what ``utils.results.report`` asks for."""
    found = speeds.measured_speeds({r["checkpoint"]: folder / r["checkpoint"] for r in records}, pixels)
    for record in records:
        record.update(found.get(record["checkpoint"], results.NOT_MEASURED))


def test_every_method_of_a_chain_is_measured(chain, tmp_path, monkeypatch):
    monkeypatch.setattr(speeds, "SECONDS", 0.1)
    started = time.perf_counter()
    measure(chain, tmp_path, varied_images(20))
    assert time.perf_counter() - started < 15
    assert all(record["latency_ms"] > 0 and record["throughput"] > 0 for record in chain)
    table = results.results_table(chain)
    assert table.count(" ms |") == 3 and table.count("/s |") == 3 and "not measured" not in table
    results.draw_results(chain, tmp_path / "results.png")
    assert (tmp_path / "results.png").stat().st_size > 0


def test_checkpoint_that_is_gone_has_a_dash(chain, tmp_path, monkeypatch):
    monkeypatch.setattr(speeds, "SECONDS", 0.1)
    (tmp_path / "sp" / "best.pt").unlink()
    measure(chain, tmp_path, varied_images(20))
    assert [record["latency_ms"] is None for record in chain] == [True, False, False]
    assert "| – | – |" in results.results_table(chain) and "not measured" in results.results_table(chain)
    results.draw_results(chain, tmp_path / "results.png")


def test_without_onnx_runtime_the_columns_have_a_dash(chain, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "deploy.session", None)
    results.measure_speeds(chain, tmp_path, torch.zeros(4, 3, 16, 16, dtype=torch.uint8))
    table = results.results_table(chain)
    assert table.count("| – | – |") == 3 and "onnxruntime" in table
    results.draw_results(chain, tmp_path / "results.png")


def test_a_chain_that_leads_back_to_itself_ends(chain):
    chain[0]["source"] = chain[-1]["checkpoint"]
    assert results.latest_chain(chain) == chain
    chain[-1]["source"] = chain[-1]["checkpoint"]
    assert results.latest_chain(chain) == chain[-1:]


def test_a_row_made_from_another_network_than_the_one_above_says_so(chain):
    assert "[^source]" not in results.results_table(chain)
    chain[2]["source"] = "pruned/iteration_01.pt"
    table = results.results_table(chain)
    assert table.count("[^source]") == 2 and "made from pruned/iteration_01.pt" in table


def test_records_of_older_runs_have_a_dash(chain):
    assert results.results_table(chain).count("| – | – |") == 3
