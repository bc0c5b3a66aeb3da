"""``compress`` on every classification network of torchvision that has at most 100 million parameters.

    python -m benchmarks.torchvision_models --out torchvision_models
    python -m benchmarks.torchvision_models --only resnet18 vgg16 --pixels 224 --images 500 --batch 32 --out at_224

Weights are random.  Each network is compressed to a share of its FLOPs, exported, and checked: against the target, the
shape of its outputs, and ONNX Runtime.  The memory it takes is compared with that of a training step.
Each measurement has a process of its own.  Finished ones are kept in OUT.jsonl, so that the same command continues; the
table is written to OUT.md.
"""

import argparse
import copy
import multiprocessing
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import append_line, beside, read_lines
from deploy.general import general_model
from models import picked_logits
from pruning import compress
from utils.data.augment import Normalisation
from utils.errors import UserError, run_command
from utils.flops import cost_on

MOST_PARAMETERS = 100e6
CLASSES = 10
WITHIN = 0.02  # of the target
SLOW_TO_INITIALISE = ("googlenet", "inception_v3")  # minutes of truncated normal numbers
NORMALISATION = Normalisation((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def main() -> None:
    parser = argparse.ArgumentParser(description="Run compress on the networks of torchvision.", allow_abbrev=False)
    parser.add_argument("--flops", type=float, default=0.7, help="share of the FLOPs to compress to")
    parser.add_argument("--only", nargs="+", help="names of networks (default: all)")
    parser.add_argument("--pixels", type=int, help="height and width of images (default: 64, more where needed)")
    parser.add_argument("--images", type=int, default=16, help="images that compress measures on")
    parser.add_argument("--batch", type=int, default=8, help="images in a batch, also of the training step")
    parser.add_argument("--decomposition", default="tucker", help="forms to build, as in config.json")
    parser.add_argument(
        "--out", type=Path, default=Path("torchvision_models"), help="path of the results, without suffix"
    )
    args = parser.parse_args()
    path = beside(args.out, ".jsonl")
    if unknown := {*(args.only or ())} - {*torchvision.models.list_models(torchvision.models)}:
        raise UserError(f"torchvision has no {', '.join(sorted(unknown))}: see torchvision.models.list_models()")
    for name in args.only or small_enough():
        before = next((row for row in read_lines(path) if row["network"] == name), None)
        if before is not None and before.get("asked", args.flops) != args.flops:
            raise UserError(f"{path} has {name} at {before['asked']:.0%} of the FLOPs: give another --out")
        if before is not None:
            continue
        row = in_own_process(compressed, name, args)
        row |= {"network": name, "asked": args.flops, "step_bytes": in_own_process(training_step, name, args)["bytes"]}
        append_line(path, row)
        print(line(row), flush=True)
    rows = read_lines(path)
    beside(args.out, ".md").write_text(table(rows, args.flops))


def small_enough() -> list[str]:
    """The names of the networks, those with the fewest parameters first."""
    names = torchvision.models.list_models(torchvision.models)
    counts = {name: torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"] for name in names}
    return sorted((name for name in names if counts[name] <= MOST_PARAMETERS), key=counts.__getitem__)


def in_own_process(measure: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """The result of ``measure(*given)``; its ``peak_bytes`` become ``bytes``, the memory that was added at most."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        before = peak_bytes()
        result = measure(*given)
        sender.send(result | {"bytes": result.pop("peak_bytes") - before})

    process = context.Process(target=child)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise UserError(f"the process that measured {given[0]} ended: see above") from None
    finally:
        process.join()


def peak_bytes() -> int:
    """The most memory that this process has taken so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def network_of(name: str) -> nn.Module:
    """The network with random weights and ``CLASSES`` outputs."""
    torch.manual_seed(0)
    given = {"init_weights": False} if name in SLOW_TO_INITIALISE else {}
    if name == "inception_v3":  # its auxiliary head needs images of 299 pixels
        given["aux_logits"] = False
    network = torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **given)
    if name.startswith("vit_"):  # whose last layer starts with zeros, so that no gradient reaches the others
        nn.init.normal_(network.heads.head.weight, std=0.02)
    return network


def image_size(name: str) -> int:
    """Height and width: those of vision transformers and of Inception are fixed by their weights or their strides."""
    return 224 if name.startswith(("vit_", "maxvit")) else 96 if name == "inception_v3" else 64


def images(size: int, args: argparse.Namespace) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(args.images, 3, size, size, generator=torch.Generator().manual_seed(0))
    return [(part, torch.arange(len(part)) % CLASSES) for part in x.split(args.batch)]


def compressed(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Compress the network, check the result, and return the row of the table."""
    network, size = network_of(name), args.pixels or image_size(name)
    batches, blank = images(size, args), torch.zeros(1, 3, size, size)
    before = cost_on(network.eval(), blank)
    start = time.perf_counter()
    smaller = compress(network, lambda: batches, flops=args.flops, decomposition=args.decomposition).eval()
    row: dict[str, Any] = {"seconds": time.perf_counter() - start, "peak_bytes": peak_bytes()}
    row |= {"size": size, "flops": before.flops}
    after = cost_on(smaller, blank)
    row |= {"smaller_flops": after.flops, "parameters": before.parameters, "smaller_parameters": after.parameters}
    with torch.no_grad():
        outputs = picked_logits(smaller(batches[0][0]))
    if outputs.shape != (len(batches[0][0]), CLASSES) or not outputs.isfinite().all():
        raise UserError(f"{name} compressed returns {list(outputs.shape)}, or scores that are not finite")
    try:
        row["deviation"] = general_model(copy.deepcopy(smaller), NORMALISATION, size, size)[1]
    except UserError as error:
        row["not_exported"] = str(error)
    return row


def training_step(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """A step of SGD with momentum on one batch, as memory is compared with it."""
    network = network_of(name).train()
    x, labels = images(args.pixels or image_size(name), args)[0]
    optimiser = torch.optim.SGD(network.parameters(), lr=1e-6, momentum=0.9)
    F.cross_entropy(picked_logits(network(x)), labels).backward()
    optimiser.step()
    return {"peak_bytes": peak_bytes()}


def line(row: dict[str, Any]) -> str:
    exported = f"{row['deviation']:.0e}" if "deviation" in row else "no"
    return (
        f"| {row['network']} | {row['size']} | {row['flops'] / 1e9:.3f} | {row['smaller_flops'] / row['flops']:.1%} "
        f"| {row['smaller_parameters'] / row['parameters']:.1%} | {exported} "
        f"| {row['bytes'] / max(1, row['step_bytes']):.1f} | {row['seconds']:.0f} |"
    )


def table(rows: list[dict[str, Any]], share: float) -> str:
    """Every network, and how many landed near the target and were exported."""
    near = sum(abs(row["smaller_flops"] / row["flops"] / share - 1) <= WITHIN for row in rows)
    exported = sum("deviation" in row for row in rows)
    head = [
        f"{len(rows)} networks to {share:.0%} of their FLOPs: {near} within {WITHIN:.0%} of the target, "
        f"{exported} exported.",
        "",
        "| network | pixels | GFLOPs | FLOPs left | parameters left | ONNX deviates | memory / step | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *map(line, rows), ""])


if __name__ == "__main__":
    run_command(main, goes_on="the same command")
