"""The training step made faster in other ways does what the plain one does, within the precision of each."""

import copy
import functools
import warnings
from pathlib import Path

import pytest
import torch
from commands import arguments, call_stage, metrics, run_folder
from networks import small_network
from test_simulated_gpu import Training
from torch.nn import functional as F

from models import ResNet, sampled, straight_through
from training.forward import training_forward
from training.norms import placed, with_shared_norms
from training.optimisers import sgd
from training.supervised import half_held_open

CPU = torch.device("cpu")


def drawn_straight_through(drawn: torch.Tensor):
    return straight_through(sampled(drawn), torch.ones(()))


RULES = {"sp": (half_held_open, 1), "rl": (sampled, 0), "straight-through": (drawn_straight_through, 0)}


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch):
    """torch.compile without its code generator, which takes a minute here: traced, differentiated, run op by op.

    ``fullgraph`` refuses any part that a compiler would leave to Python.
    """
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))


def drawn(rule: str, gate: str = "rnn") -> tuple:
    torch.manual_seed(1)
    function, extra = RULES[rule]
    return torch.randn(24, 3, 8, 8), torch.randint(0, 5, (24,)), function, torch.rand(24, extra + 2)


def step(net: ResNet, forward, x, y, rule, numbers) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss, to which the switches' certainty adds, and the gradients of all parameters."""
    output = forward(x, rule, numbers, False)
    loss = F.cross_entropy(output.logits.float(), y) + output.probabilities.square().mean()
    return loss.detach(), list(torch.autograd.grad(loss, list(net.parameters())))


def assert_same_step(plain: ResNet, other: ResNet, forward, given: tuple, rtol: float, atol: float) -> None:
    loss, gradients = step(plain, training_forward(plain), *given)
    loss_other, gradients_other = step(other, forward, *given)
    torch.testing.assert_close(loss_other, loss, rtol=1e-5, atol=0)
    for a, b in zip(gradients_other, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("gate", "rule"), [("rnn", "sp"), ("rnn", "rl"), ("ff1", "straight-through")])
def test_compiled(gate: str, rule: str, traced):
    plain = small_network(gate, 5, 8)
    other = copy.deepcopy(plain)
    keys = list(other.state_dict())
    x, y, function, numbers = drawn(rule, gate)
    forward = training_forward(other, compiled=True)
    for part in (slice(None), slice(0, 15)):  # the last batch of an epoch has another size
        assert_same_step(plain, other, forward, (x[part], y[part], function, numbers[part]), 1e-4, 1e-6)
    assert list(other.state_dict()) == keys
    for key, value in plain.state_dict().items():  # batch norms' statistics
        torch.testing.assert_close(other.state_dict()[key], value, rtol=1e-5, atol=1e-6)


def test_compiled_with_shared_norms(traced):
    """One graph, as of plain ones."""
    plain = small_network(classes=5, width=8)
    shared = with_shared_norms(copy.deepcopy(plain))
    assert_same_step(plain, shared, training_forward(shared, compiled=True), drawn("sp"), 1e-4, 1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_channels_last(rule: str):
    plain = small_network(classes=5, width=8)
    other = placed(copy.deepcopy(plain), CPU)
    assert other.blocks[1].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert_same_step(plain, other, training_forward(other), drawn(rule), 1e-3, 1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_bf16_autocast(compiled: bool, traced):
    """bf16 keeps 8 bits: a relative error of 2^-9 an operation, here over some twenty in a row."""
    plain = small_network(classes=5, width=8)
    other = copy.deepcopy(plain)
    forward = training_forward(plain)
    loss, _ = step(plain, forward, *drawn("sp"))

    def autocast(images, rule, numbers, skip):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return plain(images, rule(numbers), skip)

    _, gradients = step(plain, autocast, *drawn("sp"))
    loss_bf16, gradients_bf16 = step(other, training_forward(other, torch.bfloat16, compiled), *drawn("sp"))
    torch.testing.assert_close(loss_bf16, loss, rtol=0.02, atol=0)
    assert loss_bf16 != loss, "it does run in bf16"
    for a, b in zip(gradients_bf16, gradients, strict=True):
        if compiled:  # a compiler rounds at other places
            assert (a - b).norm() < 0.3 * b.norm() + 1e-4
        else:  # as autocast makes them, weight by weight
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert next(other.parameters()).dtype == torch.float32, "weights stay as they are"


def test_stage_1_with_compile(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, traced):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        call_stage("sp", [*arguments("sp", shapes, tmp_path / name), "--epochs", "1", *more])
    folders = [run_folder(tmp_path / name, "sp") for name in ("plain", "compiled")]
    plain, compiled = (metrics(folder)[0] for folder in folders)
    assert compiled == pytest.approx(plain, rel=1e-4)
    a, b = (torch.load(folder / "best.pt", weights_only=True)["weights"] for folder in folders)
    assert list(a) == list(b)


def test_drawn_numbers_decide_and_each_switch_has_its_own():
    numbers = torch.tensor([[0.2, 0.9], [0.6, 0.1]])
    p = torch.tensor([0.5, 0.5])
    for rule in (sampled(numbers), drawn_straight_through(numbers)):
        assert rule(p).tolist() == [1, 0] and rule(p).tolist() == [0, 1]
    held = half_held_open(torch.tensor([[0.4, 0.9], [0.6, 0.9], [0.9, 0.1]]))
    p = torch.full((3,), 0.5, requires_grad=True)
    assert held(p).tolist() == [1, 0, 1]
    held = half_held_open(torch.tensor([[0.6, 0.424], [0.6, 0.426]]))
    assert held(p[:2]).tolist() == [1, 0], "15% of what would run is closed: 0.85 * 0.5 = 0.425"
    assert sampled(torch.zeros(1, 1))(torch.tensor([float("nan")])).item() == 0


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("stage", ["sp", "greedy"])
def test_a_step_does_not_wait_for_the_gpu(stage: str):
    """As many synchronisations in an epoch of twenty steps as in one of ten."""
    training = Training(stage, small_network(classes=5, width=8), small_network(classes=5, width=8))

    def epoch(steps: int) -> int:
        batches = training.batches(steps)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                training.epoch(batches, steps)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)

    epoch(10)
    assert epoch(20) == epoch(10)


@needs_gpu
def test_the_optimiser_takes_the_same_step_on_a_gpu():
    x, y = torch.randn(16, 3, 8, 8), torch.randint(0, 5, (16,))
    results = []
    for device in (CPU, torch.device("cuda")):
        net = placed(small_network(classes=5, width=8), device)
        optimiser = sgd(net, 0.1, 0.9, 5e-4)
        for _ in range(2):
            optimiser.zero_grad()
            F.cross_entropy(net(x.to(device)).logits, y.to(device)).backward()
            optimiser.step()
        results.append({key: value.cpu() for key, value in net.state_dict().items()})
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-2, atol=1e-3)
