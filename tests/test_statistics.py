"""What is reported of the switches, against counts by hand."""

import torch

from gating.pictures import class_averages, extremes_by_class, passing_by_class

DECISIONS = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
LABELS = torch.tensor([0, 0, 1, 1])


def test_passing_by_class():
    assert passing_by_class(DECISIONS, LABELS, 2).tolist() == [[1.0, 0.5], [0.5, 0.0]]


def test_extremes_by_class_of_each_class():
    executed = torch.tensor([5.0, 1.0, 3.0, 3.0, 9.0])
    labels = torch.tensor([0, 0, 1, 1, 1])
    (cheap0, dear0), (cheap1, dear1) = extremes_by_class(executed, labels, 2, 2)
    assert (cheap0.tolist(), dear0.tolist()) == ([1, 0], [0, 1])
    assert (cheap1.tolist(), dear1.tolist()) == ([2, 3], [4, 2])


def test_class_averages_leave_out_classes_without_images():
    executed = torch.tensor([2.0, 4.0, 10.0])
    assert class_averages(executed, torch.tensor([0, 0, 2]), ["a", "b", "c"]) == {"a": 3.0, "c": 10.0}
