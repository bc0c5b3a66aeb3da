"""Names with dollar signs, between which matplotlib looks for mathematics, in pictures."""

import io

import torch
from networks import varied_images
from test_records import record

from gating.pictures import draw_easy_and_hard, draw_passing
from pruning.changes import ranks_picture
from utils.data.images import ImageSet
from utils.runs.results import results_picture

NAME = r"a$\nothing{$b"  # no mathematics that there is


def test_names_with_dollar_signs_can_be_drawn():
    pages = draw_easy_and_hard(ImageSet(varied_images(4), torch.arange(4) % 2), torch.rand(4), [NAME, "b"], count=1)
    layers = ranks_picture([("start", {NAME: (1, 2)})])
    results = results_picture([record("sp", "1", dataset=NAME)])
    for figure in (draw_passing(torch.rand(2, 3), [NAME, "b"]), *pages, results, layers):
        figure.savefig(io.BytesIO(), format="png")
