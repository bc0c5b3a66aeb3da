"""A cascade and the search for one, against loops over images and thresholds; ``main_cascade.py`` on real stages."""

import itertools
import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx
import onnxruntime
import pytest
import torch
from commands import answer_of_both, call, run_folder, source_of
from torch.nn import functional as F

import main_cascade
from deploy import export
from deploy.exported import exported_model
from deploy.session import open_session, run_session
from gating.cascade_search import Candidate, Predictions, best_under, candidates, cheapest_within, frontier, outcome
from models import Cascade, RoutedOutput, all_on, build_network
from models.cascade import Member
from utils.data.augment import Normalisation
from utils.errors import UserError
from utils.runs.checkpoint import load_checkpoint, save_checkpoint

IMAGES, CLASSES = 24, 4


def predictions(networks: int = 3, seed: int = 0) -> tuple[list[Predictions], torch.Tensor]:
    """Of networks that are the better the more they cost; the executed FLOPs of the second differ between images."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (IMAGES,), generator=generator)
    made = []
    for i in range(networks):
        logits = torch.randn(IMAGES, CLASSES, generator=generator) + (0.4 + 0.6 * i) * torch.eye(CLASSES)[labels]
        executed = torch.full((IMAGES,), 10.0**i, dtype=torch.float64)
        if i == 1:
            executed += torch.rand(IMAGES, generator=generator, dtype=torch.float64)
        made.append(Predictions(logits.double().softmax(dim=1), executed))
    return made, labels


def by_loops(networks: list[Predictions], thresholds: list[float], answer: str, labels) -> tuple[float, float]:
    """Accuracy and FLOPs of a cascade, image by image."""
    right = flops = 0.0
    for image in range(IMAGES):
        seen = []
        for network, threshold in zip(networks, [*thresholds, -1.0], strict=True):
            seen.append(network.probabilities[image])
            flops += network.executed[image].item()
            given = sum(seen) / len(seen) if answer == "mean" else seen[-1]
            if given.max() >= threshold:
                break
        right += float(given.argmax() == labels[image])
    return right / IMAGES, flops / IMAGES


def dominated(point: tuple[float, float], others: list[tuple[float, float]]) -> bool:
    return any(a >= point[0] - 1e-9 and f <= point[1] + 1e-9 and (a, f) != point for a, f in others)


def test_the_search_finds_the_frontier_of_all_thresholds():
    """Every pair of thresholds that tells images apart, tried by loops, is matched by what was found."""
    given, labels = predictions()
    points = [(c.accuracy, c.flops) for c in candidates(given, labels)]
    steps = torch.linspace(0.2, 1.0, 13).tolist()
    for size, answer in itertools.product((2, 3), ("last", "mean")):
        for members in itertools.combinations(range(3), size):
            for thresholds in itertools.product(steps, repeat=size - 1):
                point = by_loops([given[i] for i in members], list(thresholds), answer, labels)
                assert dominated(point, points) or point in points, (members, thresholds, point)


def test_cascades_that_another_one_beats_are_left_out():
    """Also those of other networks: of twenty networks there are a thousand groups of three."""
    given, labels = predictions(5)
    cascades = [c for c in candidates(given, labels) if len(c.members) > 1]
    assert all(a.flops < b.flops and a.accuracy < b.accuracy for a, b in itertools.pairwise(cascades))


def test_the_search_among_some_networks_is_that_of_these_alone():
    given, labels = predictions(5)
    some = (1, 3, 4)
    alone = candidates([given[i] for i in some], labels, reference=1)
    expected = [replace(c, members=tuple(some[i] for i in c.members)) for c in alone]
    assert candidates(given, labels, reference=3, among=some) == expected


@pytest.mark.parametrize("saturated", [False, True])
def test_what_a_candidate_promises_is_what_it_does(saturated: bool):
    """Also where confidences nearly tie: between two neighbouring numbers of float32 lies no threshold."""
    given, labels = predictions(4, seed=1)
    if saturated:
        given = [replace(p, probabilities=(20 * p.probabilities.log()).softmax(dim=1).float()) for p in given]
    for candidate in candidates(given, labels):
        done = outcome(given, candidate, labels)
        own = by_loops([given[i] for i in candidate.members], list(candidate.thresholds), candidate.answer, labels)
        assert done.correct.double().mean().item() == pytest.approx(candidate.accuracy, abs=1e-9)
        assert done.executed.mean().item() == pytest.approx(candidate.flops, rel=1e-9)
        assert own == pytest.approx((candidate.accuracy, candidate.flops), rel=1e-9)


def test_the_frontier_rises():
    given, labels = predictions()
    kept = frontier(candidates(given, labels))
    assert all(a.flops < b.flops and a.accuracy < b.accuracy for a, b in itertools.pairwise(kept))


def members() -> list[Member]:
    torch.manual_seed(0)
    gates = ("none", "rnn", "none")
    networks = [build_network("resnet", depth=8, num_classes=CLASSES, width=4, gate=gate).eval() for gate in gates]
    means = ((0.4, 0.5, 0.6), (0.0, 0.0, 0.0), (0.5, 0.5, 0.5))
    return [Member(network, mean, (0.2, 0.3, 0.4)) for network, mean in zip(networks, means, strict=True)]


@pytest.mark.parametrize("answer", ["last", "mean"])
def test_the_network_answers_as_the_predictions_of_its_members_say(answer):
    """Members are given the images that reach them only, and answer as if they had been given all."""
    images = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    given = []
    with torch.no_grad():
        for network, mean, std in members():
            normalised = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
            probabilities = network(normalised).logits.softmax(dim=1)
            given.append(Predictions(probabilities, torch.ones(40, dtype=torch.float64)))
        first = given[0].probabilities.amax(dim=1).median().item()
        both = (given[0].probabilities + given[1].probabilities) / 2 if answer == "mean" else given[1].probabilities
        thresholds = (first, both.amax(dim=1).median().item())
        with torch.enable_grad():  # as whoever does not know better
            output = Cascade(members(), thresholds, answer)(images)
        every = Cascade(members(), thresholds, answer)(images, decide=all_on)
    labels = given[2].probabilities.argmax(dim=1)
    done = outcome(given, Candidate((0, 1, 2), thresholds, answer, 0.0, 0.0), labels)
    assert (done.members_run == 2).sum() > 0 and 0 < (done.members_run == 3).sum() < 20
    handed_on = output.decisions[:, :2]
    assert output.decisions.shape == (40, 4), "two between members, and two of the second member"
    assert (handed_on.sum(dim=1) + 1 == done.members_run).all()
    assert (output.decisions[:, 2:][done.members_run == 1] == 0).all()
    assert ((output.logits.argmax(dim=1) == labels) == done.correct).all()
    assert torch.allclose(output.logits.exp().sum(dim=1), torch.ones(40), atol=1e-5)
    assert (output.decisions == (output.probabilities > 0.5)).all()
    mean = torch.stack([p.probabilities for p in given]).mean(dim=0)
    expected = mean if answer == "mean" else given[2].probabilities
    assert torch.allclose(every.logits.exp(), expected, atol=1e-6)


@pytest.mark.parametrize("seed", [*range(6), 14, 17])
def test_the_cheapest_within_a_budget_is_that_of_all_pairs(seed: int):
    """Also where few images make standard errors large: every pair, threshold and answer by brute force."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (60,), generator=generator)
    logits = torch.randn(2, 60, 3, generator=generator) + torch.tensor([1.0, 2.0])[:, None, None] * F.one_hot(labels, 3)
    given = [Predictions(p.softmax(dim=1), torch.full((60,), 10.0**i).double()) for i, p in enumerate(logits)]
    expected = (given[1].probabilities.argmax(dim=1) == labels).double()
    for drop in (0.0, 0.03):
        found = cheapest_within(candidates(given, labels, 1), given, labels, 1, drop)
        lowest = given[1].executed.mean().item()
        for answer, threshold in itertools.product(("last", "mean"), given[0].probabilities.amax(dim=1).tolist()):
            done = outcome(given, Candidate((0, 1), (threshold,), answer, 0.0, 0.0), labels)
            gain = done.correct.double() - expected
            if gain.mean() >= -drop - 1e-9 and gain.mean() + drop >= gain.std() / 60**0.5 - 1e-9:
                lowest = min(lowest, done.executed.mean().item())
        alone = (given[0].probabilities.argmax(dim=1) == labels).double() - expected
        if alone.mean() >= -drop - 1e-9 and alone.mean() + drop >= alone.std() / 60**0.5 - 1e-9:
            lowest = given[0].executed.mean().item()
        assert found.flops == pytest.approx(lowest, rel=1e-12)


def test_the_best_under_a_target():
    given, labels = predictions(3, seed=2)
    found = candidates(given, labels)
    assert best_under(found, 0.5) is None
    for target in (1.0, 5.0, 40.0, 1000.0):
        chosen = best_under(found, target)
        assert chosen.flops <= target
        assert chosen.accuracy == max(c.accuracy for c in found if c.flops <= target)


@pytest.mark.parametrize("answer", ["last", "mean"])
@pytest.mark.parametrize("count", [2, 3])
def test_the_exported_graph_answers_as_the_network_does(answer: str, count: int):
    """Images not handed on, handed on to the second and to the third, in batches and alone."""
    pixels = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    cascade = Cascade(members()[:count], (0.0, 0.0)[: count - 1], answer).eval()
    with torch.no_grad():
        answers = cascade.members[0]((pixels / 255 - cascade.mean[0].view(3, 1, 1)) / cascade.std[0].view(3, 1, 1))
        median = answers.logits.softmax(dim=1).amax(dim=1).median().item() + 1e-4
        cascade.thresholds[:] = [median, 0.35][: count - 1]
        expected = cascade(pixels / 255)
    assert 0 < expected.decisions[:, 0].mean() < 1
    model = exported_model(cascade, Normalisation((0.0,) * 3, (1.0,) * 3), 16)
    onnx.checker.check_model(model, full_check=True)
    session = open_session(model, threads=1)
    for rows in (slice(0, 40), *(slice(i, i + 1) for i in range(6))):
        outputs = run_session(session, pixels[rows].numpy())
        torch.testing.assert_close(torch.from_numpy(outputs["logits"]), expected.logits[rows], rtol=1e-4, atol=1e-5)
        switches = torch.from_numpy(outputs["decisions"])
        assert torch.equal(switches, expected.decisions[rows, : count - 1])


def test_a_member_in_a_branch_runs_the_operators_that_it_runs_alone(tmp_path):
    """ONNX Runtime fuses convolutions only where it sees their weights and the names of their sizes."""
    network = build_network("resnet", depth=8, num_classes=CLASSES, width=8, gate="none").eval()
    norm = Normalisation((0.5,) * 3, (0.25,) * 3)
    member = Member(network, list(norm.mean), list(norm.std))

    def operators(model: onnx.ModelProto) -> list[Counter]:
        """Of the optimised graph, of the branch in it, of the branch in that one."""
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimised.onnx"), 3
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        found, graphs = [], [onnx.load(tmp_path / "optimised.onnx").graph]
        while graphs:
            found.append(Counter(node.op_type for graph in graphs for node in graph.node))
            inside = (attribute for graph in graphs for node in graph.node for attribute in node.attribute)
            graphs = [attribute.g for attribute in inside if attribute.name == "then_branch"]
        return found

    (alone,) = operators(exported_model(network, norm, 16))
    _, *branches = operators(exported_model(Cascade([member] * 3, (0.6, 0.6), "mean"), norm, 16))
    assert len(branches) == 2
    decision = Counter(["ReduceMax", "Less", "NonZero", "Transpose", "Cast", "Size", "Greater", "If"])
    merged = Counter({"GatherND": 2, "Softmax": 1, "Add": 1, "Mul": 1, "Div": 1, "ScatterND": 2})
    for branch, around in zip(branches, (merged + decision, merged), strict=True):
        assert branch["Conv"] + branch["FusedConv"] == alone["Conv"] + alone["FusedConv"] > 0
        assert not branch - alone - around


def run_cascade(data: Path, results: Path, *flags: object) -> None:
    place = ["--data_dir", data, "--result_dir", results]
    call(main_cascade, "--depth", 8, "--resize", 8, "--num_workers", 1, *place, *flags)


def test_a_cascade_of_what_the_stages_left(copied, shapes, tmp_path, capsys):
    run_cascade(shapes, copied, "--max_accuracy_drop", 0.9)
    said = capsys.readouterr().out
    assert "chosen:" in said and "| w/ Static Pruning and Cascade |" in said
    folder = run_folder(copied, "cascade")
    record = json.loads((folder / "record.json").read_text())
    best = load_checkpoint(folder / "best.pt")
    network = best.network()
    routing = json.loads((folder / "routing.json").read_text())
    assert record["accuracy"] == pytest.approx(routing["accuracy"], abs=1e-9)
    assert f"| w/ Static Pruning and Cascade | {record['accuracy']:.2%} |" in said
    assert record["stage"] == best.stage == "cascade" and len(network.members) in (2, 3)
    assert record["gflops_executed"] == pytest.approx(record["computation"] * record["gflops_all"])
    assert record["parameters"] == sum(p.numel() for p in network.parameters())
    assert record["latency_ms"] > 0 and (folder / "frontier.png").exists()

    given = ["--checkpoint", folder / "best.pt", "--output", tmp_path, "--data_dir", shapes, "--int8"]
    call(export, *given, "--num_workers", 1)
    assert "logits within" in capsys.readouterr().out, "in float and int8, against PyTorch"
    assert json.loads((tmp_path / "labels.json").read_text())["members"]
    image = next((shapes / "test").glob("*/*.png"))
    assert " answered" in answer_of_both(capsys, folder / "best.pt", tmp_path, image)


def test_the_row_above_a_cascade_is_of_the_network_that_its_budget_refers_to():
    """Also where networks of another family come first, as in the alphabet."""
    small, large = ({"accuracy": accuracy, "flops": flops} for accuracy, flops in ((0.6, 1.0), (0.7, 2.0)))
    found = [
        (Path(name), SimpleNamespace(stage=stage, original=original, metrics=original))
        for name, stage, original in (
            ("a/best.pt", "sp", small), ("a/iteration_01.pt", "pruned", small), ("b/best.pt", "sp", large),
            ("c/iteration_01.pt", "pruned", large), ("c/iteration_02.pt", "pruned", large),
        )
    ]  # fmt: skip
    assert main_cascade.row_above(found) == Path("c/iteration_01.pt")


def test_what_users_get_wrong(copied, shapes, tmp_path):
    dense, static = (source_of(copied, stage) for stage in ("pruned", "rl_pruned"))
    with pytest.raises(UserError, match="a cascade needs two networks or more, and there are 1"):
        run_cascade(shapes, copied, "--networks", dense)
    with pytest.raises(UserError, match="out of reach: the cheapest cascade takes"):
        run_cascade(shapes, copied, "--target_flops", "0.0001")
    shutil.copytree(shapes / "test", tmp_path / "val")
    with pytest.raises(UserError, match=r"does not fit.*val_dir, or start with stage 1 again"):
        run_cascade(shapes, copied, "--val_dir", tmp_path / "val")
    checkpoint, cascade = load_checkpoint(static), tmp_path / "cascade.pt"
    save_checkpoint(cascade, replace(checkpoint, stage="cascade"))
    with pytest.raises(UserError, match="is a cascade itself: name the networks that it was made of"):
        run_cascade(shapes, copied, "--networks", dense, cascade)
    for data, message in (
        ({"split_seed": 3, "set_aside": torch.tensor([1, 2])}, "lacks 2 of the 2 images"),
        ({"image_size": 16}, "trained on images of 16 pixels, not 8"),
    ):
        other = tmp_path / "other.pt"
        save_checkpoint(other, replace(checkpoint, data={**checkpoint.data, **data}))
        with pytest.raises(UserError, match=message):
            run_cascade(shapes, copied, "--networks", dense, other)
    aside = checkpoint.data["set_aside"]
    save_checkpoint(other, replace(checkpoint, data={**checkpoint.data, "set_aside": aside[:-2]}))
    with pytest.raises(UserError, match="have set different validation images aside"):
        run_cascade(shapes, copied, "--networks", dense, other)


class Fixed(torch.nn.Module):
    """Gives each image the logits that stand in its first row of pixels."""

    switches, architecture = 0, {"num_classes": CLASSES}

    def forward(self, images, decide):
        none = images.new_empty(len(images), 0)
        return RoutedOutput(images[:, 0, 0, :CLASSES], none, none)


def test_neighbouring_confidences_below_one_are_told_apart():
    """As in the search: half of a difference of 6e-8 would vanish beside one half."""
    confidence, threshold = 1 - 2**-23, 1 - 2**-24
    images = torch.full((2, 3, 8, 8), -1e3)
    images[0, 0, 0, 0], images[0, 0, 0, 1] = math.log(confidence), math.log(1 - confidence)
    images[1, 0, 0, 0] = 0.0  # of which the network is certain
    first = images[:, 0, 0, :CLASSES].softmax(dim=1)
    assert first.amax(dim=1).tolist() == [confidence, 1.0]
    network = Cascade([Member(Fixed(), (0, 0, 0), (1, 1, 1))] * 2, (threshold,), "last")
    given = [Predictions(first, torch.ones(2).double())] * 2
    expected = outcome(given, Candidate((0, 1), (threshold,), "last", 0.0, 0.0), torch.zeros(2).long())
    assert (expected.members_run - 1).tolist() == network(images).decisions[:, 0].tolist() == [1, 0]


def test_networks_that_are_certain_of_every_image_are_one_sentence():
    labels = torch.arange(20) % 3
    sure = [Predictions(F.one_hot(labels, 3).float(), torch.full((20,), flops).double()) for flops in (1, 2)]
    original = {"flops": 2.0, "accuracy": 1.0}
    networks = [(Path(), SimpleNamespace(stage=s, original=original, metrics=original)) for s in ("sp", "pruned")]
    settings = SimpleNamespace(target_flops=0.5, max_accuracy_drop=0.01)
    with pytest.raises(UserError, match="certain of every validation image"):
        main_cascade.choose(candidates(sure, labels), sure, labels, networks, settings)


def test_a_cascade_that_cannot_be():
    for count, thresholds, answer, message in (
        (2, (0.5, 0.6), "last", "2 networks and 2 thresholds: a cascade takes n and n - 1"),
        (1, (), "last", "1 networks and 0 thresholds"),
        (2, (1.5,), "last", "thresholds are .1.5.: they take numbers from 0 to 1"),
        (2, (0.5,), "first", "answer 'first' is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            Cascade(members()[:count], thresholds, answer)
