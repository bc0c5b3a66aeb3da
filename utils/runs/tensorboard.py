"""A run in TensorBoard: its curves and their overview, its settings, its pictures and its results.

TensorBoard opens on "Time Series", which sorts charts by their tags, unfolds the first two groups and folds up the
others: ``Overview`` comes first, then ``Overview-results``, then all whose names sort behind.  "Custom Scalars" shows
several curves in a chart, "HParams" the settings of all runs with the first five metrics.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorboard.plugins.hparams.summary_v2 import hparams_pb  # ``hparams.api`` imports TensorFlow
from torch.utils.tensorboard import SummaryWriter

# In "Time Series" this group follows Overview; among metrics, which are sorted by character, "-" comes before "/".
RESULTS_GROUP = "Overview-results"
Charts = Mapping[str, Mapping[str, Sequence[str]]]  # section, chart, and regular expressions for the tags it shows


class TensorBoard:
    """The event file of a run, flushed after each call: a signal may end the program at any moment.

    Args:
        purge_after: what was shown of later steps before is forgotten; None for a new run.
    """

    def __init__(self, folder: Path, purge_after: int | None = None):
        *subject, run = folder.parts[-4:]  # stage, data set, network
        self._name = f"{run} {'/'.join(subject)}"  # the part that differs first: TensorBoard shortens long names
        self._last_step = purge_after or 0
        # It takes the first such mark for the start and purges at later ones: a new run needs one, too.
        self._writer = SummaryWriter(folder, purge_step=0 if purge_after is None else purge_after + 1)
        self._writer.flush()

    def show_settings(self, settings: Mapping[str, Any], charts: Charts) -> None:
        """Once per run: its settings, as text and as hyperparameters, and which curves share a chart.

        A list of hyperparameters, as ``add_hparams`` writes it, would let TensorBoard show those of one stage only.
        Without a list it collects those of all runs, and offers the last value of every curve beside them.
        """
        layout = {section: {title: ["Multiline", list(tags)] for title, tags in group.items()}
                  for section, group in charts.items()}  # fmt: skip
        self._writer.add_custom_scalars(layout)
        self._writer.add_text("settings", settings_table(settings), 0)
        self._writer.file_writer.add_summary(hparams_pb(hyperparameters(settings), self._name), 0)
        self._writer.flush()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._last_step = max(self._last_step, step)
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def results(self, table: str, values: Mapping[str, float]) -> None:
        """At the end of a run: the results table as text, and numbers that stand beside the hyperparameters."""
        self._writer.add_text("results", table, self._end)
        for name, value in values.items():
            self._writer.add_scalar(f"{RESULTS_GROUP}/{name}", value, self._end)
        self._writer.flush()

    def picture(self, name: str, png: bytes, step: int | None = None) -> None:
        """A PNG file's content; without a step it belongs to the run as a whole."""
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        self._writer.add_image(f"Pictures/{name}", pixels, self._end if step is None else step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    @property
    def _end(self) -> int:
        """The step of items of the whole run: after the last one, so that a resumed run purges them."""
        return self._last_step + 1


def settings_table(settings: Mapping[str, Any]) -> str:
    """The settings as a table in Markdown."""
    cells = {name: _text(value).replace("\n", " ").replace("|", "\\|") for name, value in settings.items()}
    rows = [f"| {name} | {cell} |" for name, cell in cells.items()]
    return "\n".join(["| setting | value |", "|---|---|", *rows])


def hyperparameters(settings: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """The settings in the types that TensorBoard can compare; unset ones are left out."""
    return {
        name: value if isinstance(value, bool | int | float | str) else _text(value)
        for name, value in settings.items()
        if value is not None
    }


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
