"""Fixed switches: the same logits where decisions agree, the FLOPs that run, and a smaller checkpoint."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import answer_of_both, call
from networks import NORMALISATION, RANKS, checkpoint_file, lively_network, varied_images
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deploy import export, predict
from deploy.folding import folded
from deploy.graphs import onnx_model
from deploy.session import ExportedNetwork, check_exported
from gating.fixing import fix_switches, fixed_blocks_text, uniform_decisions, with_fixed_switches
from gating.reinforce import Reinforcement, reinforce_epoch
from gating.steering import Budget, FixedAlpha
from gating.temperature import rescale_gate_logits
from models import all_on, sampled, thresholded
from pruning.compress import check_goal
from pruning.goals import Goal
from pruning.settings import Method
from training.distillation import distillation_loss, distillation_loss_fn
from training.evaluate import Evaluator
from training.optimisers import reinforcement_optimisers
from utils.data.batches import TrainingBatches
from utils.data.images import ImageSet
from utils.errors import UserError
from utils.flops import every_block, network_cost
from utils.runs.checkpoint import load_checkpoint

GATES = ("rnn", "ff1", "ff2")
# All ways to fix some of the two switches.
CASES = [{0: 0}, {0: 1}, {1: 0}, {1: 1}, {0: 0, 1: 1}, {0: 1, 1: 0}, {0: 0, 1: 0}]


def outputs(network, images):
    with torch.no_grad():
        return network(images)


def tossed(drawn):
    """Rule that asks no switch: heads or tails."""
    columns = iter((drawn < 0.5).double().unbind(1))
    return lambda probabilities: next(columns)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("fixed", CASES)
def test_logits_stay_where_decisions_agree(gate, fixed):
    network = lively_network("rl_pruned", gate).double()
    images = NORMALISATION.apply(varied_images(64)).double()
    smaller = with_fixed_switches(network, fixed)
    drawn = torch.rand(64, 2, generator=torch.Generator().manual_seed(0))
    agreeing = 0
    for rule in (lambda: thresholded, lambda: tossed(drawn)):
        for skip in (True, False):
            with torch.no_grad():
                before, after = (n(images, decide=rule(), skip=skip) for n in (network, smaller))
            agree = torch.stack([before.decisions[:, switch] == on for switch, on in fixed.items()]).all(dim=0)
            agreeing += agree.sum()
            torch.testing.assert_close(after.logits[agree], before.logits[agree], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(after.decisions[agree], before.decisions[agree], rtol=0, atol=0)
            for switch, on in fixed.items():
                assert (after.decisions[:, switch] == on).all() and (after.probabilities[:, switch] == on).all()
    assert agreeing > 10


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("fixed", CASES)
def test_cost_is_what_runs_and_blocks_that_left_still_count(gate, fixed):
    network = lively_network("rl_pruned", gate)
    smaller = with_fixed_switches(network, fixed)
    before, after = network_cost(network, 16), network_cost(smaller, 16)
    assert after.parameters == sum(p.numel() for p in smaller.parameters())
    # Fixed open, the first switch of a recurrent gate leaves nothing behind: the second reads the state of its step.
    assert (after.parameters < before.parameters) == (gate != "rnn" or fixed != {0: 1})
    gates = before.flops - after.flops  # steps that no switch needs
    assert 0 <= gates < 0.2 * before.flops
    assert after.blocks == tuple(0 if fixed.get(k) == 1 else flops for k, flops in enumerate(before.blocks))
    for image in NORMALISATION.apply(varied_images(8)).split(1):
        decisions = outputs(smaller, image).decisions
        with FlopCounterMode(display=False) as counter:
            outputs(smaller, image)
        assert after.executed(decisions).item() == counter.get_total_flops()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("fixed", CASES)
def test_fixed_network_is_exported(gate, fixed):
    smaller = with_fixed_switches(lively_network("rl_pruned", gate), fixed)
    pixels = varied_images(64)
    model = onnx_model(folded(smaller), NORMALISATION, 16)
    exported = ExportedNetwork(model, threads=1)
    check_exported(exported, smaller, NORMALISATION, pixels, "network.onnx")
    gathered = {node.name.split(".")[0] for node in model.graph.node if node.op_type == "GatherND"}
    assert gathered == {f"block_{k + 1}" for k in range(2) if k not in fixed}
    answers = exported(pixels[:3].numpy())
    expected = outputs(smaller, NORMALISATION.apply(pixels[:3]))
    np.testing.assert_array_equal(answers["decisions"], expected.decisions)


def test_checkpoint_says_what_is_fixed(tmp_path):
    network = with_fixed_switches(lively_network("rl_pruned", "rnn"), {0: 0})
    path = checkpoint_file(tmp_path / "best.pt", network)
    loaded = load_checkpoint(path)
    assert loaded.architecture["fixed_switches"] == {"blocks.1": 0}
    assert {edit["name"] for edit in loaded.architecture["edits"]} == set(RANKS), "what the residual was is still told"
    images = NORMALISATION.apply(varied_images(8))
    assert torch.equal(outputs(loaded.network(), images).logits, outputs(network, images).logits)


def test_decisions_settle_at_the_share_asked_for():
    decisions = torch.zeros(1000, 4)
    decisions[:, 1] = 1
    decisions[:1, 2] = 1  # 99.9% closed
    decisions[:500, 3] = 1
    assert uniform_decisions(decisions, 0.999) == {0: 0, 1: 1, 2: 0}
    assert uniform_decisions(decisions, 1.0) == {0: 0, 1: 1}


def labelled(network, count=64):
    pixels = varied_images(count)
    return ImageSet(pixels, outputs(network, NORMALISATION.apply(pixels)).logits.argmax(dim=1))


def test_settled_network_is_kept_within_the_budget_only():
    network = lively_network("rl_pruned", "ff2")
    nn.init.constant_(network.gate.last_layers[0].bias, -1e3)  # the first switch is closed for all images
    images, cost = labelled(network), network_cost(network, 16)
    evaluator = Evaluator(images, NORMALISATION, 16)
    assert fix_switches(network, evaluator, Budget(floor=1.1), 0.999) is None, "out of reach"
    found = fix_switches(network, evaluator, Budget(floor=1.0), 0.999)
    smaller, measured = found.network, found.after
    whole = evaluator(network)
    assert measured.accuracy == 1.0
    gates = network_cost(smaller, 16).removed_gates  # of steps that no switch needs
    assert measured.flops_executed == pytest.approx(whole.flops_executed - gates)
    assert measured.flops_all == whole.flops_all and measured.computation < whole.computation
    assert smaller.fixed_switches[0] == 0 and smaller.removed_blocks[0] == "blocks.1"
    assert fixed_blocks_text(smaller).startswith(("block 2 removed", "blocks 2, 3 removed"))
    assert network_cost(smaller, 16).parameters < cost.parameters
    assert fix_switches(smaller, evaluator, Budget(floor=1.0), 0.999) is None, "no more to fix"


# Accuracy and FLOPs where switches are fixed, those of the network as it is, 0.9 and 1000, where nothing is said.
TOGETHER = [
    # One alone costs accuracy, and with the other it does not.
    ({(0,): (0.85, 1000)}, {0, 1}),
    # It does with the other, too: this one is fixed without it.
    ({(0,): (0.85, 1000), (0, 1): (0.85, 1000)}, {1}),
    # A tenth of a point may be lost, and not more.
    ({(0,): (0.8991, 1000), (0, 1): (0.8991, 1000)}, {0, 1}),
    ({(0,): (0.8989, 1000), (0, 1): (0.8989, 1000)}, {1}),
    # A step and a test cost half a percent each.  The first of a recurrent gate's two steps stays while the second
    # switch decides: fixed, it takes the test alone with it.
    ({(0,): (0.9, 1004), (0, 1): (0.9, 1030), (1,): (0.9, 1030)}, {0}),
    ({(0,): (0.9, 1006), (0, 1): (0.9, 1030), (1,): (0.9, 1030)}, None),
    # Both take two steps and two tests with them.
    ({(0,): (0.9, 1006), (0, 1): (0.9, 1019), (1,): (0.9, 1030)}, {0, 1}),
    ({(0,): (0.9, 1006), (0, 1): (0.9, 1021), (1,): (0.9, 1030)}, None),
]


@pytest.mark.parametrize(("measured", "fixed"), TOGETHER)
def test_what_is_fixed_keeps_the_accuracy_and_costs_least(measured, fixed):
    decisions = torch.zeros(1000, 2)
    decisions[:1, 1] = 1  # the first switch is the more uniform one

    def told(network):
        accuracy, flops = measured.get(tuple(sorted(network.fixed_switches)), (0.9, 1000))
        known = {"accuracy": accuracy, "computation": flops / 2000}
        return SimpleNamespace(**known, metrics=known, flops_executed=flops, decisions=decisions)

    found = fix_switches(lively_network("sp", "rnn"), told, Budget(0.0), 0.5)
    assert (found and set(found.network.fixed_switches)) == fixed


@pytest.mark.parametrize("gate", GATES)
def test_in_later_training_fixed_switches_stay_as_they_are(gate):
    network = with_fixed_switches(lively_network("rl_pruned", gate), {0: 0})
    images, cost = labelled(network, 32), network_cost(network, 16)
    rescale_gate_logits(network, NORMALISATION.apply(images.pixels))
    setup = Reinforcement(
        network=network, optimisers=reinforcement_optimisers(network, 0.9, 0.0), shares=cost.shares,
        draws=torch.Generator().manual_seed(0),
    )  # fmt: skip
    batches = TrainingBatches(images, 16, torch.Generator().manual_seed(0), NORMALISATION, False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    reinforce_epoch(setup, batches, [lambda done: 0.01] * 2, FixedAlpha(0.1), "epoch")
    assert any(not torch.equal(value, before[name]) for name, value in network.state_dict().items())
    x = NORMALISATION.apply(images.pixels)
    for skip in (False, True):
        for rule in (all_on, sampled(torch.zeros(32, 2)), torch.ones_like):
            assert (network(x, decide=rule, skip=skip).decisions == torch.tensor([0.0, 1.0])).all()


@pytest.mark.parametrize("fixed", [{0: 0}, {1: 1}, {0: 0, 1: 0}])
def test_a_network_that_blocks_have_left_may_be_the_teacher(fixed):
    teacher = with_fixed_switches(lively_network("rl_pruned", "rnn"), fixed)
    x, labels = NORMALISATION.apply(varied_images(8)), torch.arange(8)
    logits = torch.randn(8, 10, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = distillation_loss(logits, teacher(x, decide=all_on).logits, labels, 0.5)
    torch.testing.assert_close(distillation_loss_fn(teacher, 0.5)(x, logits, labels), expected, rtol=1e-4, atol=1e-5)


def exported(folder, fixed: dict[int, int]):
    """A network whose switches are fixed, as a checkpoint and as ONNX, and an image."""
    network = with_fixed_switches(lively_network("rl_pruned", "rnn"), fixed)
    call(export, "--checkpoint", checkpoint_file(folder / "best.pt", network), "--output", folder / "out")
    Image.fromarray(varied_images(1)[0].permute(1, 2, 0).numpy()).save(folder / "image.png")
    return network


def test_export_says_what_was_left_out_and_predict_skips_it(tmp_path, capsys):
    exported(tmp_path, {0: 0})
    assert "block 2 removed; switches that decide image by image: 1" in capsys.readouterr().out
    answer = answer_of_both(capsys, tmp_path / "best.pt", tmp_path / "out", tmp_path / "image.png")
    assert " of 1 switched blocks skipped" in answer and "(2" not in answer


def test_predict_tells_what_left_from_what_is_skipped(tmp_path, capsys):
    """All switches fixed: none is skipped, and the FLOPs are those of what is left."""
    network = exported(tmp_path, {0: 0, 1: 1})
    capsys.readouterr()
    call(predict, "--onnx", tmp_path / "out", tmp_path / "image.png")
    cost = network_cost(network, 16)
    left = (cost.flops - cost.removed_gates - cost.blocks[0]) / 1e6
    assert capsys.readouterr().out.endswith(f"{left:.4g} MFLOPs  no switches\n")
    assert json.loads((tmp_path / "out" / "labels.json").read_text())["fixed_blocks"] == [2, 3]


def test_channel_criteria_refuse_a_network_that_blocks_have_left():
    network = with_fixed_switches(lively_network("sp", "rnn"), {0: 0})
    method = Method(criterion="kron_obd")
    with pytest.raises(
        UserError, match="criterion kron_obd removes channels from whole blocks, but some blocks were removed"
    ):
        check_goal(network, 16, Goal(prune_ratio=0.1), method, every_block)


@pytest.mark.parametrize("kind", ["rnn", "ff1", "ff2"])
def test_a_network_without_free_switches_has_no_gate_left(kind):
    network = lively_network("rl_pruned", kind)
    fixed = with_fixed_switches(network, {switch: switch % 2 for switch in range(network.switches)})
    assert [name for name in fixed.state_dict() if name.startswith("gate.")] == []
    whole, gate = (sum(p.numel() for p in part.parameters()) for part in (network, network.gate))
    removed = sum(p.numel() for i in range(0, network.switches, 2) for n, p in network.blocks[i + 1].named_parameters()
                  if not n.startswith("shortcut"))  # fmt: skip
    assert network_cost(fixed, 16).parameters == whole - gate - removed
