"""The GPU's path without a GPU: every tensor where it has to be, and no wait inside a training step."""

import copy
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from networks import edits_to, small_network
from simulated_gpu import SimulatedTensor, simulated
from torch import nn

from deploy.general import general_model
from gating.reinforce import Reinforcement, closing_epoch, reinforce_epoch
from gating.steering import SteeredAlpha
from models import ResNet, all_on, thresholded
from models.decisions import DecisionRule
from pruning.compress import prune_once
from pruning.factors import collect_factors
from pruning.goals import Goal
from pruning.layers import prunable_layers
from pruning.settings import CRITERIA, DECOMPOSITIONS, Method
from training import forward as training_forward_module
from training.distillation import distillation_loss_fn
from training.evaluate import Evaluator
from training.forward import training_forward
from training.norms import SharedBatchNorm, placed, with_shared_norms
from training.optimisers import reinforcement_optimisers, sgd
from training.supervised import Supervision, supervised_epoch
from utils.data.augment import Normalisation
from utils.data.batches import TrainingBatches, plain_batches
from utils.data.images import ImageSet
from utils.device import Randomness, device_text, pick_device, pick_precision
from utils.errors import UserError
from utils.flops import every_block, network_cost

CPU = torch.device("cpu")
BATCH = 8
NORMALISATION = Normalisation((0.5,) * 3, (0.2,) * 3)


def network(gate: str = "rnn", **more) -> ResNet:
    return small_network(gate, 5, edits=edits_to({"blocks.1.conv2": (4, 4)}), **more)


def images(count: int) -> ImageSet:
    return ImageSet(torch.zeros(count, 3, 8, 8, dtype=torch.uint8), torch.arange(count) % 5)


@dataclass
class Training:
    """Epochs of a stage on a GPU, which may be a simulated one."""

    stage: str  # "sp", "pruned", "greedy", "published" or "closing"
    net: ResNet
    teacher: ResNet
    frozen_norms: bool = True

    def __post_init__(self):
        self.device = pick_device()
        self.net, teacher = placed(self.net, self.device), placed(self.teacher, self.device)
        self.forward = training_forward(self.net, torch.bfloat16)
        self.draws = torch.Generator(self.device).manual_seed(0)
        self.loss_fn = None if self.stage == "sp" else distillation_loss_fn(teacher, 0.5, torch.bfloat16)

    def waits(self, waits: Counter, steps: int) -> Counter:
        """What an epoch waits for."""
        batches = self.batches(steps)
        waits.clear()
        self.epoch(batches, steps)
        return waits.copy()

    def batches(self, steps: int) -> TrainingBatches:
        given = images(BATCH * steps).to(self.device)
        return TrainingBatches(given, BATCH, torch.Generator().manual_seed(0), NORMALISATION, True)

    def epoch(self, batches: TrainingBatches, steps: int) -> None:
        if self.stage in ("greedy", "published", "closing"):
            shares = torch.full((self.net.switches,), 1 / self.net.switches, device=self.device)
            setup = Reinforcement(
                network=self.net, optimisers=reinforcement_optimisers(self.net, 0.9, 0.0), shares=shares,
                draws=self.draws, published=self.stage == "published", frozen_norms=self.frozen_norms,
                loss_fn=self.loss_fn, forward=self.forward,
            )  # fmt: skip
            if self.stage == "closing":
                closing_epoch(setup, batches, lambda _: 1e-3, "")
            else:
                alpha = SteeredAlpha(0.1, 1.0, 0.5, steps, self.device)
                reinforce_epoch(setup, batches, [lambda _: 1e-3] * 2, alpha, "")
        else:
            training = Supervision(
                network=self.net, optimiser=sgd(self.net, 1e-3, 0.9, 0.0), draws=self.draws, loss_fn=self.loss_fn,
                forward=self.forward,
            )  # fmt: skip
            supervised_epoch(training, batches, lambda _: 1e-3, "")


# Some or all of the gate is not used; stage 3 refuses the last one, which has no switch that decides.
FIXED = ({"blocks.2": 1}, {"blocks.1": 1}, {"blocks.1": 0, "blocks.2": 0})


@pytest.mark.parametrize(
    ("stage", "gate", "frozen", "fixed"),
    [
        ("sp", "rnn", False, {}), ("sp", "ff1", False, {}), ("sp", "ff2", False, {}), ("sp", "none", False, {}),
        ("pruned", "rnn", False, {}), ("greedy", "rnn", True, {}), ("greedy", "ff1", False, {}),
        ("published", "rnn", False, {}), ("closing", "rnn", True, {}), ("closing", "ff1", False, {}),
        *(("sp", "rnn", True, fixed) for fixed in FIXED), *(("greedy", "rnn", True, fixed) for fixed in FIXED[:2]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("free", [2**30, 0])
def test_a_step_waits_for_nothing(stage: str, gate: str, frozen: bool, fixed: dict[str, int], free: int):
    """As many waits in an epoch of five steps as in one of two, wherever the images are."""
    with simulated(free_memory=free) as waits:
        training = Training(stage, network(gate, fixed_switches=fixed), network(gate), frozen)
        assert training.waits(waits, 2) == training.waits(waits, 5)


def test_a_gpu_is_compiled_for_with_cuda_graphs(monkeypatch: pytest.MonkeyPatch):
    """On the CPU there are none."""
    modes = []
    monkeypatch.setattr(training_forward_module, "_check_compiler", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic, mode: modes.append(mode))
    training_forward(network(), compiled=True)
    with simulated():
        training_forward(placed(network(), pick_device()), torch.bfloat16, compiled=True)
    assert modes == [None, "reduce-overhead"]


@pytest.mark.parametrize("gate", ["rnn", "ff1", "ff2", "none"])
def test_waits_of_an_evaluation(gate: str):
    """One a switch and batch, which decides on the images that a block runs on; none where every block does."""
    with simulated() as waits:
        device = pick_device()
        net = placed(network(gate), device)

        def waited(batches: int, rule: DecisionRule) -> int:
            given = images(BATCH * batches).to(device)
            waits.clear()
            Evaluator(given, NORMALISATION, 8, torch.bfloat16, BATCH)(net, rule)
            return waits.total()

        assert waited(5, thresholded) - waited(2, thresholded) == 3 * net.switches
        assert waited(5, all_on) == waited(2, all_on)


@pytest.mark.parametrize(
    ("criterion", "decomposition"),
    [(c, "tucker") for c in CRITERIA] + [("eigendamage", d) for d in DECOMPOSITIONS if d != "tucker"],
)
def test_pruning(criterion: str, decomposition: str):
    """Every criterion and decomposition; no batch of the factors waits."""
    with simulated():
        device = pick_device()
        net, given = placed(small_network(classes=5), device).eval(), images(24).to(device)
        method = Method(criterion=criterion, decomposition=decomposition, round_to=1, objective="saliency")
        draws = torch.Generator(device).manual_seed(0)
        passes = method.passes(lambda: plain_batches(given, 8, NORMALISATION), draws, every_block)
        pruned = prune_once(net, passes, cost=network_cost(net, 8), goal=Goal(0.3), method=method)
        assert not pruned.nothing_changed
        placed(pruned.network, device)(NORMALISATION.apply(given.pixels))


def test_factors_never_wait():
    with simulated() as waits:
        device = pick_device()
        net = placed(network(), device).eval()

        def waited(batches: int) -> Counter:
            given, draws = images(BATCH * batches).to(device), torch.Generator(device).manual_seed(0)
            passes = Method().passes(lambda: plain_batches(given, BATCH, NORMALISATION), draws, every_block)
            waits.clear()
            collect_factors(net, prunable_layers(net), passes)
            return waits.copy()

        waited(1)
        assert waited(5) == waited(2)


@pytest.mark.parametrize(
    ("wanted", "capability", "precision"),
    [
        ("auto", (9, 0), torch.bfloat16), ("auto", (8, 0), torch.bfloat16), ("auto", (7, 5), torch.float32),
        ("float32", (9, 0), torch.float32), ("bf16", (8, 6), torch.bfloat16),
    ],
)  # fmt: skip
def test_precision_of_a_gpu(wanted: str, capability: tuple[int, int], precision: torch.dtype):
    with simulated(capability=capability):
        device = pick_device()
        assert pick_precision(wanted, device) == precision
        used = "bf16 (Fisher and report in full float32)" if precision == torch.bfloat16 else "full float32"
        lacking = " (it has no bf16)" if capability < (8, 0) else ""
        assert device_text(device, precision) == f"cuda (simulated) in {used}{lacking}"
        net, seen = placed(network(), device), set()

        def see(module, inputs, output):
            if len(output) == 4:  # not the image on which FLOPs are counted
                seen.add(output.dtype)

        net.stem[0].register_forward_hook(see)
        Evaluator(images(4).to(device), NORMALISATION, 8, precision)(net)
        training_forward(net, precision)(
            torch.zeros(4, 3, 8, 8).to(device), lambda drawn: all_on, torch.empty(0), False
        )
        assert seen == {precision}
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_bf16_that_a_gpu_does_not_have_is_refused():
    with simulated(capability=(7, 5)), pytest.raises(UserError, match="the GPU simulated has no bf16: choose"):
        pick_precision("bf16", pick_device())


def test_precision_of_a_cpu():
    assert pick_precision("auto", CPU) == torch.float32 and pick_precision("bf16", CPU) == torch.bfloat16
    assert device_text(CPU, torch.bfloat16) == "cpu in bf16 (Fisher and report in full float32)"
    assert device_text(CPU, torch.float32) == "cpu in full float32"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("shape", "made_with"),
    [
        ((6, 5), {}), ((7, 4, 3, 3), {}), ((6, 5, 2, 2, 2), {}), ((6, 5), {"affine": False}),
        ((6, 5), {"momentum": None}), ((6, 5), {"track_running_stats": False}),
    ],
)  # fmt: skip
def test_a_shared_norm_alone_is_a_plain_one(shape: tuple[int, ...], made_with: dict, device: str):
    """In float64, so that a wrong term could not hide, and without a wait: outputs, statistics and all gradients."""
    kind = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    plain = kind(shape[1], **made_with).double()
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    with simulated() as waits:
        shared = with_shared_norms(nn.Sequential(copy.deepcopy(plain)).to(device))[0]
        assert type(shared) is SharedBatchNorm
        for _ in range(2):
            x, g = torch.randn(shape, dtype=torch.float64) * 2 + 3, torch.randn(shape, dtype=torch.float64)
            results = []
            for norm, place in ((plain, "cpu"), (shared, device)):
                own, upward = (t.clone().to(place) for t in (x, g))
                own.requires_grad_()
                norm.zero_grad()
                waits.clear()
                y = norm(own)
                y.backward(upward)
                assert not waits
                gradients = [own.grad, *(p.grad for p in norm.parameters())]
                results.append([t.detach().cpu().clone() for t in (y, *gradients, *norm.state_dict().values())])
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)
        plain.eval(), shared.eval()
        evaluated = shared(x.to(device)).detach().cpu()
        torch.testing.assert_close(evaluated, plain(x).detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("saved_on_gpu", [True, False])
def test_random_numbers_go_on_on_another_kind_of_device(saved_on_gpu: bool):
    with simulated():
        devices = [torch.device("cuda"), CPU]
        first, second = devices if saved_on_gpu else devices[::-1]
        saved = Randomness(0, first)
        torch.rand(3, generator=saved.draws, device=first)
        drawn = []
        for _ in range(2):
            resumed = Randomness(0, second)
            resumed.load_state_dict(saved.state_dict())
            drawn.append(torch.rand(5, generator=resumed.draws, device=second).tolist())
            assert torch.equal(resumed.data.get_state(), saved.data.get_state())
        assert drawn[0] == drawn[1] != torch.rand(5, generator=Randomness(0, second).draws, device=second).tolist()


def test_images_on_a_full_gpu_stay_there():
    with simulated():
        given = images(8).to(pick_device())
    with simulated(free_memory=0):
        again = given.to(pick_device())
        assert isinstance(next(iter(again.batches([torch.arange(4)]))), SimulatedTensor)


def test_a_network_on_a_gpu_is_exported():
    with simulated():
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).to("cuda").eval()
        assert general_model(network, NORMALISATION, 8, 8)[1] <= 1e-4
        assert next(network.parameters()).is_cuda
