"""The study's measurements at a tiny size, and its tables by hand."""

import json
import os
import shutil
import statistics
import subprocess
from pathlib import Path

import pytest
import torch
from commands import FINE_TUNING, ROOT, run_folder

from benchmarks import alternatives, study
from benchmarks.alternatives import Same
from gating.fixing import BEFORE_FIXING
from models import all_on
from utils.flops import network_cost
from utils.runs.checkpoint import load_checkpoint
from utils.runs.run import BEST


@pytest.fixture(scope="module")
def studied(chain: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study's folder with two seeds (of the same runs) and the alternatives of one."""
    results = tmp_path_factory.mktemp("study")
    for seed in range(2):
        shutil.copytree(chain, results / f"seed_{seed}")
    given = ["alternatives", "--static", str(run_folder(chain, "pruned") / BEST)]
    given += ["--dynamic", str(run_folder(chain, "rl_pruned") / BEST), "--data_dir", str(shapes)]
    given += ["--dense", str(run_folder(chain, "sp") / BEST)]
    given += ["--epochs", "1", "--batch_size", "32", "--out", str(results / "alternatives_0")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", given)
        alternatives.main()
        before = (results / "alternatives_0.jsonl").read_text()
        alternatives.main()
    assert (results / "alternatives_0.jsonl").read_text() == before, "what is measured is not measured again"
    return results


def test_alternatives_execute_what_the_switches_execute_or_less(studied: Path, chain: Path):
    lines = [json.loads(line) for line in (studied / "alternatives_0.jsonl").read_text().splitlines()]
    by_method = {line["method"]: line for line in lines}
    measured = ["start", "switches", "random switches", "switches fixed", "pruned further", "blocks removed"]
    measured.append("Torch-Pruning")
    assert list(by_method) == measured and set(measured) == set(study.ALTERNATIVES)
    static = load_checkpoint(run_folder(chain, "pruned") / BEST)
    dynamic = load_checkpoint(run_folder(chain, "rl_pruned") / BEFORE_FIXING)
    cost = network_cost(static.network(), 8)
    assert by_method["start"]["gflops"] == pytest.approx(cost.flops / 1e9, rel=1e-12)
    target = dynamic.metrics["computation"] * network_cost(dynamic.network(), 8).flops / 1e9
    assert by_method["pruned further"]["gflops"] <= target * (1 + 1e-9)
    more, fewer = points = by_method["blocks removed"]["points"]
    for point in points:
        executed = cost.executed(torch.tensor(point["kept"])[None]).item() / 1e9
        assert point["gflops"] == pytest.approx(executed, rel=1e-12)
    assert more["gflops"] >= target * (1 - 1e-9), "the target lies between two sets of blocks"
    # Skipping every block may still take more than the switches, whose network may have left blocks out.
    assert by_method["blocks removed"]["gflops"] == pytest.approx(max(target, fewer["gflops"]), rel=1e-9)
    low, high = sorted(point["accuracy"] for point in points)
    assert low - 1e-9 <= by_method["blocks removed"]["accuracy"] <= high + 1e-9
    assert by_method["Torch-Pruning"]["gflops"] <= 1.02 * cost.flops / 1e9
    assert by_method["Torch-Pruning"]["epochs"] == static.progress["iteration"] * FINE_TUNING["epochs"]
    assert by_method["switches"]["bits_of_routes"] <= by_method["switches"]["bits"] + 1e-6
    record = json.loads((chain / "results.json").read_text())[2]
    assert by_method["switches fixed"]["accuracy"] == pytest.approx(record["accuracy"], abs=1e-12)
    assert by_method["switches fixed"]["gflops"] == pytest.approx(record["gflops"], rel=1e-9)
    # Fixing makes parameters leave, and each switch that is fixed may cost one percent of the FLOPs.
    assert by_method["switches fixed"]["parameters"] < by_method["switches"]["parameters"]
    assert by_method["switches fixed"]["gflops"] <= 1.02 * by_method["switches"]["gflops"]


def test_the_rule_that_is_the_same_for_all_images_removes_blocks(chain: Path):
    network = load_checkpoint(run_folder(chain, "sp") / BEST).network()
    x, rule = torch.randn(5, 3, 8, 8), Same(torch.tensor([1.0, 0.0]))
    for _ in range(2):
        assert network(x, decide=rule).decisions.tolist() == [[1.0, 0.0]] * 5
    assert torch.equal(network(x, decide=Same(torch.ones(2))).logits, network(x, decide=all_on).logits)


def test_tables_hold_means_and_deviations(studied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    path = studied / "seed_1" / "results.json"
    records = json.loads(path.read_text())
    records[0]["accuracy_every_block"] = 0.5
    path.write_text(json.dumps(records))
    measured = [
        {"variant": "random", "share": 0.5, "seed": n, "flops": 0.49, "test": t} for n, t in ((0, 0.5), (1, 0.6))
    ]
    (studied / "criteria.jsonl").write_text("".join(json.dumps(m) + "\n" for m in measured))
    took = [f"{seconds}\tpython main_sp.py --result_dir {studied}/seed_0 \n" for seconds in (1800, 3600)]
    (studied / "commands.tsv").write_text("".join(took))
    monkeypatch.setattr("sys.argv", ["study", str(studied), "--keep", str(tmp_path / "kept")])
    study.main()
    table = capsys.readouterr().out
    first = json.loads((studied / "seed_0" / "results.json").read_text())[0]["accuracy_every_block"]
    mean, deviation = 100 * statistics.mean([first, 0.5]), 100 * statistics.stdev([first, 0.5])
    assert f"| w/o Pruning | 2 | {mean:.2f} ± {deviation:.2f} % |" in table
    assert (
        "| (b) blocks removed for all images | 1 |" in table and "| (d) switches at random, same rates | 1 |" in table
    )
    assert "| random channels | 2 | 55.00 ± 7.07 % |" in table
    assert "    python main_sp.py --result_dir RESULTS/seed_0  # 1.5 h" in table, "pieces of a command add up"
    monkeypatch.setattr("sys.argv", ["study", str(tmp_path / "kept")])
    study.main()
    assert capsys.readouterr().out == table, "the records that were kept are enough"
    kept = [path for path in (tmp_path / "kept").rglob("*") if path.suffix in (".json", ".jsonl", ".tsv", ".md")]
    assert not any(str(studied) in path.read_text() for path in kept), "no path of this machine is kept"
    assert (tmp_path / "kept" / "passing_by_class.png").stat().st_size > 0
    assert not list((tmp_path / "kept").rglob("*.pt")) and (tmp_path / "kept" / "study.png").stat().st_size > 0


def test_methods_are_compared_seed_by_seed():
    switches = [{"seed": 0, "accuracy": 0.5}, {"seed": 1, "accuracy": 0.75}]
    others = [{"seed": 1, "accuracy": 0.875}, {"seed": 0, "accuracy": 0.25}, {"seed": 2, "accuracy": 0.9}]
    assert study.ahead(others, switches) == [0.125, -0.25]
    assert study.ahead(switches, switches) == []


def test_static_pruning_with_and_without_switches():
    def stages(whole: float, *points: float) -> dict:
        tried = [{"gflops": 0.01 / (i + 1), "accuracy": accuracy} for i, accuracy in enumerate(points)]
        return {"sp": [{"accuracy_every_block": whole}] * 2, "pruned": [{"points": tried}] * 2}

    with_, without = stages(0.8, 0.75, 0.7), stages(0.81, 0.8)
    assert study.static_pruning({"with switches": with_, "without": without})[5:] == [
        "| stage 1 | seeds | unpruned | 0.0100 GFLOPs |",
        "|---|---|---|---|",
        "| with switches | 2 | 80.00 ± 0.00 % | 75.00 ± 0.00 % |",
        "| without | 2 | 81.00 ± 0.00 % | 80.00 ± 0.00 % |",
    ]
    assert study.static_pruning({"with switches": with_, "without": {"sp": [], "pruned": []}}) == []


def test_the_study_names_what_it_does_not_know(tmp_path: Path):
    done = subprocess.run(["bash", ROOT / "scripts" / "study.sh", "tiny", tmp_path], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: study tiny is unknown: use yardstick, cifar100, small or full\n"


FAKE = r"""#!/usr/bin/env bash
# Each command takes two calls, the first of which is stopped; a run that reports leaves record.json.
echo "$*" >> "$CALLS"
shown=$(echo "$*" | md5sum | cut -c 1-32)
[ -z "${SECONDS_A_PIECE:-}" ] || [ -e "$CALLS.$shown" ] || { touch "$CALLS.$shown"; sleep 30; exit 1; }
[[ "$*" =~ (resnet|depth[=\ ])([0-9]+) ]] && depth=${BASH_REMATCH[2]}
[[ "$*" =~ result_dir[=\ ]([^ ]+) ]] || exit 0
case $1 in
main_sp.py) stage=sp ;; main_prune.py) stage=pruned ;; main_cascade.py) stage=cascade ;; *) stage=rl_pruned ;;
esac
run="${BASH_REMATCH[1]}/$stage/pictures/resnet$depth/1"
mkdir -p "$run" && touch "$run/record.json" "$run/best.pt"
"""


def commands_of(size: str, folder: Path, **settings: str) -> list[str]:
    """What ``study.sh`` calls python with, until it has succeeded."""
    (folder / "bin").mkdir()
    (folder / "pictures").mkdir()
    fake, calls = folder / "bin" / "python", folder / "calls"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    settings |= {"PATH": f"{fake.parent}:{os.environ['PATH']}", "CALLS": str(calls), "PRECISION": "bf16"}
    settings |= {"DATA_DIR": str(folder / "pictures")}
    command = ["bash", str(ROOT / "scripts" / "study.sh"), size, str(folder / "results")]
    for _ in range(40):
        if subprocess.run(command, env=os.environ | settings, capture_output=True).returncode == 0:
            break
    return calls.read_text().splitlines()


def test_the_studies_of_real_data(tmp_path: Path):
    (tmp_path / "yardstick").mkdir()
    (tmp_path / "cifar100").mkdir()
    made = commands_of("yardstick", tmp_path / "yardstick")
    assert [line.split()[0] for line in made] == ["main_prune.py"] * 4 + ["-m"]
    assert all(f"cifar_resnet.py:resnet{depth} " in line for depth, line in zip((20, 32, 44, 56), made, strict=False))
    made = commands_of("cifar100", tmp_path / "cifar100")
    stages = ["main_sp.py", "main_prune.py", "main_cascade.py"]
    assert [line.split()[0] for line in made] == [*stages, *stages[:2], "main_rl_prune.py", stages[2]]
    assert "--gate none" in made[0] and "--gate none" not in made[3]


def test_the_full_study_goes_on_piece_by_piece(tmp_path: Path):
    made = commands_of("full", tmp_path, SECONDS_A_PIECE="1")
    names = [line.removeprefix("-m ").split()[0] for line in made]
    stages = ["main_sp.py", "main_prune.py", "main_rl_prune.py"]
    stages += ["main_sp.py", "main_prune.py", "main_rl_prune.py"]  # without switches; with them, unpruned
    called = [name for name, before in zip(names, [None, *names], strict=False) if name != before]
    assert [name for name in called if name in stages] == stages
    assert names[-1] == "benchmarks.study" and all(made.count(line) > 1 for line in made), "each was stopped once"
    assert all("bf16" in line for line in made if "benchmarks.study" not in line)
    taken = [line.split("\t") for line in (tmp_path / "results" / "commands.tsv").read_text().splitlines()]
    assert [line.replace("'", "").removeprefix("python ").strip() for _, line in taken] == made
