"""Names with dollar signs, between which matplotlib looks for mathematics, in pictures."""

import io

import torch
from networks import varied_images

from gating.pictures import draw_easy_and_hard, draw_passing
from pruning.changes import ranks_picture
from utils.data.images import ImageSet
from utils.runs.results import results_picture

NAME = r"a$\nothing{$b"  # no mathematics that there is
RECORD = {
    "method": "w/o Pruning", "stage": "sp", "dataset": NAME, "network": "resnet", "depth": 8, "width": 8,
    "accuracy": 0.9, "gflops": 0.1, "points": [], "checkpoint": "sp/best.pt", "source": None,
}  # fmt: skip


def test_names_with_dollar_signs_can_be_drawn():
    pages = draw_easy_and_hard(ImageSet(varied_images(4), torch.arange(4) % 2), torch.rand(4), [NAME, "b"], count=1)
    layers = ranks_picture([("start", {NAME: (1, 2)})])
    for figure in (draw_passing(torch.rand(2, 3), [NAME, "b"]), *pages, results_picture([RECORD]), layers):
        figure.savefig(io.BytesIO(), format="png")
