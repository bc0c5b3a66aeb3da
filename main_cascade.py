"""The cascade: a small network answers if it is confident and hands other images on to the next network.

Takes the networks that the stages left, or those named, and searches for the best order and thresholds.  Nothing is
trained.  Writes result_dir/cascade/<data set>/<network><depth>/<run>/ and the results table.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from utils.interruptions import prepare

    prepare(goes_on=None)

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from deploy.labels import flops_run
from deploy.speeds import measured_speeds
from gating.cascade_report import (
    answered_by_class,
    draw_answered,
    draw_frontier,
    hardness_by_answer,
    what_is_known,
)
from gating.cascade_search import Candidate, Predictions, best_under, candidates, cheapest_within, outcome
from gating.pictures import by_class, draw_easy_and_hard
from models import Cascade, Member, allow, check_depth, is_own
from training.evaluate import Evaluator
from training.norms import placed
from training.report import Chosen, report
from utils import parallel
from utils.data.batches import Splits, split_as_before
from utils.data.folder import DataSet, load_data
from utils.data.images import Images
from utils.device import device_text, pick_device
from utils.errors import UserError, run_command
from utils.files import write_json
from utils.flops import network_cost
from utils.runs.checkpoint import Checkpoint, save_checkpoint
from utils.runs.predecessors import Found, cascade_networks, relative_to_results
from utils.runs.run import BEST, Run, open_run, stage_folder
from utils.settings import NETWORK_HELP, RunSettings, check_network, parse_flags, setting

PLAIN = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}  # of a cascade: its members normalise by themselves


@dataclass(frozen=True, kw_only=True)
class Settings(RunSettings):
    """The flags of the cascade."""

    network: tuple[str, ...] = setting(
        ("resnet",), f"{NETWORK_HELP}; several for a cascade of them", check=check_network
    )
    depth: tuple[int, ...] = setting(
        (32,), "depth of the network, 6n+2; several for a cascade of networks of these depths", check=check_depth
    )
    networks: tuple[str, ...] = setting((), "checkpoints to choose from; none: all networks of the newest runs")
    max_accuracy_drop: float = setting(
        0.01, "accuracy that may be lost against stage 1; 0.01 is one percentage point", low=0, high=1
    )
    target_flops: float = setting(
        0.0, "largest share of stage 1's FLOPs, used instead of the accuracy budget; 0: none", low=0, high=1
    )


def main() -> None:
    settings = parse_flags(Settings, "Choose a cascade from the networks of earlier runs.", resumes=False)[0]
    device = pick_device()
    data = load_data(**settings.data())
    for name in filter(is_own, settings.network):
        allow(name)
    networks, notes = cascade_networks(settings, data)
    splits = validation(data, networks).to(device)
    parent = stage_folder(settings.result_dir, "cascade", data.name, settings.network[0], settings.depth[0])
    with open_run(parent, settings, None, False, {}) as run:
        run.say(
            f"{run.path} on {device_text(device, torch.float32)}: {len(networks)} networks, {len(splits.val):,} "
            f"validation images"
        )
        for note in [*notes, *splits.notes]:
            run.say(note)
        predictions, labels = predicted(networks, splits.val), splits.val.labels.cpu()
        for (path, _), network in zip(networks, predictions, strict=True):
            right, flops = network.probabilities.argmax(dim=1) == labels, network.executed.mean().item()
            name = relative_to_results(path, settings.result_dir)
            run.say(f"{name}: {right.double().mean():.2%} at {flops / 1e9:.4g} GFLOPs")
        reference = reference_of(networks)
        found = candidates(predictions, labels, reference)
        chosen, within_budget = choose(found, predictions, labels, networks, settings)
        best = checkpoint_of(networks, chosen, settings)
        save_checkpoint(run.path / BEST, best)
        say_choice(run, networks, chosen, best, within_budget)
        floor = networks[reference][1].metrics["accuracy"] - settings.max_accuracy_drop
        run.picture("frontier", draw_frontier(found, chosen, None if settings.target_flops else floor))
        on_test(run, networks, chosen, splits.test)
        report(settings.result_dir, run, Chosen(best, "validation", within_budget), splits.test, measured_speeds)


def validation(data: DataSet, networks: Found) -> Splits:
    """The images that all networks have set aside.

    Raises:
        UserError: if there are none, or if the networks have set aside different ones.
    """
    (first_path, first), *others = networks
    for path, checkpoint in others:
        if not torch.equal(first.data["set_aside"], checkpoint.data["set_aside"]):
            raise UserError(
                f"{path} and {first_path} have set different validation images aside, so one of them was trained on "
                f"validation images of the other: name --networks that were made with the same split"
            )
    splits = split_as_before(data, first.data)
    if splits.val_is_test:
        raise UserError(
            "the networks have no validation images, and a cascade is not chosen on test images: make the networks "
            "with a val_fraction above 0, or with --val_dir"
        )
    return splits


def predicted(networks: Found, images: Images) -> list[Predictions]:
    """The answers of every network for the images."""
    found = []
    for _, checkpoint in networks:
        evaluated = Evaluator(images, checkpoint.normaliser(), checkpoint.data["image_size"])
        evaluation = evaluated(placed(checkpoint.network(), images.device))
        found.append(Predictions(evaluation.logits.softmax(dim=1), evaluation.executed))
    return found


def reference_of(networks: Found) -> int:
    """Index of the network that the budget refers to: stage 1's or, if it is not among them, the most accurate."""
    of_stage_1 = [i for i, (_, checkpoint) in enumerate(networks) if checkpoint.stage == "sp"]
    return max(of_stage_1 or range(len(networks)), key=lambda i: networks[i][1].metrics["accuracy"])


def choose(
    found: list[Candidate], predictions: list[Predictions], labels: Tensor, networks: Found, settings: Settings
) -> tuple[Candidate, bool]:
    """The best cascade within the budget, and whether there is one; else the most accurate cascade.

    Raises:
        UserError: if there is no cascade, or the target in FLOPs is below that of every cascade.
    """
    reference = reference_of(networks)
    cascades = [candidate for candidate in found if len(candidate.members) > 1]
    if not cascades:
        raise UserError(
            "every network is certain of every validation image, so that none would be handed on: give other --networks"
        )
    if settings.target_flops:
        whole = networks[reference][1].original["flops"]
        chosen = best_under(cascades, settings.target_flops * whole)
        if chosen is None:
            raise UserError(
                f"--target_flops {settings.target_flops:g} is out of reach: the cheapest cascade takes "
                f"{cascades[0].flops / whole:.3f} of stage 1's FLOPs; raise it, or prune further in stage 2"
            )
        return chosen, True
    chosen = cheapest_within(cascades, predictions, labels, reference, settings.max_accuracy_drop)
    return (max(cascades, key=lambda c: c.accuracy), False) if chosen is None else (chosen, True)


def checkpoint_of(networks: Found, chosen: Candidate, settings: Settings) -> Checkpoint:
    """The cascade as one network that describes itself."""
    members = [networks[i][1] for i in chosen.members]
    network = Cascade(
        [Member(c.network(), c.normalisation["mean"], c.normalisation["std"]) for c in members],
        chosen.thresholds,
        chosen.answer,
    )
    reference = networks[reference_of(networks)][1]
    every = network_cost(network, reference.data["image_size"]).flops
    return replace(
        reference,
        stage="cascade",
        architecture=network.architecture,
        weights=network.state_dict(),
        normalisation=PLAIN,
        metrics={"accuracy": chosen.accuracy, "computation": chosen.flops / every},
        seed=settings.seed,
        progress={},
        training={},
        source=relative_to_results(row_above(networks), settings.result_dir),
    )


def row_above(networks: Found) -> Path:
    """The network that the results table shows above the cascade: the last stage's of the reference's family."""
    original = networks[reference_of(networks)][1].original
    family = [(path, checkpoint.stage) for path, checkpoint in networks if checkpoint.original == original]
    newest = max(family, key=lambda item: ["sp", "pruned", "rl_pruned"].index(item[1]))[0]
    best = newest.with_name(BEST)  # where the run has ended
    return best if best.exists() else newest


def say_choice(run: Run, networks: Found, chosen: Candidate, best: Checkpoint, within_budget: bool) -> None:
    """Log which networks answer in turn, when they hand on, and the cost."""
    names = [f"{Path(networks[i][0]).parent.name}/{Path(networks[i][0]).name}" for i in chosen.members]
    thresholds = ", ".join(f"{threshold:.4f}" for threshold in chosen.thresholds)
    answer = {"last": "that of the last network that ran", "mean": "the mean of the networks that ran"}[chosen.answer]
    whole, size = best.network(), best.data["image_size"]
    worst = sum(flops_run(member, size) for member in whole.members)  # without blocks that were removed
    run.say(f"chosen: {' then '.join(names)}; a network hands on below a confidence of {thresholds}")
    run.say(
        f"the answer is {answer}: validation accuracy {chosen.accuracy:.2%} at {chosen.flops / 1e9:.4g} GFLOPs, "
        f"{chosen.flops / best.original['flops']:.1%} of stage 1's"
    )
    parameters = network_cost(whole, size).parameters
    run.say(f"worst case, all members run: {worst / 1e9:.4g} GFLOPs; {parameters:,} parameters together")
    if not within_budget:
        run.say("no cascade met the budget, so the most accurate is kept: raise --max_accuracy_drop or add --networks")


def on_test(run: Run, networks: Found, chosen: Candidate, test: Images) -> None:
    """Draw and write which member answers which test images, and how well the decision separates them."""
    members = [networks[i] for i in chosen.members]
    predictions, labels, classes = predicted(members, test), test.labels.cpu(), members[0][1].classes
    if not parallel.is_main_process():
        return
    done = outcome(predictions, replace(chosen, members=tuple(range(len(members)))), labels)
    run.picture("answered_by_class", draw_answered(done, labels, classes))
    for name, figure in draw_easy_and_hard(test, hardness_by_answer(done, predictions[0]), classes):
        run.picture(name, figure)
    routing = what_is_known(done, predictions, labels)
    routing["answered_by_class"] = by_class(answered_by_class(done, labels, len(classes)), classes)
    write_json(run.path / "routing.json", routing)
    kept, others = (routing[f"accuracy_first_{where}"] for where in ("kept", "handed_on"))
    kept, others = ("–" if accuracy is None else f"{accuracy:.2%}" for accuracy in (kept, others))
    run.say(
        f"test images: the first network hands on {routing['handed_on']:.1%}; its accuracy is {kept} on those that it "
        f"keeps, and would be {others} on the others"
    )


if __name__ == "__main__":
    run_command(parallel.distributed(main), goes_on=None)
