"""README and docs: ``scripts.check_pages`` finds no fault, and docs/options.md has every option and no other."""

import importlib
import json
import re
from dataclasses import MISSING, Field, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT, call
from networks import NORMALISATION, checkpoint_file, lively_network, varied_images
from PIL import Image
from torch import nn

import main_rl_prune
import main_sp
from pruning.settings import PruneSettings
from scripts import check_pages, draw_idea
from scripts.check_pages import FLAGS, PAGES, README, commands, refusal
from utils.settings import TrainingSettings

KEPT_PICTURE = ROOT / "docs" / "idea.png"
OUTPUTS, OWN_NETWORK = ROOT / "docs" / "outputs.md", ROOT / "docs" / "own_network.md"
OPTIONS = (ROOT / "docs" / "options.md").read_text()
SHARED, OF_STAGE_1, OF_STAGE_3, OF_CASCADE, OF_STAGE_2 = (
    "## Flags of stages 1 and 3",
    "### Stage 1 only",
    "### Stage 3 only",
    "### The cascade only",
    "## Keys of stage 2",
)


def rows(heading: str) -> dict[str, tuple[str, str]]:
    """Default and meaning of every option in the table below a heading of docs/options.md."""
    below = OPTIONS[OPTIONS.index(f"\n{heading}\n") + len(heading) + 2 :]
    section = re.split(r"^##", below, maxsplit=1, flags=re.M)[0]
    found = re.findall(r"^\| `(?:--)?(\w+)` \| (.*?) \| (.*) \|$", section, re.M)
    assert len({name for name, *_ in found}) == len(found), "an option has two rows"
    return {name: (default, meaning) for name, default, meaning in found}


def shown(value: object) -> str:
    """A default as the tables show it."""
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value) if isinstance(value, list) else str(value)


def code(place: Path) -> list[Path]:
    """The Python files in a folder, or the file itself."""
    return sorted(place.rglob("*.py")) if place.is_dir() else [place] if place.suffix == ".py" else []


def default_flag(f: Field) -> str:
    if f.default is MISSING:
        return "required"
    return "off" if f.default is False else {"": "empty", None: "none", (): "none"}.get(f.default) or shown(f.default)


def test_the_shared_flags_are_those_of_the_settings():
    first, third = (
        {f.name: default_flag(f) for f in fields(settings)} for settings in (main_sp.Settings, main_rl_prune.Settings)
    )
    wanted = {f.name: f"{first[f.name]} / {third[f.name]}" for f in fields(TrainingSettings)}
    wanted = {name: pair.split(" / ")[0] if len(set(pair.split(" / "))) == 1 else pair for name, pair in wanted.items()}
    assert {name: default for name, (default, _) in rows(SHARED).items()} == {**wanted, "resume": "off"}


@pytest.mark.parametrize(
    ("script", "heading"),
    [("main_sp.py", OF_STAGE_1), ("main_rl_prune.py", OF_STAGE_3), ("main_cascade.py", OF_CASCADE)],
)
def test_the_flags_of_a_stage_are_those_of_its_settings(script: str, heading: str):
    shared = {f.name for f in fields(TrainingSettings)}
    wanted = {f.name: default_flag(f) for f in fields(FLAGS[script]) if f.name not in shared}
    assert {name: default for name, (default, _) in rows(heading).items()} == wanted


def test_the_keys_of_stage_2_are_those_of_config_json():
    config = json.loads((ROOT / "config.json").read_text())
    wanted = {f.name: shown(config[f.name]) or "empty" for f in fields(PruneSettings)}
    wanted |= {name: str(value).lower() for name, value in config.items() if isinstance(value, bool)}
    assert {name: default for name, (default, _) in rows(OF_STAGE_2).items()} == wanted


@pytest.mark.parametrize(
    ("settings", "headings"),
    [
        (main_sp.Settings, (SHARED, OF_STAGE_1)),
        (main_rl_prune.Settings, (SHARED, OF_STAGE_3)),
        (PruneSettings, (OF_STAGE_2,)),
    ],
)
def test_every_value_that_can_be_chosen_is_named(settings: type, headings: tuple[str, ...]):
    described = {name: row for heading in headings for name, row in rows(heading).items()}
    for f in fields(settings):
        for choice in f.metadata["choices"] or ():
            assert choice == str(f.default) or f"`{choice}`" in described[f.name][1], (f.name, choice)


def test_commands_that_take_seconds_run_as_written(tmp_path, monkeypatch, capsys):
    """Those of README one after the other, then those of all pages that need this repository only."""
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    Image.fromarray(varied_images(1)[0].permute(1, 2, 0).numpy()).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    given = [(page, c[2:]) for page in PAGES for c in commands(page) if c[:2] == ["python", "-m"]]
    given = [c for page, c in given if page == README or ("docs/" in " ".join(c) and "--data_dir" not in c)]
    assert {c[0] for c in given} == {"deploy.export", "deploy.predict", "benchmarks.study"}
    for module, *arguments in given:
        call(importlib.import_module(module), *arguments)
    said = capsys.readouterr().out
    assert "\nimage.png: " in said and "resnet56 at 25%" in said
    names = {"images": np.zeros((3, 3, 32, 32), np.uint8)}
    exec(re.search(r"^```python\n(.*?)^```", (ROOT / "docs" / "deploy.md").read_text(), re.M | re.S)[1], names)
    assert names["outputs"]["logits"].shape == (3, 100)


def test_a_network_of_one_s_own_is_compressed_and_rebuilt_as_the_page_does(tmp_path, monkeypatch):
    def network() -> nn.Module:
        torch.manual_seed(0)
        head = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
        return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), *head).eval()

    monkeypatch.chdir(tmp_path)
    images = varied_images(16).float() / 255
    names = {"network": network(), "loader": [(images, torch.arange(16) % 10)], "resnet56": network}
    names["train_loader"] = names["loader"]
    for snippet in re.findall(r"^```python\n(.*?)^```", OWN_NETWORK.read_text(), re.M | re.S):
        exec(snippet, names)
    assert names["smaller"].report.flops[1] <= 0.5 * names["smaller"].report.flops[0]
    torch.testing.assert_close(names["restored"](images), names["smaller"](images))


def test_any_network_is_exported_quantised_and_timed_as_the_page_does(tmp_path, monkeypatch, capsys):
    def network() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

    monkeypatch.chdir(tmp_path)
    section = (ROOT / "docs" / "deploy.md").read_text().split("## Any other network")[1]
    pixels = np.random.default_rng(0).integers(0, 256, (64, 3, 32, 32), dtype=np.uint8)
    names = {"network": network(), "smaller": network(), "pixels": pixels}
    for snippet in re.findall(r"^```python\n(.*?)^```", section, re.M | re.S):
        exec(snippet, names)
    assert (tmp_path / "network.onnx").exists() and (tmp_path / "network_int8.onnx").exists()
    with torch.no_grad():
        expected = names["network"](names["normalisation"].apply(torch.from_numpy(pixels[:1])))
    torch.testing.assert_close(torch.from_numpy(names["logits"]), expected, rtol=0, atol=1e-4)
    assert re.fullmatch(r"unpruned: \d+\.\d+ ms\nsmaller: \d+\.\d+ ms\n", capsys.readouterr().out)


def test_a_command_with_a_wrong_flag_is_found():
    assert "--epoch" in refusal("python", "main_sp.py", "--data_dir", "data", "--epoch", "3")
    assert "--outputs" in refusal("python", "-m", "deploy.export", "--outputs", "exported")
    assert refusal("bash", "scripts/no_such.sh") and refusal("python", "-m", "deploy.nothing")


def test_the_messages_that_troubleshooting_explains_are_those_of_the_code():
    sources = [path for folder in ROOT.iterdir() if folder.name not in ("tests", ".venv") for path in code(folder)]
    text = re.sub(r'"\s*f?"', "", "".join(path.read_text() for path in sources))  # of strings over several lines
    table = (ROOT / "docs" / "troubleshooting.md").read_text().split("## By message")[1].split("\n## ")[0]
    messages = [
        message for cell in re.findall(r"^\| (`.*?`) \|", table, re.M) for message in re.findall("`(.*?)`", cell)
    ]
    assert len(messages) > 10
    for part in (part.strip() for message in messages for part in message.split("...") if part.strip(" :")):
        assert part in text, part


def test_the_check_of_the_pages_finds_no_fault(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        check_pages.main()
    assert not ended.value.code, capsys.readouterr().out


def test_a_network_is_loaded_as_the_page_loads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    snippet = re.search(r"^```python\n(.*?)^```", OUTPUTS.read_text(), re.M | re.S)[1]
    network = lively_network("rl_pruned", "rnn")
    checkpoint_file(tmp_path / "best.pt", network)
    monkeypatch.chdir(tmp_path)
    images = varied_images(8)
    names = {"images": images}
    with torch.no_grad():
        exec(snippet, names)
        expected = network(NORMALISATION.apply(images))
    torch.testing.assert_close(names["logits"], expected.logits)
    assert torch.equal(names["decisions"], expected.decisions)


def test_the_readme_is_short():
    prose = re.sub(r"```.*?```", "", README.read_text(), flags=re.S)
    assert len(prose.split()) <= 600


def test_the_picture_of_the_idea_is_what_its_script_draws(tmp_path: Path):
    draw_idea.main(tmp_path / "idea.png")
    drawn, kept = (np.asarray(Image.open(path).convert("L"), float) for path in (tmp_path / "idea.png", KEPT_PICTURE))
    assert drawn.shape == kept.shape
    assert np.abs(drawn - kept).mean() < 2, "of 255; versions of matplotlib place letters differently"
