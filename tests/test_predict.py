"""The predict command: answers, images it cannot read, checkpoints that must be refused without running them."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from commands import ROOT, call
from networks import NORMALISATION, checkpoint_file, lively_network, varied_images
from PIL import Image

from deploy import export, predict
from utils.errors import UserError
from utils.flops import network_cost


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, its export and six images."""
    path = tmp_path_factory.mktemp("predict")
    for i, pixels in enumerate(varied_images(6)):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path / f"{i}.png")
    checkpoint_file(path / "best.pt", lively_network("rl_pruned", "rnn"))
    call(export, "--checkpoint", path / "best.pt", "--output", path / "onnx")
    return path


@pytest.mark.parametrize("source", [("--checkpoint", "best.pt"), ("--onnx", "onnx")])
def test_answers_are_the_networks(folder, source, capsys):
    images = [folder / f"{i}.png" for i in range(6)]
    call(predict, source[0], folder / source[1], *images)
    lines = capsys.readouterr().out.splitlines()
    network = lively_network("rl_pruned", "rnn")
    with torch.no_grad():
        output = network(NORMALISATION.apply(varied_images(6)))
    for line, image, logits, decisions in zip(lines, images, output.logits, output.decisions, strict=True):
        probability, label = logits.softmax(0).max(0)
        name, answer, shown, *rest = line.split()
        assert (name, answer) == (f"{image}:", "abcdefghij"[label])
        assert float(shown[:-1]) == pytest.approx(100 * probability.item(), abs=0.06)
        assert f"{int(2 - decisions.sum())} of 2 switched blocks skipped" in " ".join(rest)
        spent = network_cost(network, 16).executed(decisions[None]).item()
        assert float(rest[0]) * 1e6 == pytest.approx(spent, rel=1e-3)


def command(*arguments, encoding=None):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "deploy.predict", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, encoding=encoding)


def test_image_that_cannot_be_read_is_named_and_the_others_answered(folder, tmp_path):
    (tmp_path / "broken.png").write_bytes((folder / "0.png").read_bytes()[:60])
    missing = tmp_path / "missing.png"
    done = command(
        "--checkpoint", folder / "best.pt", folder / "0.png", tmp_path / "broken.png", missing, folder / "1.png"
    )
    assert done.returncode == 1
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [str(folder / "0.png"), str(folder / "1.png")]
    errors = done.stderr.splitlines()
    assert len(errors) == 2 and "broken.png" in errors[0] and "missing.png" in errors[1]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_that_cannot_be_printed_are_escaped(folder, tmp_path, encoding, monkeypatch):
    """Not UTF-8, or not in the terminal's encoding: all images are answered."""
    images = [tmp_path / os.fsdecode(name) for name in (b"caf\xe9.png", "käse.png".encode(), b"plain.png")]
    for image in images:
        image.write_bytes((folder / "0.png").read_bytes())
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    done = command("--checkpoint", folder / "best.pt", *images, encoding=encoding)
    assert done.returncode == 0 and done.stderr == ""
    shown = "käse" if encoding == "utf-8" else r"k\xe4se"
    names = [r"caf\udce9.png", f"{shown}.png", "plain.png"]
    assert [line.split(": ")[0] for line in done.stdout.splitlines()] == [f"{tmp_path}/{name}" for name in names]


def test_files_of_different_exports_are_refused(folder, tmp_path):
    shutil.copytree(folder / "onnx", tmp_path, dirs_exist_ok=True)
    labels = json.loads((tmp_path / "labels.json").read_text())
    for change in ({"image_size": 32}, {"flops_of_switched_blocks": []}, {"members": [1, 2, 3, 4]}):
        (tmp_path / "labels.json").write_text(json.dumps({**labels, **change}))
        with pytest.raises(UserError, match="does not fit"):
            call(predict, "--onnx", tmp_path, folder / "0.png")


@pytest.mark.parametrize("name", ["labels.json", "network.onnx"])
@pytest.mark.parametrize("content", [None, b"{}", b"\x00\x01damaged"])
def test_damaged_export_is_refused_in_one_sentence(name, content, folder, tmp_path):
    shutil.copytree(folder / "onnx", tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        call(predict, "--onnx", tmp_path, folder / "0.png")
