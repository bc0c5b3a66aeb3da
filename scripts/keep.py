"""A checkpoint to keep in the repository: weights in bf16, without what a resumed run needs.

python -m scripts.keep RUN/best.pt docs/checkpoints/NAME.pt
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from utils.errors import run_command
from utils.runs.checkpoint import load_checkpoint, save_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description="Halve a checkpoint.", allow_abbrev=False)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    checkpoint = load_checkpoint(args.source)
    halved = {
        name: weight.to(torch.bfloat16) if weight.dtype == torch.float32 else weight
        for name, weight in checkpoint.weights.items()
    }
    save_checkpoint(args.target, replace(checkpoint, weights=halved, training={}))


if __name__ == "__main__":
    run_command(main, goes_on=None)
