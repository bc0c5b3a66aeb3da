"""The study: networks of others as ours, cascades chosen on some images and measured on others, and the script."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from commands import ROOT
from networks import varied_images

from benchmarks.rival import imported
from benchmarks.study import Round, accuracies, draw, halves, mean_of, pictures_of, seeds_table, tables
from examples.cifar_resnet import CifarResNet
from gating.cascade_search import Candidate, Predictions
from utils.data.images import ImageSet


def test_a_network_of_others_is_the_same_as_ours(tmp_path):
    network = CifarResNet(2).eval()
    for name, value in network.named_buffers():
        if name.endswith("running_mean"):
            value.normal_()
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "net.th")
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(imported(tmp_path / "net.th", 14, 10)(x).logits, network(x), rtol=0, atol=1e-5)


def singles():
    given = {"family": "small", "given": True, "share": 1.0, "parameters": 10, "milliseconds": {"1": 1.0}}
    return [{**given, "name": "small", "accuracy": 0.6, "gflops": 1.0},
            {**given, "name": "large", "family": "large", "accuracy": 0.8, "gflops": 3.0,
             "milliseconds": {"1": 2.0}}]  # fmt: skip


@pytest.mark.parametrize("answer", ["last", "mean"])
def test_what_is_chosen_on_one_half_is_measured_on_the_other(answer):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (60,), generator=generator)
    p = [torch.randn(60, 3, generator=generator).softmax(1) for _ in range(2)]
    predictions = [Predictions(one, torch.full((60,), cost).double()) for one, cost in zip(p, (1e9, 3e9), strict=True)]
    rounds = halves(predictions, labels)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    chosen = [Candidate((0, 1), (threshold,), answer, 0.5, 1.0) for threshold in (0.5, 0.7)]
    right, spent = [], []
    for half, threshold in ((order[30:], 0.5), (order[:30], 0.7)):
        for i in half.tolist():
            answered, cost = p[0][i], 1.0
            if answered.max() < threshold:
                answered, cost = p[1][i] if answer == "last" else p[0][i] + p[1][i], 4.0
            right.append(answered.argmax() == labels[i])
            spent.append(cost)
    found = mean_of(chosen, rounds, singles())
    assert found["accuracy"] == pytest.approx(sum(right).item() / 60, abs=1e-12)
    assert found["gflops"] == pytest.approx(sum(spent) / 60, abs=1e-12)
    assert found["accuracy_where_chosen"] == 0.5, "as the search promised"
    assert found["chosen"][0]["members"] == ["small", "large"]
    assert mean_of([chosen[0], None], rounds, singles()) is None
    on_validation = mean_of(chosen[:1], [Round(predictions, labels, predictions, torch.arange(60), labels)], singles())
    assert on_validation["accuracies"] == [on_validation["accuracy"]]


def test_tables_and_picture():
    row = {"accuracy": 0.79, "accuracy_where_chosen": 0.8, "gflops": 1.5, "milliseconds": {"1": 1.25}}
    row["chosen"] = 2 * [{"members": ["small", "large"], "answer": "mean"}]
    found = {"reference": "large", "networks": singles(), "one_family": []}
    found["curve"] = [{"share": 0.6, **row}, {"share": 0.5, **row}]
    text = "\n".join(tables(found))
    lines = text.splitlines()
    assert all(lines[i - 1].count("|") == line.count("|") for i, line in enumerate(lines) if line.startswith("|---"))
    assert "| small | 60.00% | 1.000 | 3.0x | 2.0x | 10 |" in text
    assert "| 50.0% | 79.00% | 80.00% | 1.500 | 2.0x | 1.6x | small, large (mean) |" in text
    assert "| 60.0%" not in text and "one network" not in text
    found = {**found, "reference": "resnet56", "networks": [singles()[0], {**singles()[1], "name": "resnet56"}]}
    found["one_family"] = found["curve"][1:]
    assert tables(found)[-2].startswith("| 50.0% | 79.00%")
    labels = {text.get_text() for text in draw(found).axes[0].texts}
    assert {"small", "large", "cascades of all", "cascades of resnet56\nand its pruned versions", "DepGraph"} <= labels


def test_seeds_are_compared_network_by_network():
    records = []
    for accuracy in (0.5, 0.52, 0.57):
        pruned = {**singles()[0], "name": "small at 50%", "given": False, "accuracy": accuracy}
        records.append({"networks": [*singles(), pruned], "curve": [{"share": 0.25, "accuracy": accuracy + 0.1}]})
    lines = seeds_table([accuracies(one) for one in records])
    assert lines[0] == "| network | seed 0 | seed 1 | seed 2 | mean |"
    assert lines[2:] == [  # the deviation of a sample: sqrt((0.03^2 + 0.01^2 + 0.04^2) / 2) = 0.0361
        "| small at 50% | 50.00% | 52.00% | 57.00% | 53.00 ± 3.61% |",
        "| cascade, 25.0% of the FLOPs | 60.00% | 62.00% | 67.00% | 63.00 ± 3.61% |",
    ]


FAKE = r"""#!/usr/bin/env bash
# Each command takes two calls, the first of which is stopped; a run that reports leaves record.json.
echo "$*" >> "$CALLS"
shown=$(echo "$*" | md5sum | cut -c 1-32)
[ -z "${SECONDS_A_PIECE:-}" ] || [ -e "$CALLS.$shown" ] || { touch "$CALLS.$shown"; sleep 30; exit 1; }
[[ "$*" =~ (resnet|depth[=\ ])([0-9]+) ]] && depth=${BASH_REMATCH[2]}
[[ "$*" =~ --out\ ([^ ]+) ]] && mkdir -p "${BASH_REMATCH[1]}" && touch "${BASH_REMATCH[1]}/study.json" && exit 0
[[ "$*" =~ result_dir[=\ ]([^ ]+) ]] || exit 0
case $1 in
main_sp.py) stage=sp ;; main_prune.py) stage=pruned ;; main_cascade.py) stage=cascade ;; *) stage=rl_pruned ;;
esac
run="${BASH_REMATCH[1]}/$stage/pictures/resnet$depth/1"
mkdir -p "$run" && touch "$run/record.json" "$run/best.pt"
[ $stage != pruned ] || touch "$run/iteration_01.pt" ${LACKING-"$run/iteration_02.pt"}
"""


def commands_of(size: str, folder: Path, seeds: str = "1", tries: int = 40, **settings: str) -> list[str]:
    """What ``study.sh`` calls python with, until it has succeeded."""
    (folder / "bin").mkdir()
    (folder / "pictures").mkdir()
    fake, calls = folder / "bin" / "python", folder / "calls"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    settings |= {"PATH": f"{fake.parent}:{os.environ['PATH']}", "CALLS": str(calls), "PRECISION": "bf16"}
    settings |= {"DATA_DIR": str(folder / "pictures")}
    command = ["bash", str(ROOT / "scripts" / "study.sh"), size, str(folder / "results"), seeds]
    for _ in range(tries):
        if subprocess.run(command, env=os.environ | settings, capture_output=True).returncode == 0:
            break
    return calls.read_text().splitlines()


def test_the_yardstick_prunes_four_networks(tmp_path: Path):
    made = commands_of("yardstick", tmp_path, seeds="2")
    assert [line.split()[0] for line in made] == (["main_prune.py"] * 9 + ["-m"]) * 2 + ["-m"]
    depths = (20, 20, 20, 32, 44, 56, 56, 56, 56)
    assert all(f"cifar_resnet.py:resnet{depth} " in line for depth, line in zip(depths, made, strict=False))
    assert ["round_to=8" in line for line in made[:9]] == [False, True, True, False, False, False, True, False, True]
    assert ["seed=1" in line for line in made] == 10 * [False] + 9 * [True] + 2 * [False]
    folders = [str(tmp_path / "results" / f"seed_{seed}") for seed in (0, 1)]
    assert made[-1].split()[2:] == ["--seeds", *folders, "--out", str(tmp_path / "results")]


def test_every_stage_with_and_without_switches_piece_by_piece(tmp_path: Path):
    made = commands_of("cifar100", tmp_path, SECONDS_A_PIECE="1")
    names = [line.removeprefix("-m ").split()[0] for line in made]
    called = [name for name, before in zip(names, [None, *names], strict=False) if name != before]
    without = ["main_sp.py", "main_prune.py", "main_cascade.py", "benchmarks.study"]
    assert called == [*without[:2], *without, *without[:2], "main_rl_prune.py", *without[2:]]
    assert all(made.count(line) > 1 for line in made), "each was stopped once"
    first, second = dict.fromkeys(line for line in made if line.startswith("main_cascade.py"))
    assert "rl_pruned/pictures/resnet32/1/best.pt" in second
    assert first.count("best.pt") == 2 and first.count("iteration_") == 2 * 2 + 2, "of both depths, and the smaller one"
    depths = [line.split("--depth ")[1].split(" --")[0] for line in dict.fromkeys(made) if line.startswith("-m")]
    assert depths == ["20 32", "32"]
    trained = ("main_sp.py", "main_prune.py", "main_rl_prune.py")
    assert "--gate none" in made[0] and all("bf16" in line for line in made if line.startswith(trained))
    taken = [line.split("\t") for line in (tmp_path / "results" / "commands.tsv").read_text().splitlines()]
    assert [line.replace("'", "").removeprefix("python ").strip() for _, line in taken] == made


def test_a_study_whose_second_stage_ended_early_says_so(tmp_path: Path):
    made = commands_of("cifar100", tmp_path, tries=1, LACKING="")
    assert made[-1].startswith("main_prune.py") and not any("/smaller " in line for line in made)


def test_the_pictures_are_of_the_images_that_were_measured():
    """Those that the first network keeps come first, then by its confidence."""
    labels = torch.arange(8) % 2
    first = torch.tensor([0.9, 0.8, 0.6, 0.7, 0.5, 0.55, 0.95, 0.65])
    predictions = Predictions(torch.stack([first, 1 - first], dim=1), torch.ones(8).double())
    measured = torch.tensor([7, 6, 5, 4, 3, 2, 1, 0])
    one_round = Round([], labels, [predictions, predictions], measured, labels[measured])
    candidate, test = Candidate((0, 1), (0.75,), "last", 0.5, 1.0), ImageSet(varied_images(8), labels)
    (name, bars), (page, shown) = pictures_of(candidate, one_round, test, ["a", "b"])
    assert (name, page) == ("answered_by_class", "easy_and_hard") and len(bars.axes) == 1
    titles = [axis.get_title() for axis in shown.axes if axis.get_title()]
    assert titles[:4] == ["network 1: 80%", "network 2: 70%", "network 2: 65%", "network 2: 55%"]
    assert pictures_of(Candidate((0,), (), "last", 0.5, 1.0), one_round, test, ["a", "b"]) == []
