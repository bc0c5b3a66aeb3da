"""What is measured of the switches, against torch's own counter and counts by hand, and the pictures of it."""

import io

import pytest
import torch
from networks import NORMALISATION, STAGES, lively_network, varied_images
from test_records import record
from torch.utils.flop_counter import FlopCounterMode

from gating.cascade_report import draw_answered
from gating.cascade_search import Outcome
from gating.pictures import (
    CLASSES_A_PAGE,
    by_class,
    class_means,
    draw_easy_and_hard,
    draw_run_shares,
    extremes_by_class,
    hardness_by_flops,
)
from pruning.changes import ranks_picture
from training.evaluate import Evaluator
from utils.data.images import ImageSet
from utils.flops import network_cost
from utils.runs.results import results_picture


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("gate", ["rnn", "ff1", "ff2", "none"])
def test_executed_flops_equal_the_counters_over_an_evaluation(stage, gate):
    network = lively_network(stage, gate)
    images = ImageSet(varied_images(70), torch.randint(0, 10, (70,)))
    cost = network_cost(network, 16)
    with FlopCounterMode(display=False) as counter:
        measured = Evaluator(images, NORMALISATION, 16, batch_size=32)(network)
    assert measured.flops_all == cost.flops
    one = cost.flops  # of the image on which the evaluation counts FLOPs itself
    assert measured.executed.sum().item() == counter.get_total_flops() - one
    assert cost.shares.sum().item() == pytest.approx(int(gate != "none"), abs=1e-6)
    if stage == "rl_pruned" and gate != "none":
        assert 0.2 < measured.decisions.mean() < 0.8


def test_every_class_has_its_row_on_a_page():
    classes = [f"class {i}" for i in range(23)]
    labels = torch.arange(46) % 23
    hardness = hardness_by_flops(torch.rand(46).double() * 1e6)
    drawn = draw_easy_and_hard(ImageSet(varied_images(46), labels), hardness, classes, count=2)
    names, pages = zip(*drawn, strict=True)
    assert names == ("easy_and_hard_01", "easy_and_hard_02", "easy_and_hard_03")
    assert [len(page.axes) // 5 for page in pages] == [CLASSES_A_PAGE, CLASSES_A_PAGE, 3]
    shown = [text.get_text() for page in pages for axis in page.axes for text in axis.texts]
    assert shown == classes


DECISIONS = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
LABELS = torch.tensor([0, 0, 1, 1])


def test_means_of_classes():
    assert class_means(DECISIONS, LABELS, 2).tolist() == [[1.0, 0.5], [0.5, 0.0]]


def test_extremes_by_class_of_each_class():
    executed = torch.tensor([5.0, 1.0, 3.0, 3.0, 9.0])
    labels = torch.tensor([0, 0, 1, 1, 1])
    (cheap0, dear0), (cheap1, dear1) = extremes_by_class(executed, labels, 2, 2)
    assert (cheap0.tolist(), dear0.tolist()) == ([1, 0], [0, 1])
    assert (cheap1.tolist(), dear1.tolist()) == ([2, 3], [4, 2])


def test_class_averages_leave_out_classes_without_images():
    executed = torch.tensor([2.0, 4.0, 10.0])
    assert by_class(class_means(executed, torch.tensor([0, 0, 2]), 3), ["a", "b", "c"]) == {"a": 3.0, "c": 10.0}


NAME = r"a$\nothing{$b"  # no mathematics that there is


def test_names_with_dollar_signs_can_be_drawn():
    given = ImageSet(varied_images(4), torch.arange(4) % 2), hardness_by_flops(torch.rand(4))
    (page,) = draw_easy_and_hard(*given, [NAME, "b"], count=1)
    layers = ranks_picture([("start", {NAME: (1, 2)})])
    results = results_picture([record("sp", "1", dataset=NAME)])
    done = Outcome(torch.ones(4).bool(), torch.ones(4), torch.tensor([1, 1, 2, 1]), members=3)
    answered = draw_answered(done, torch.arange(4) % 2, [NAME, "b"])
    for figure in (draw_run_shares(torch.rand(2, 3), [NAME, "b"]), page[1], results, layers, answered):
        figure.savefig(io.BytesIO(), format="png")
