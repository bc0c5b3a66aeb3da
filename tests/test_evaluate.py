"""Executed FLOPs of a whole evaluation against torch's own counter, and the pages of images."""

import pytest
import torch
from networks import NORMALISATION, STAGES, lively_network, varied_images
from torch.utils.flop_counter import FlopCounterMode

from gating.pictures import CLASSES_A_PAGE, draw_easy_and_hard
from training.evaluate import evaluate
from utils.data.images import ImageSet
from utils.flops import network_cost


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("gate", ["rnn", "ff1", "ff2", "none"])
def test_executed_flops_equal_the_counters_over_an_evaluation(stage, gate):
    network = lively_network(stage, gate)
    images = ImageSet(varied_images(70), torch.randint(0, 10, (70,)))
    cost = network_cost(network, 16)
    with FlopCounterMode(display=False) as counter:
        measured = evaluate(network, images, NORMALISATION, cost, batch_size=32)
    assert measured.flops_all == cost.flops
    assert measured.executed.sum().item() == counter.get_total_flops()
    if stage == "rl_pruned" and gate != "none":
        assert 0.2 < measured.decisions.mean() < 0.8


def test_every_class_has_its_row_on_a_page():
    classes = [f"class {i}" for i in range(23)]
    labels = torch.arange(46) % 23
    pages = list(
        draw_easy_and_hard(ImageSet(varied_images(46), labels), torch.rand(46).double() * 1e6, classes, count=2)
    )
    assert [len(page.axes) // 5 for page in pages] == [CLASSES_A_PAGE, CLASSES_A_PAGE, 3]
    shown = [text.get_text() for page in pages for axis in page.axes for text in axis.texts]
    assert shown == classes
