"""Two processes on the CPU give the result of one, and end together with one clear sentence.

Sums are the same up to the order of their terms, so numbers agree to float32's rounding, grown over some steps.
"""

import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
from commands import EPOCHS, ROOT, SCRIPTS, arguments, metrics, run, run_folder
from compare import assert_close
from forks import ENVIRONMENT, Forked
from simulated_gpu import simulated
from torch import nn

from training.forward import training_forward
from training.norms import with_shared_norms
from utils import parallel
from utils.data.batches import batch_ends, check_batches
from utils.errors import UserError
from utils.runs.run import BEST, LAST

TOLERANCE = {"rtol": 2e-3, "atol": 2e-4}
HELPER = ROOT / "tests" / "processes.py"


def together(*given: str) -> list[subprocess.CompletedProcess[str]]:
    """What two of the helper's processes, told by torchrun's environment where to meet, have said when they ended."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as long as they live
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    started = [Forked(HELPER, given, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    return [forked.finished(timeout=300) for forked in started]


@pytest.fixture(scope="module")
def two(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[subprocess.CompletedProcess[str]]]:
    """What two processes have left behind, and how they ended."""
    folder = tmp_path_factory.mktemp("two")
    return folder, together("all", str(folder), str(shapes))


def test_a_mistake_of_one_process_is_one_sentence_and_ends_the_others(two):
    """One process alone speaks on the other channel; where one fails, the collectives of the others do."""
    first, second = two[1]
    assert (second.returncode, second.stderr, second.stdout) == (2, "error: process 1 has found a mistake\n", "")
    assert first.returncode == 2 and first.stderr.count("\n") == 1
    assert first.stderr.startswith("error: another process of this run has ended, so process 0 of 2 ends too")
    assert first.stdout.count("| w/ Static and Dynamic Pruning |") == 1


def test_what_the_first_process_finds_or_refuses_counts_for_both(two):
    found = [torch.load(two[0] / f"found.{rank}") for rank in range(2)]
    assert found == 2 * [["process 0 finds", "process 0 refuses"]]


def test_training_measuring_and_evaluating(two):
    """Both recipes and modes of batch norms, uneven parts, blocks that a process or all of them skip."""
    found, other = (torch.load(two[0] / f"measured.{rank}", weights_only=False) for rank in range(2))
    alone = processes.all_figures()
    for name, expected in alone.items():
        assert_close(found[name], expected, name, **TOLERANCE)
    # Weights after the same sums are the same to the last bit in both processes, or they would drift apart.
    for name in set(alone) - {"measured"}:
        assert_close(found[name]["weights"], other[name]["weights"], name)
    # Nothing grows over steps here: rounding alone, but where it has gone through least squares of a few images.
    for numbers in (found["measured"], alone["measured"]):
        del numbers["refitted"]
    assert_close(found["measured"], alone["measured"], "measured", rtol=1e-4, atol=1e-6)


def test_the_three_stages(two, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    processes.chain(shapes, tmp_path / "one")
    for stage in SCRIPTS:
        folder, alone = (run_folder(results, stage) for results in (two[0] / "two", tmp_path / "one"))
        names = {path.name for path in alone.iterdir() if not path.name.startswith("events.")}
        assert {path.name for path in folder.iterdir() if not path.name.startswith("events.")} == names
        assert len(list(folder.glob("events.*"))) == 1, "one process writes"
        assert_close(metrics(folder), metrics(alone), stage, **TOLERANCE)
        for name in (BEST, LAST):
            a, b = (torch.load(path / name, weights_only=True) for path in (folder, alone))
            assert a["architecture"] == b["architecture"], f"{stage}: the same ranks"
            # Decompositions and least squares magnify rounding, and so does the gates' Adam, whose steps are of one
            # size for gradients of any size.
            tolerance = TOLERANCE if stage == "sp" else {"rtol": 2e-3, "atol": 3e-3}
            assert_close(a["weights"], b["weights"], f"{stage}.{name}", **tolerance)
            for checkpoint in (a, b):  # a digest, which rounding changes
                checkpoint["progress"].pop("source_weights")
            assert_close(a["progress"], b["progress"], f"{stage}.{name}", **TOLERANCE)
            if name == LAST:
                # Momentum is of the size of gradients, a hundred times that of the steps that the weights have taken.
                assert_close(a["training"], b["training"], f"{stage}.{name}", rtol=0.05, atol=3e-2)


def test_a_process_that_dies_ends_the_run_which_can_be_resumed(chain: Path, shapes: Path, tmp_path: Path):
    """By torchrun itself; what it leaves is gone on with by one process and ends where that alone would have ended."""
    given = arguments("sp", shapes, tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(HELPER), "lose"]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "-", *given], env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode != 0
    last = torch.load(run_folder(tmp_path, "sp") / LAST, weights_only=True)
    assert last["progress"]["step"] in (2, 3)
    run("sp", [*given, "--resume"])
    resumed, whole = metrics(run_folder(tmp_path, "sp")), metrics(run_folder(chain, "sp"))
    assert [line["step"] for line in resumed] == list(range(1, EPOCHS["sp"] + 1))
    assert_close(resumed, whole, "metrics", rtol=0.02, atol=2e-3)


def test_gpus_together_do_what_one_does(tmp_path: Path):
    """Simulated ones: norms over uneven parts of batches, gradients and rewards summed, in few steps of float32."""
    for done in together("gpus", str(tmp_path)):
        assert (done.returncode, done.stderr) == (0, "")
    alone = processes.on_gpus()
    found, other = (torch.load(tmp_path / f"gpus.{rank}", weights_only=False) for rank in range(2))
    assert_close(found, alone, "gpus", **TOLERANCE)
    for name in alone:
        assert_close(found[name]["weights"], other[name]["weights"], name)


def test_what_is_sent_to_other_processes_is_on_no_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda values, source: None)
    with simulated():
        sent = {"network": torch.nn.Linear(2, 2).to("cuda"), "factor": torch.ones(2, device="cuda")}
        received = parallel.broadcast_object(sent)
    assert type(received["factor"]) is torch.Tensor and type(received["network"].weight.data) is torch.Tensor
    assert torch.equal(received["factor"], torch.ones(2))


def test_batches_must_go_round(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parallel, "world_size", lambda: 4)
    check_batches(100, 4)
    with pytest.raises(UserError, match="4 processes cannot share batches of 3 images"):
        check_batches(100, 3)
    assert batch_ends(11, 4) == [4, 11] and batch_ends(12, 4) == [4, 8, 12]


def test_a_shared_norm_in_bf16_rounds_its_output_alone():
    shared, plain = with_shared_norms(nn.Sequential(nn.BatchNorm2d(4)))[0], nn.BatchNorm2d(4)
    x = (torch.randn(32, 4, 6, 6) * 0.1 + 3).bfloat16()
    expected = plain(x.float())
    y = shared(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(shared.running_mean, plain.running_mean, rtol=1e-6, atol=1e-6)


def test_processes_that_torchrun_has_not_started(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(
        UserError, match="WORLD_SIZE is 2, but LOCAL_RANK is not set: start the processes with torchrun"
    ):
        parallel.distributed(lambda: None)()


def test_several_processes_do_not_compile(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    with pytest.raises(UserError, match="compile works in one process and 2 share this run: leave it out"):
        training_forward(nn.Linear(2, 2), compiled=True)
