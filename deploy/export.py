"""Turn a checkpoint of any stage into files to deploy: ``python -m deploy.export --checkpoint PATH --output FOLDER``.

Writes network.onnx, labels.json, and with --int8 network_int8.onnx.  Both graphs take any number of uint8 images
[N, 3, H, W] in RGB, and compute each switched block only on the images for which it runs.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from utils.interruptions import prepare

    prepare(goes_on=None)

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from deploy.exported import exported_model
from deploy.labels import INT8, LABELS, NETWORK, NETWORK_HELP, labels_of
from deploy.session import ExportedNetwork, check_exported
from gating.fixing import fixed_blocks_text
from models import allow
from utils.data.folder import DataSet, load_data
from utils.data.images import Images, evenly_spaced
from utils.errors import UserError, run_command
from utils.files import atomic_write
from utils.runs.checkpoint import Checkpoint, check_data, load_checkpoint
from utils.settings import Parser, image_type, number
from utils.sizes import Size, height_width

CHECKED_IMAGES = 256


def parse_arguments() -> argparse.Namespace:
    parser = Parser("Export a checkpoint to ONNX.")
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="checkpoint of any stage")
    add("--network", nargs="+", action="extend", default=[], help=NETWORK_HELP)
    add("--output", type=Path, required=True, help="folder to write to")
    add("--data_dir", help="data folder, to check the files on its test images instead of random ones; --int8 needs it")
    add("--img_type", type=image_type, default="any", help="image files to read in --data_dir")
    add("--num_workers", type=number(int, 0), default=16, help="threads that decode images")
    add("--int8", action="store_true", help="add an int8 version, for CPUs with VNNI; calibrated on --data_dir")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    for source in args.network:
        allow(source)
    if args.int8 and not args.data_dir:
        raise UserError("--int8 needs training images for its calibration, and none were given: add --data_dir")
    checkpoint = load_checkpoint(args.checkpoint)
    network = checkpoint.network()
    size = checkpoint.data["image_size"]
    if args.data_dir:
        data = load_data(args.data_dir, args.img_type, size, args.num_workers)
        check_data(checkpoint, data, size)
        for note in data.notes:
            print(f"note: {note}")
        pixels = data.test[evenly_spaced(len(data.test), min(len(data.test), CHECKED_IMAGES))].pixels
    else:
        pixels = random_pixels(CHECKED_IMAGES, size)
    labels = labels_of(checkpoint, network)
    models = {NETWORK: exported_model(network, checkpoint.normaliser(), size)}
    onnx.checker.check_model(models[NETWORK], full_check=True)
    deviation = check_exported(ExportedNetwork(models[NETWORK]), network, checkpoint.normaliser(), pixels, NETWORK)
    labels["files"][NETWORK] = {"deviation": deviation, "images_checked": len(pixels)}
    if network.fixed_switches:
        free = len(network.free_switches)
        print(f"{NETWORK}: {fixed_blocks_text(network)}; switches that decide image by image: {free}")
    print(f"{NETWORK}: logits within {deviation:.1e} of PyTorch's on {len(pixels)} images")
    if args.int8:
        models[INT8], labels["files"][INT8] = int8_version(models[NETWORK], checkpoint, data)
        print("{}: accuracy {int8_accuracy:.2%}, {float_accuracy:.2%} in float32".format(INT8, **labels["files"][INT8]))
        print(speed_line(models, pixels))
    write_folder(args.output, models, labels)
    print(f"{', '.join(models)} and {LABELS} are in {args.output}")


def int8_version(
    model: onnx.ModelProto, checkpoint: Checkpoint, data: DataSet
) -> tuple[onnx.ModelProto, dict[str, float]]:
    """The quantised graph, and its accuracy on the test images beside that of the graph ``model`` in float32."""
    # Imported here: the tools take a second to import, and only this option needs them.
    from deploy.int8 import calibration_pixels, quantised

    calibration = calibration_pixels(data.train)
    network, size = checkpoint.network(), checkpoint.data["image_size"]
    smaller = exported_model(network, checkpoint.normaliser(), size, finish=lambda graph: quantised(graph, calibration))
    measured = {"int8_accuracy": accuracy(smaller, data.test), "float_accuracy": accuracy(model, data.test)}
    return smaller, {**measured, "test_images": len(data.test)}


def speed_line(models: dict[str, onnx.ModelProto], pixels: Tensor) -> str:
    """Which file is faster on single images: small pruned networks are often slower in int8."""
    from deploy.speeds import speeds  # imported here: it brings Matplotlib

    found = speeds({name: ExportedNetwork(model) for name, model in models.items()}, pixels)
    times = {name: found[name]["latency_ms"] for name in (INT8, NETWORK)}
    shown = " and ".join(f"{times[name]:.2f} ms in {name}" for name in times)
    return f"one image takes {shown} on this machine: use {min(times, key=times.get)} on CPUs of this kind"


def accuracy(model: onnx.ModelProto, images: Images) -> float:
    """Share of ``images`` that the graph classifies as they are labelled."""
    exported = ExportedNetwork(model)
    batches = images.batches(torch.arange(len(images)).split(256))
    answers = [exported(pixels.numpy())["logits"].argmax(axis=1) for pixels in batches]
    return float((np.concatenate(answers) == images.labels.numpy()).mean())


def random_pixels(count: int, size: Size) -> Tensor:
    """uint8 images [count, 3, H, W]: noise of many strengths, to reach many decisions."""
    generator = torch.Generator().manual_seed(0)
    colour, strength = (torch.rand(count, 3, 1, 1, generator=generator) for _ in range(2))
    noise = torch.randn(count, 3, *height_width(size), generator=generator)
    return (255 * (colour + strength * noise)).clamp(0, 255).to(torch.uint8)


def write_folder(folder: Path, models: dict[str, onnx.ModelProto], labels: dict[str, Any]) -> None:
    """Replace an export by the graphs and labels.json.

    labels.json leaves first and comes last: a folder that has it holds a whole export, also where this was killed.

    Raises:
        UserError: if the folder cannot be written.
    """
    contents = {name: model.SerializeToString() for name, model in models.items()}
    contents[LABELS] = (json.dumps(labels, indent=2) + "\n").encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (LABELS, INT8):
            (folder / name).unlink(missing_ok=True)
        for name, content in contents.items():
            with atomic_write(folder / name) as file:
                file.write(content)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error}): free disk space or choose another --output") from None


if __name__ == "__main__":
    run_command(main, goes_on=None)
