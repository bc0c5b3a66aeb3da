"""The GPU's path without a GPU: every tensor where it has to be, and no wait inside a training step."""

import pytest
import torch
from simulated_gpu import SimulatedTensor, simulated

from gating.baselines import BASELINES
from gating.distillation import distillation_loss_fn
from gating.reinforce import Reinforcement, reinforce_epoch
from gating.steering import SteeredAlpha
from gating.supervised import supervised_epoch
from models import ResNet, all_on, build_network
from utils.data.augment import Normalisation
from utils.data.batches import TrainingBatches
from utils.data.images import ImageSet
from utils.device import Randomness, pick_device, placed
from utils.optimisers import reinforcement_optimisers, sgd

CPU = torch.device("cpu")
BATCH = 8
NORMALISATION = Normalisation((0.5,) * 3, (0.2,) * 3)


def network(gate: str = "rnn") -> ResNet:
    torch.manual_seed(0)
    return build_network("resnet", depth=8, num_classes=5, width=4, gate=gate, ranks={"blocks.1.conv2": (4, 4)})


def images(count: int) -> ImageSet:
    return ImageSet(torch.zeros(count, 3, 8, 8, dtype=torch.uint8), torch.arange(count) % 5)


@pytest.mark.parametrize("stage", ["sp", *BASELINES])
@pytest.mark.parametrize("free", [2**30, 0])
def test_a_step_waits_for_nothing(stage: str, free: int):
    """As many waits in an epoch of eight steps as in one of four."""
    with simulated(free_memory=free) as trace:
        device = pick_device()
        net, teacher = placed(network(), device), placed(network(), device).eval()
        draws = torch.Generator(device).manual_seed(0)
        loss_fn = distillation_loss_fn(teacher, 0.5)

        def epoch(steps: int):
            given = images(BATCH * steps).to(device)
            batches = TrainingBatches(given, BATCH, torch.Generator().manual_seed(0), NORMALISATION, True)
            trace.clear()
            if stage == "sp":
                optimiser = sgd(net, 1e-3, 0.9, 0.0)
                supervised_epoch(
                    net, batches, optimiser, learning_rate=lambda _: 1e-3, draws=draws, title="", loss_fn=loss_fn
                )
            else:
                setup = Reinforcement(
                    network=net, optimisers=reinforcement_optimisers(net, 0.9, 0.0), shares=torch.tensor([0.5, 0.5]),
                    draws=draws, baseline=stage, loss_fn=loss_fn,
                )  # fmt: skip
                reinforce_epoch(setup, batches, [lambda _: 1e-3] * 2, SteeredAlpha(0.1, 1.0, 0.5, steps, device), "")
            return trace.waits.copy()

        epoch(4)
        assert epoch(8) == epoch(4)


@pytest.mark.parametrize("saved_on_gpu", [True, False])
def test_random_numbers_go_on_on_another_kind_of_device(saved_on_gpu: bool):
    with simulated():
        devices = [torch.device("cuda"), CPU]
        first, second = devices if saved_on_gpu else devices[::-1]
        Randomness(0, second).load_state_dict(Randomness(0, first).state_dict())


def test_adam_goes_on_on_a_gpu():
    def step(net, optimisers, device):
        output = net(torch.randn(4, 3, 8, 8).to(device), decide=all_on, skip=False)
        (output.logits.sum() + output.probabilities.sum()).backward()
        for optimiser in optimisers:
            optimiser.step()

    net = placed(network(), CPU)
    before = reinforcement_optimisers(net, 0.9, 0.0)
    step(net, before, CPU)
    with simulated():
        device = pick_device()
        net = placed(network(), device)
        after = reinforcement_optimisers(net, 0.9, 0.0)
        for optimiser, saved in zip(after, before, strict=True):
            optimiser.load_state_dict(saved.state_dict())
        step(net, after, device)


def test_images_on_a_full_gpu_stay_there():
    with simulated():
        given = images(8).to(pick_device())
    with simulated(free_memory=0):
        again = given.to(pick_device())
        assert isinstance(next(iter(again.batches([torch.arange(4)]))).pixels, SimulatedTensor)
