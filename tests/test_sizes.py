"""Images that are not square, from the setting to the prediction."""

import json
from pathlib import Path

import onnx
import pytest
import torch
from commands import answer_of_both, arguments, call, run, run_folder
from torch.utils.flop_counter import FlopCounterMode

from deploy import export
from utils.runs.checkpoint import load_checkpoint
from utils.sizes import height_width, parse_size


@pytest.mark.parametrize(
    ("given", "size", "sides"),
    [(32, 32, (32, 32)), ("32", 32, (32, 32)), ("24x24", 24, (24, 24)), ("224x160", "224x160", (224, 160))],
)
def test_sizes_are_numbers_for_squares_and_text_otherwise(given, size, sides):
    found = parse_size(given)
    assert (found, type(found)) == (size, type(size)) and height_width(found) == sides


@pytest.mark.parametrize("given", ["8x", "x8", "32x32x32", 8.5, True, None, [8, 8], "32 x 24", "", "8x4", 7, "8x4096"])
def test_other_sizes_are_refused_by_name(given):
    with pytest.raises(ValueError, match=r"^resize is .*: it takes "):
        parse_size(given)


def test_all_stages_an_export_and_a_prediction(shapes: Path, tmp_path: Path, capsys):
    for stage in ("sp", "pruned", "rl_pruned"):
        size = ["--set=resize=8x12"] if stage == "pruned" else ["--resize", "8x12"]
        run(stage, [*arguments(stage, shapes, tmp_path), *size])  # the later value counts
    best = run_folder(tmp_path, "rl_pruned") / "best.pt"
    assert load_checkpoint(best).data["image_size"] == "8x12"
    dense = load_checkpoint(run_folder(tmp_path, "sp") / "best.pt").network().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        dense(torch.zeros(1, 3, 8, 12))
    record = json.loads((run_folder(tmp_path, "sp") / "record.json").read_text())
    assert record["gflops"] == pytest.approx(counter.get_total_flops() / 1e9, rel=1e-12)
    assert "8x12 pixels" in (tmp_path / "results.md").read_text()
    folder = tmp_path / "exported"
    call(export, "--checkpoint", best, "--output", folder)
    shape = onnx.load(folder / "network.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in shape][1:] == [3, 8, 12]
    image = next((shapes / "test").rglob("*.png"))
    assert image.name in answer_of_both(capsys, best, folder, image)
