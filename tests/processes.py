"""What several processes do together, and one alone: ``python processes.py TASK OUTPUT ARGUMENT...``, RANK etc. set.

PYTHONPATH has the root of the repository.  Tasks: ``all`` trains and measures small networks, runs the three stages and
ends with a mistake that one process finds; ``gpus`` trains on simulated GPUs; ``lose`` runs stage 1, in which one
process is killed after the third epoch.
"""

import functools
import os
import signal
import sys
from pathlib import Path

import torch
from commands import SCRIPTS, arguments, call_stage
from networks import small_network
from simulated_gpu import simulated

from deploy import speeds
from gating.reinforce import Reinforcement, reinforce_epoch
from gating.steering import SteeredAlpha
from models import ResNet, all_on, thresholded
from pruning.capture import Passes
from pruning.eigenbasis import eigenbasis, gradient_squares
from pruning.factors import collect_factors
from pruning.layers import composed, prunable_layers, rebuilt_layers, weights_of
from pruning.refit import refit
from pruning.surgery import merged, rebuild
from pruning.survey import survey
from pruning.tucker import tucker
from training.evaluate import Evaluator
from training.norms import placed, reestimate_batch_norms
from training.optimisers import sgd
from training.supervised import Supervision, supervised_epoch
from utils import parallel
from utils.data.augment import Normalisation
from utils.data.batches import TrainingBatches, plain_batches, training_normalisation
from utils.data.images import ImageSet
from utils.device import pick_device
from utils.errors import UserError, run_command
from utils.flops import every_block
from utils.runs.run import Run

CPU = torch.device("cpu")
NORMALISATION = Normalisation((0.4, 0.5, 0.6), (0.3, 0.3, 0.3))
BATCH = 9  # of 41 images: parts that are not equal, in the last batch too


def images() -> ImageSet:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(41) % 3
    pixels = torch.randint(0, 120, (41, 3, 8, 8), generator=generator) + 60 * labels.view(-1, 1, 1, 1)
    return ImageSet(pixels.to(torch.uint8), labels)


def network(gate: str = "rnn", device: torch.device = CPU) -> ResNet:
    return placed(small_network(gate), device)


def batches(epoch: int, size: int = BATCH, device: torch.device = CPU):
    return TrainingBatches(images().to(device), size, torch.Generator().manual_seed(epoch), NORMALISATION, True)


def supervised(size: int = BATCH, device: torch.device = CPU) -> dict:
    net, draws = network(device=device), torch.Generator(device).manual_seed(3)
    optimiser = sgd(net, 0.05, 0.9, 5e-4)
    training = Supervision(network=net, optimiser=optimiser, draws=draws)
    means = [supervised_epoch(training, batches(e, size, device), lambda _: 0.05, "") for e in range(2)]
    return {"weights": net.state_dict(), "means": [vars(m) for m in means], "draws": draws.get_state()}


def reinforced(gate: str, size: int = BATCH, device: torch.device = CPU, **recipe: bool) -> dict:
    net, draws = network(gate, device), torch.Generator(device).manual_seed(3)
    # Not Adam, whose steps are of one size for gradients of any size, rounding included.
    optimisers = (sgd(net, 0.05, 0.9, 5e-4),)
    alpha = SteeredAlpha(0.5, 1.0, 0.2, 6, device)
    setup = Reinforcement(
        network=net, optimisers=optimisers, shares=torch.tensor([0.4, 0.6], device=device), draws=draws, rl_weight=1.0,
        **recipe,
    )  # fmt: skip
    # The first block is often skipped by all images of a batch, and its weights then have a gradient of zero.
    for layer in [net.gate.decision] if gate == "rnn" else net.gate.decisions:
        torch.nn.init.constant_(layer.bias, -2.0)
    rates = (lambda _: 0.05,)
    means = [reinforce_epoch(setup, batches(e, size, device), rates, alpha, "") for e in range(2)]
    return {"weights": net.state_dict(), "means": [vars(m) for m in means], "alpha": alpha.final}


def measured() -> dict:
    """Factors, EK-FAC's squares, re-estimated norms and an evaluation of a network whose switches differ by image."""
    net, found = network(), {}
    layers = prunable_layers(net)
    for kind in ("true", "empirical"):
        draws = torch.Generator().manual_seed(5)
        pass_ = lambda: plain_batches(images(), 8, NORMALISATION, shared=True)  # noqa: E731 - the last batch holds one image
        passes = Passes(pass_, draws, kind, every_block)
        factors = collect_factors(net, layers, passes)
        bases = {name: eigenbasis(factor) for name, factor in factors.items()}
        # Signs of eigenvectors are no concern of the processes: squares in the layers' own coordinates, too.
        found[kind] = {
            "A": {name: f.A for name, f in factors.items()}, "G": {name: f.G for name, f in factors.items()},
            "squares": gradient_squares(net, layers, {}, passes),
            "rotated": gradient_squares(net, layers, bases, passes),
        }  # fmt: skip
    smaller = rebuild(
        net,
        {name: merged(w := weights_of(net.get_submodule(name)), tucker(w.core, bases[name], torch.arange(2),
                                                                       torch.arange(3)))
         for name in list(layers)[1:]},
    )  # fmt: skip
    norms = survey(net, torch.zeros(2, 3, 8, 8), every_block).norms
    rebuilt = rebuilt_layers(net, smaller, norms)
    refit(net, smaller, {name: norms[name] for name in rebuilt}, {}, passes)
    found["refitted"] = {name: composed(weights_of(smaller.get_submodule(name))) for name in rebuilt}
    net.gate.decision.weight.data.mul_(30)
    net.gate.decision.bias.data.zero_()
    for rule in (all_on, thresholded):
        run = functools.partial(ResNet.__call__, decide=rule)
        reestimate_batch_norms(net, plain_batches(images(), 8, NORMALISATION), run)
        found[rule.__name__] = {key: value.clone() for key, value in net.state_dict().items()}
    evaluation = Evaluator(images(), NORMALISATION, 8, batch_size=6)(net)
    found["evaluation"] = vars(evaluation)
    found["normalisation"] = list(training_normalisation(images(), 4).mean)
    return found


def all_figures() -> dict:
    return {
        "supervised": supervised(),
        "greedy, frozen": reinforced("rnn"),
        "published, frozen, ff2": reinforced("ff2", published=True),
        # Norms make plus and minus one of two images, whatever these are: gradients of a last batch of two would be
        # nothing but rounding.
        "greedy, follow": reinforced("rnn", 12, frozen_norms=False),
        "measured": measured(),
    }


def on_gpus() -> dict:
    """In float32, so that sums in another order are all that differs; no batch of two, which makes that much."""
    with simulated():
        device = pick_device()
        found = {
            "supervised": supervised(12, device),
            "follow": reinforced("rnn", 12, device, frozen_norms=False),
            "frozen": reinforced("ff1", 12, device),
        }  # fmt: skip
        for result in found.values():
            result["weights"] = {key: weight.cpu() for key, weight in result["weights"].items()}
        return found


# Few steps: rounding grows from step to step.
SHORT = {
    "sp": ["--epochs", "2"],
    "pruned": ["--set=max_iter=1", "--set=epochs_start=1", "--set=epochs_end=1"],
    "rl_pruned": ["--epochs", "2", "--batch_norm", "reestimate"],
}


def chain(data: Path, results: Path) -> None:
    """The three stages; orthogonal steps would magnify rounding from one step to the next, plain ones do not."""
    for stage in SCRIPTS:
        plain = ["--optimiser", "sgd"] if stage == "sp" else []
        call_stage(stage, [*arguments(stage, data, results), *SHORT[stage], *plain])


def refusing(rank: int) -> None:
    raise UserError(f"process {rank} refuses")


def lose(given: list[str]) -> None:
    record = Run.record

    def dying(self: Run, step: int, *args, **kwargs) -> None:
        record(self, step, *args, **kwargs)
        if step == 3 and parallel.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    Run.record = dying
    call_stage("sp", given)


def main() -> None:
    task, output, *given = sys.argv[1:]
    torch.set_num_threads(1)
    speeds.SECONDS = 0.0
    if task == "lose":
        lose(given)
        return
    if task == "gpus":
        torch.save(on_gpus(), f"{output}/gpus.{parallel.rank()}")
        return
    torch.save(all_figures(), f"{output}/measured.{parallel.rank()}")
    chain(Path(given[0]), Path(output) / "two")
    found = [parallel.from_main_process(lambda: f"process {parallel.rank()} finds")]
    try:
        parallel.from_main_process(lambda: refusing(parallel.rank()))
    except UserError as error:
        found.append(str(error))
    torch.save(found, f"{output}/found.{parallel.rank()}")
    if parallel.rank() == 1:
        raise UserError("process 1 has found a mistake")
    parallel.barrier()


if __name__ == "__main__":
    run_command(parallel.distributed(main))
