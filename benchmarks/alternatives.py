"""Alternatives to skipping per image at equal executed FLOPs: do the switches add anything?

From the statically pruned network that stage 3 started from, and at the mean FLOPs that stage 3's network executes:

* ``pruned further``: static pruning continues to these FLOPs;
* ``blocks removed``: whole blocks leave for all images, the least harmful one first, judged on the validation
  images, until the FLOPs are reached.  Blocks are large, so these FLOPs lie between those of two sets: both are
  fine-tuned, and what counts is the network of both between which a coin chooses for each image, with these very FLOPs;
* ``switches``: stage 3's network, every switch deciding image by image;
* ``random switches``: the same network, each switch deciding at random as often as it does by itself;
* ``switches fixed``: what stage 3 made of it at its end, those switches fixed that pay (left out where none was);
* with --dense, ``Torch-Pruning``: stage 1's network without its channels of least importance, at static's FLOPs, and
  fine-tuned for as many epochs as stage 2 took for it, in one schedule, following stage 1's network as stage 2 does.

The first two are fine-tuned for as many epochs as stage 3 took, following the network they come from, as stage 3 does;
the epoch with the best validation accuracy counts.  Accuracies are those of the test images.  Finished measurements are
kept in OUT.jsonl, so a run that is started again with the same arguments continues.

    python -m benchmarks.alternatives --static PRUNED/best.pt --dynamic RL_PRUNED/best.pt --data_dir DATA --out OUT
"""

import argparse
import itertools
import json
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import Trained, append_line, beside, machine, milliseconds, read_lines
from benchmarks.competitor import Competitor, torch_pruned
from deploy.folding import without_switches
from gating.fixing import BEFORE_FIXING, with_fixed_switches
from models import ResNet, all_on
from models.decisions import DecisionRule
from pruning.compress import prune_once
from pruning.goals import Goal
from pruning.settings import Method
from training.distillation import distillation_loss_fn
from training.evaluate import evaluate
from training.forward import training_forward
from training.norms import placed, reestimate_batch_norms
from training.optimisers import rates_of_epoch, sgd
from training.supervised import Supervision, supervised_epoch
from utils.data.batches import Splits, TrainingBatches, plain_batches, split_as_before
from utils.data.folder import load_data
from utils.data.images import Images
from utils.device import PRECISIONS, pick_device, pick_precision
from utils.errors import run_command
from utils.flops import NetworkCost, every_block, network_cost
from utils.runs.checkpoint import Checkpoint, check_data, load_checkpoint
from utils.settings import image_type

FISHER_IMAGES = 10000
COMPETITOR = Competitor("Hessian", everywhere=True)
RANDOM_DRAWS = 5  # passes over the test images with random decisions


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What switches add.", allow_abbrev=False)
    add = parser.add_argument
    add("--static", type=Path, required=True, help="best.pt of stage 2, which stage 3 started from")
    add("--dynamic", type=Path, required=True, help=f"best.pt of stage 3; {BEFORE_FIXING} beside it is read, too")
    add("--dense", type=Path, help="best.pt of stage 1, for Torch-Pruning")
    add("--data_dir", required=True, help="data folder they were trained on")
    add("--img_type", type=image_type, default="png", help="image files to read")
    add("--num_workers", type=int, default=4, help="threads that decode images")
    add("--epochs", type=int, default=10, help="of fine-tuning, as many as stage 3 took")
    add("--lr", type=float, default=0.02, help="of fine-tuning, at its start")
    add("--batch_size", type=int, default=128)
    add("--precision", choices=PRECISIONS, default="auto", help="of fine-tuning")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("alternatives"), help="path of the results, without .jsonl")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    static, dynamic, device = load_checkpoint(args.static), load_checkpoint(args.dynamic), pick_device()
    unsettled = args.dynamic.with_name(BEFORE_FIXING)
    size = static.data["image_size"]
    data = load_data(args.data_dir, args.img_type, size, args.num_workers)
    check_data(static, data, size)
    splits = split_as_before(data, static.data).to(device)
    start, fixed = Trained(static, splits, device), Trained(dynamic, splits, device)
    switched = Trained(load_checkpoint(unsettled), splits, device) if unsettled.exists() else fixed
    target = switched.evaluated(switched.network(), splits.val).flops_executed
    lines = beside(args.out, ".jsonl")
    lines.parent.mkdir(parents=True, exist_ok=True)
    done = {line["method"] for line in read_lines(lines)}
    methods = {
        "start": lambda: result(start, start.network(), all_on),
        "switches": lambda: switches(switched),
        "random switches": lambda: random_switches(switched, args.seed),
        **({"switches fixed": lambda: switches(fixed)} if unsettled.exists() else {}),
        "pruned further": lambda: pruned_further(start, target, args),
        "blocks removed": lambda: blocks_removed(start, target, args),
    }
    if args.dense:
        dense = Trained(load_checkpoint(args.dense), splits, device)
        flops = network_cost(start.network(), size).flops
        methods["Torch-Pruning"] = lambda: channels_pruned(dense, flops, epochs_of_stage_2(static), args)
    for method, measure in methods.items():
        if method not in done:
            torch.manual_seed(args.seed)
            measured = {"method": method, "seed": args.seed, **measure(), "machine": machine()}
            append_line(lines, measured)
            print(json.dumps(measured), flush=True)


def result(trained: Trained, network: ResNet, decide: DecisionRule) -> dict[str, float]:
    """Accuracy and executed GFLOPs on the test images, and the network's parameters."""
    measured = trained.evaluated(network, trained.splits.test, decide)
    parameters = sum(p.numel() for p in network.parameters())
    found = {"accuracy": measured.accuracy, "gflops": measured.flops_executed / 1e9, "parameters": parameters}
    if decide is all_on:
        found["milliseconds"] = milliseconds(trained, without_switches(network))
    return found


def switches(trained: Trained) -> dict[str, float]:
    """The switches' own decisions, and how many bits of them differ between images.

    The entropy of the decision pattern over the images measures how much the decisions depend on the image; the sum of
    the single switches' entropies is what it would be if they decided independently.
    """
    network = trained.network()
    measured = trained.evaluated(network, trained.splits.test)
    bits = sum(entropy([share, 1 - share]) for share in measured.passing)
    _, counts = measured.decisions.unique(dim=0, return_counts=True)
    return {
        "accuracy": measured.accuracy,
        "gflops": measured.flops_executed / 1e9,
        "parameters": sum(p.numel() for p in network.parameters()),
        "milliseconds": milliseconds(trained, network),
        "bits": bits,
        "bits_of_routes": entropy((counts / counts.sum()).tolist()),
        "routes": len(counts),
        "passing": measured.passing,
    }


def entropy(shares: Iterable[float]) -> float:
    """In bits."""
    return -sum(p * math.log2(p) for p in shares if p > 0)


def random_switches(trained: Trained, seed: int) -> dict[str, float]:
    """The same network with decisions that are drawn with the same rates, whatever the image."""
    network = trained.network()
    rates = trained.evaluated(network, trained.splits.val).passing
    draws = torch.Generator(trained.device).manual_seed(seed)
    found = [with_rates(trained, network, rates, draws) for _ in range(RANDOM_DRAWS)]
    return {key: sum(one[key] for one in found) / len(found) for key in found[0]}


@torch.no_grad()
def with_rates(trained: Trained, network: ResNet, rates: list[float], draws: torch.Generator) -> dict[str, float]:
    """One pass over the test images, every switch on with its rate."""
    cost, test = network_cost(network, trained.image_size), trained.splits.test
    correct, executed = 0, []
    for x, y in plain_batches(test, 256, trained.normalisation):
        passing = torch.rand(len(x), len(rates), generator=draws, device=x.device) < torch.tensor(
            rates, device=x.device
        )
        output = network(x, decide=decided(passing.float()))
        correct += (output.logits.argmax(dim=1) == y).sum().item()
        executed.append(cost.executed(output.decisions.cpu()))
    return {"accuracy": correct / len(test), "gflops": torch.cat(executed).mean().item() / 1e9}


def decided(decisions: Tensor) -> DecisionRule:
    """Rule for one forward pass with given decisions, [N, K] or [K]."""
    columns = iter(decisions.unbind(-1))
    return lambda probabilities: next(columns).to(probabilities.dtype).expand_as(probabilities)


def some_of(images: Images, seed: int) -> Images:
    """``FISHER_IMAGES`` of them, drawn by the seed."""
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:FISHER_IMAGES]]


def pruned_further(trained: Trained, target: float, args: argparse.Namespace) -> dict[str, float]:
    """Static pruning continued to ``target`` FLOPs, in one step."""
    network, splits = trained.network().eval(), trained.splits
    fisher = some_of(splits.train, args.seed)
    batches = lambda: plain_batches(fisher, args.batch_size, trained.normalisation)  # noqa: E731
    draws = torch.Generator(trained.device).manual_seed(args.seed)
    cost = network_cost(network, trained.image_size)
    method = Method(prune_ratio_limit=0.97)
    passes = method.passes(batches, draws, every_block)
    pruned = prune_once(network, passes, cost=cost, goal=Goal(flops=target), method=method)
    smaller = placed(pruned.network, trained.device)
    fine_tune(trained, smaller, args, all_on, args.epochs)
    return result(trained, smaller, all_on)


def epochs_of_stage_2(static: Checkpoint) -> int:
    """The epochs of fine-tuning of a network of stage 2, over all its iterations."""
    progress = static.progress  # a step is a pruning or an epoch, up to the best epoch of the last iteration
    return progress["step"] - progress["iteration"] - progress["epoch"] + progress["epochs"]


def channels_pruned(trained: Trained, flops: float, epochs: int, args: argparse.Namespace) -> dict[str, float]:
    """Torch-Pruning by the importance that kept most in the table of criteria, from stage 1's network to ``flops``."""
    some = some_of(trained.splits.train, args.seed)
    batches = list(plain_batches(some, args.batch_size, trained.normalisation))
    smaller = placed(torch_pruned(trained.network(), COMPETITOR, flops, trained.image_size, batches), trained.device)
    reestimate_batch_norms(smaller, batches, all_on)
    fine_tune(trained, smaller, args, all_on, epochs)
    return {**result(trained, smaller, all_on), "importance": COMPETITOR.importance, "epochs": epochs}


def blocks_removed(trained: Trained, target: float, args: argparse.Namespace) -> dict:
    """Whole blocks that leave for all images, greedily by the loss on the validation images."""
    network = trained.network()
    cost = network_cost(network, trained.image_size)
    sets = [torch.ones(network.switches)]
    while executed(cost, sets[-1]) > target and sets[-1].sum() > 0:
        sets.append(least_harmful(trained, network, trained.splits, cost, sets[-1]))
    more, fewer = (with_blocks(trained, kept, args) for kept in (sets[-2:] if len(sets) > 1 else 2 * sets))
    gap = more["gflops"] - fewer["gflops"]
    share = min(1.0, max(0.0, (target / 1e9 - fewer["gflops"]) / gap)) if gap else 0.0  # of images that take more
    mixed = {key: share * more[key] + (1 - share) * fewer[key] for key in ("accuracy", "gflops")}
    return {**mixed, "parameters": more["parameters"], "points": [more, fewer]}


def with_blocks(trained: Trained, kept: Tensor, args: argparse.Namespace) -> dict:
    """The network that runs the blocks ``kept`` [K] on all images, fine-tuned."""
    network, splits = trained.network(), trained.splits
    some = some_of(splits.train, seed=0)
    reestimate_batch_norms(network, plain_batches(some, args.batch_size, trained.normalisation), Same(kept))
    fine_tune(trained, network, args, Same(kept), args.epochs)
    left_out = {switch: 0 for switch, runs in enumerate(kept.tolist()) if not runs}
    parameters = sum(p.numel() for p in with_fixed_switches(network, left_out).parameters())
    return {**result(trained, network, Same(kept)), "parameters": parameters, "kept": kept.tolist()}


class Same:
    """Rule for any number of forward passes that decides the same for all images.

    Args:
        kept: [K], 1 where a block runs.
    """

    def __init__(self, kept: Tensor):
        self.columns = itertools.cycle(kept.tolist())

    def __call__(self, probabilities: Tensor) -> Tensor:
        return torch.full_like(probabilities, next(self.columns))


def executed(cost: NetworkCost, kept: Tensor) -> float:
    return cost.executed(kept[None]).item()


def least_harmful(trained: Trained, network: ResNet, splits: Splits, cost: NetworkCost, kept: Tensor) -> Tensor:
    """The set of blocks without the one whose removal costs the least validation loss for each FLOP it saves."""
    now = evaluate(network, splits.val, trained.normalisation, cost, Same(kept)).loss
    best = None
    for block in kept.nonzero().flatten().tolist():
        without = kept.clone()
        without[block] = 0
        loss = evaluate(network, splits.val, trained.normalisation, cost, Same(without)).loss
        price = (loss - now) / cost.blocks[block]
        if best is None or price < best[0]:
            best = price, without
    return best[1]


def fine_tune(trained: Trained, network: ResNet, args: argparse.Namespace, rule: DecisionRule, epochs: int) -> None:
    """Train ``network`` in place under a fixed rule; it ends with the weights of its best epoch."""
    precision = pick_precision(args.precision, trained.device)
    splits, order = trained.splits, torch.Generator().manual_seed(args.seed)
    draws = torch.Generator(trained.device).manual_seed(args.seed)
    optimiser = sgd(network, args.lr, momentum=0.9, weight_decay=5e-4)
    loss_fn = distillation_loss_fn(trained.network().eval(), 0.5, precision)
    cost = network_cost(network, trained.image_size)
    flip = trained.checkpoint.data["flip"]
    batches = TrainingBatches(splits.train, args.batch_size, order, trained.normalisation, flip)
    training = Supervision(
        network=network, optimiser=optimiser, draws=draws, loss_fn=loss_fn, rule=lambda drawn: rule,
        forward=training_forward(network, precision),
    )  # fmt: skip
    best = -1.0, network.state_dict()
    for epoch in range(1, epochs + 1):
        rate = rates_of_epoch(epoch, epochs, args.lr, schedule="cosine")
        supervised_epoch(training, batches, rate, f"epoch {epoch}/{epochs}")
        accuracy = evaluate(network, splits.val, trained.normalisation, cost, rule).accuracy
        if accuracy > best[0]:
            best = accuracy, {name: weight.clone() for name, weight in network.state_dict().items()}
    network.load_state_dict(best[1])


if __name__ == "__main__":
    run_command(main, goes_on="the same command")
