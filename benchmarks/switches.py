"""Stage 3 from one network, by variant and seed: what the switches save, and what the batch norms have to do with it.

Method: ``main_rl_prune.py`` runs as a user runs it, once for each variant and seed, into a folder of its own below OUT;
a run that is there already is not repeated, one that was interrupted goes on.  What is reported comes from the runs'
own files: accuracy and computation on the validation images by epoch, and those of the chosen network on the test
images, against the network that stage 3 started from with every block run.

    python -m benchmarks.switches --checkpoint best.pt --data_dir data/cifar_10 --out results/switches
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.common import Trained, add_trained_arguments, beside, load_trained, machine
from models import all_on
from utils.errors import UserError, run_command

VARIANTS = {
    "steered, norms frozen": [],
    "steered, norms frozen, not distilled": ["--distill", "0"],
    "steered, norms re-estimated": ["--batch_norm", "reestimate"],
    "steered, norms follow": ["--batch_norm", "follow"],
    "fixed alpha, norms frozen": ["--fixed_alpha", "--distill", "0"],
    "fixed alpha, norms follow": ["--fixed_alpha", "--batch_norm", "follow", "--distill", "0"],  # as published, both
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Stage 3 by variant and seed.", allow_abbrev=False)
    add_trained_arguments(parser)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--bs", type=int, default=256)
    parser.add_argument("--lr", type=float, default=0.001)
    parser.add_argument("--alpha", type=float, default=0.1)
    parser.add_argument("--max_accuracy_drop", type=float, default=0.01, help="against stage 1, as in stage 3")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--out", default="switches", help="folder of the runs; the results beside it")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    out = Path(args.out)
    trained = load_trained(args)
    results = {}
    for seed in range(args.seeds):
        for variant in args.variants:
            results.setdefault(variant, []).append(run_stage(args, trained, out, variant, seed))
    before = {
        part: trained.evaluated(trained.network(), images, all_on).accuracy
        for part, images in (("validation", trained.splits.val), ("test", trained.splits.test))
    }
    content = {"machine": machine(), "settings": vars(args), "every block": before, "results": results}
    beside(out, ".json").write_text(json.dumps(content, indent=2))
    beside(out, ".md").write_text(table(results, before))
    draw(beside(out, ".png"), results, before["validation"])
    print(table(results, before))


def run_stage(args: argparse.Namespace, trained: Trained, out: Path, variant: str, seed: int) -> dict:
    """One run of stage 3, or what an earlier call left of it."""
    folder = out / variant.replace(", ", "_").replace(" ", "_") / f"seed_{seed}"
    command = [
        *(sys.executable, "main_rl_prune.py", "--depth", trained.checkpoint.architecture["depth"]),
        *("--checkpoint", args.checkpoint, "--data_dir", args.data_dir, "--img_type", args.img_type),
        *("--num_workers", args.num_workers, "--resize", trained.image_size, "--result_dir", folder),
        *("--epochs", args.epochs, "--bs", args.bs, "--lr", args.lr, "--alpha", args.alpha, "--seed", seed),
        *("--max_accuracy_drop", args.max_accuracy_drop, *VARIANTS[variant]),
    ]
    if not (folder / "results.json").exists():
        interrupted = any(folder.glob("rl_pruned/*/*/*/last.pt"))
        done = subprocess.run([*map(str, command), *(["--resume"] if interrupted else [])])
        if done.returncode:
            raise UserError(f"stage 3 ended with code {done.returncode} in {folder}: see its message above")
    record = json.loads((folder / "results.json").read_text())[-1]
    run = folder / Path(record["checkpoint"]).parent
    given = json.loads((run / "arguments.json").read_text())
    expected = {key: getattr(args, key) for key in ("checkpoint", "epochs", "bs", "lr", "alpha", "max_accuracy_drop")}
    for key, value in (expected | settings(VARIANTS[variant])).items():
        if given.get(key) != value:
            raise UserError(f"{run} was made with {key} {given.get(key)}, not {value}: choose another --out")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if "Overview/accuracy_val" in line]
    return {
        "test_accuracy": record["accuracy"],
        "computation": record["computation"],
        "within_budget": record["within_budget"],
        "accuracies": [epoch["Overview/accuracy_val"] for epoch in epochs],
        "computations": [epoch["Overview/computation_percentage"] / 100 for epoch in epochs],
    }


def settings(flags: list[str]) -> dict[str, str | float | bool]:
    """What a variant's flags make of those that variants differ in."""
    return {
        "fixed_alpha": "--fixed_alpha" in flags,
        "batch_norm": flags[flags.index("--batch_norm") + 1] if "--batch_norm" in flags else "frozen",
        "distill": float(flags[flags.index("--distill") + 1]) if "--distill" in flags else 0.5,
    }


def table(results: dict[str, list[dict]], before: dict[str, float]) -> str:
    lines = [
        f"Every block run: {before['validation']:.2%} (validation images), {before['test']:.2%} (test images).",
        "",
        "| variant | seeds | test accuracy | points lost | FLOPs saved | lowest validation accuracy of an epoch |",
        "|---|---|---|---|---|---|",
    ]
    for variant, runs in results.items():
        accuracies = [100 * run["test_accuracy"] for run in runs]
        saved = [100 * (1 - run["computation"]) for run in runs]
        lowest = min(min(run["accuracies"]) for run in runs)
        lost = 100 * before["test"] - statistics.mean(accuracies)
        lines.append(
            f"| {variant} | {len(runs)} | {spread(accuracies)} % | {lost:.2f} | {spread(saved)} % | {lowest:.2%} |"
        )
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {deviation:.2f}"


def draw(path: Path, results: dict[str, list[dict]], before: float) -> None:
    """Validation accuracy and computation by epoch, a line a run."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for i, (variant, runs) in enumerate(results.items()):
        for k, run in enumerate(runs):
            epochs = range(1, len(run["accuracies"]) + 1)
            label = variant if k == 0 else None
            axes[0].plot(epochs, [100 * v for v in run["accuracies"]], color=f"C{i}", label=label)
            axes[1].plot(epochs, [100 * v for v in run["computations"]], color=f"C{i}")
    axes[0].axhline(100 * before, color="0.5", linestyle=":", label="every block, before")
    axes[0].set(xlabel="epoch", ylabel="validation accuracy, %")
    axes[1].set(xlabel="epoch", ylabel="executed FLOPs, %", ylim=(0, 102))
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    run_command(main)
