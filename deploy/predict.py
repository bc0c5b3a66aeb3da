"""Classify images: ``python -m deploy.predict --checkpoint PATH IMAGE...``, or ``--onnx FOLDER`` for an export.

Prints class, probability, FLOPs spent and blocks skipped for each image; of a cascade, the FLOPs of the networks that
ran, with all of their blocks.  Exit code 1 if an image could not be read.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from utils.interruptions import prepare

    prepare(goes_on=None)

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from deploy.graphs import DECISIONS, IMAGES, LOGITS
from deploy.labels import NETWORK, NETWORK_HELP, Labels, labels_of, read_labels
from deploy.session import open_session, run_session
from models import allow
from utils.data.images import read_image
from utils.errors import UserError, run_command
from utils.runs.checkpoint import load_checkpoint
from utils.settings import Parser
from utils.sizes import height_width

# uint8 [1, 3, H, W] to logits [classes] and decisions [K]; K is 0 for a network without switches.
Classifier = Callable[[Tensor], tuple[Tensor, Tensor]]


def parse_arguments() -> argparse.Namespace:
    parser = Parser("Classify images.")
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument("--checkpoint", type=Path, help="checkpoint of any stage")
    network.add_argument("--onnx", type=Path, help="folder written by python -m deploy.export")
    parser.add_argument("--network", nargs="+", action="extend", default=[], help=NETWORK_HELP)
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="image files of any size")
    args = parser.parse_args()
    # Images behind --network are taken for further functions, whose names have a colon before the last part.
    functions = [name for name in args.network if ":" in Path(name).name]
    args.images += [Path(name) for name in args.network if name not in functions]
    args.network = functions
    if not args.images:
        parser.error("the following arguments are required: IMAGE")
    return args


def main() -> None:
    args = parse_arguments()
    for source in args.network:
        allow(source)
    classify, labels = from_checkpoint(args.checkpoint) if args.checkpoint else from_folder(args.onnx)
    unread = 0
    for path in args.images:
        try:
            pixels = torch.from_numpy(read_image(path, labels.image_size).copy()).permute(2, 0, 1)[None]
        except UserError as error:
            unread += 1
            print(f"error: {error}", file=sys.stderr, flush=True)
            continue
        print(f"{path}: {answer(*classify(pixels.contiguous()), labels)}", flush=True)
    if unread:
        sys.exit(1)


def from_checkpoint(path: Path) -> tuple[Classifier, Labels]:
    """The network of a checkpoint, run by PyTorch; skipped blocks are not computed."""
    checkpoint = load_checkpoint(path)
    network = checkpoint.network()
    normalise = checkpoint.normaliser().apply  # to [0, 1] for a cascade, whose members normalise by themselves

    @torch.no_grad()
    def classify(pixels: Tensor) -> tuple[Tensor, Tensor]:
        output = network(normalise(pixels))
        return output.logits[0], output.decisions[0]

    return classify, Labels.of(labels_of(checkpoint, network))


def from_folder(folder: Path) -> tuple[Classifier, Labels]:
    """An exported network, run by ONNX Runtime; skipped blocks are not computed.

    Raises:
        UserError: if a file is missing, damaged or of another export.
    """
    labels = read_labels(folder)
    path = folder / NETWORK
    session = open_session(path)
    takes, gives = session.get_inputs()[0], {output.name: output.shape[1:] for output in session.get_outputs()}
    switches = max(len(labels.members) - 1, 0) or len(labels.flops_of_switched_blocks)
    fits = gives.get(LOGITS) == [len(labels.classes)] and gives.get(DECISIONS, [0]) == [switches]
    if (takes.name, takes.shape[1:]) != (IMAGES, [3, *height_width(labels.image_size)]) or not fits:
        raise UserError(f"{path} does not fit the labels.json beside it: export the network again")

    def classify(pixels: Tensor) -> tuple[Tensor, Tensor]:
        outputs = {name: torch.from_numpy(value) for name, value in run_session(session, pixels.numpy()).items()}
        return outputs[LOGITS][0], outputs.get(DECISIONS, torch.empty(1, 0))[0]

    return classify, labels


def answer(logits: Tensor, decisions: Tensor, labels: Labels) -> str:
    """One image's line: class, probability, FLOPs, and the blocks skipped, counted from 1 as the network runs them."""
    probability, label = logits.softmax(dim=0).max(dim=0)
    if labels.members:
        ran = 1 + int(decisions[: len(labels.members) - 1].sum())
        flops = sum(labels.members[:ran])
        return (
            f"{labels.classes[label]}  {probability:.1%}  {flops / 1e6:.4g} MFLOPs  "
            f"network {ran} of {len(labels.members)} answered"
        )
    # The first block has no switch: switch 1 is block 2's.
    not_run = [switch + 2 for switch, taken in enumerate(decisions.tolist()) if not taken]
    flops = labels.flops - sum(labels.flops_of_switched_blocks[block - 2] for block in not_run)
    skipped = [block for block in not_run if block not in labels.fixed_blocks]
    deciding = len(decisions) - len(labels.fixed_blocks)
    blocks = f"{len(skipped)} of {deciding} switched blocks skipped" if deciding else "no switches"
    if skipped:
        blocks += f" ({', '.join(map(str, skipped))})"
    return f"{labels.classes[label]}  {probability:.1%}  {flops / 1e6:.4g} MFLOPs  {blocks}"


if __name__ == "__main__":
    run_command(main, goes_on=None)
