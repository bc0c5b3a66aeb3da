"""A run in TensorBoard: its curves and their overview, its settings, its pictures and its results.

TensorBoard opens on "Time Series", which sorts charts by their tags, unfolds the first two groups and folds up the
others: ``Overview`` comes first, then ``Overview-results``, then all whose names sort behind.  "Custom Scalars" shows
several curves in a chart, "HParams" the settings of all runs with the first five metrics.
"""

import io
import json
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.summary_v2 import hparams_pb  # ``hparams.api`` imports TensorFlow
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import custom_scalars, scalar, text

from utils.files import append

# In "Time Series" this group follows Overview; among metrics, which are sorted by character, "-" comes before "/".
RESULTS_GROUP = "Overview-results"
EVENTS = "events.out.tfevents"  # and seconds since 1970: the name by which TensorBoard finds its files
Charts = Mapping[str, Mapping[str, Sequence[str]]]  # section, chart, and regular expressions for the tags it shows


class TensorBoard:
    """The event file of a run.  Each event is written whole, or raises OSError and is missing.

    ``SummaryWriter`` writes in a thread, which a full disk ends with a traceback.

    Args:
        purge_after: what was shown of later steps before is forgotten; None for a new run.
    """

    def __init__(self, folder: Path, purge_after: int | None = None):
        *subject, run = folder.parts[-4:]  # stage, data set, network
        self._name = f"{run} {'/'.join(subject)}"  # the part that differs first: TensorBoard shortens long names
        self._last_step = purge_after or 0
        # Files are read in the order of their names: behind all that there are, also if the clock was set back.
        stamps = (re.match(r"\d+", path.name[len(EVENTS) + 1 :]) for path in folder.glob(f"{EVENTS}.*"))
        now = max([time.time(), *(int(stamp[0]) + 1.0 for stamp in stamps if stamp)])
        self._path = folder / f"{EVENTS}.{now:017.6f}.{socket.gethostname()}.{os.getpid()}"
        # It takes the first such mark for the start and purges at later ones: a new run needs one, too.
        start = 0 if purge_after is None else purge_after + 1
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=start, session_log=SessionLog(status=SessionLog.START)))

    def show_settings(self, settings: Mapping[str, Any], charts: Charts) -> None:
        """Once per run: its settings, as text and as hyperparameters, and which curves share a chart.

        A list of hyperparameters would let TensorBoard show those of one stage only.  Without a list it collects those
        of all runs, and offers the last value of every curve beside them.
        """
        layout = {section: {title: ["Multiline", list(tags)] for title, tags in group.items()}
                  for section, group in charts.items()}  # fmt: skip
        self._add(0, custom_scalars(layout), text("settings", settings_table(settings)))
        self._add(0, hparams_pb(hyperparameters(settings), self._name))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._last_step = max(self._last_step, step)
        self._add(step, *(scalar(tag, value) for tag, value in values.items()))

    def results(self, table: str, values: Mapping[str, float]) -> None:
        """At the end of a run: the results table as text, and numbers that stand beside the hyperparameters."""
        numbers = [scalar(f"{RESULTS_GROUP}/{name}", value) for name, value in values.items()]
        self._add(self._end, text("results", table), *numbers)

    def picture(self, name: str, png: bytes, step: int | None = None) -> None:
        """A PNG file's content; without a step it belongs to the run as a whole."""
        width, height = Image.open(io.BytesIO(png)).size
        picture = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=png)
        values = Summary(value=[Summary.Value(tag=f"Pictures/{name}", image=picture)])
        self._add(self._end if step is None else step, values)

    def _add(self, step: int, *summaries: Summary) -> None:
        values = [value for summary in summaries for value in summary.value]
        self._write(Event(step=step, summary=Summary(value=values)))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        append(self._path, record.getvalue())

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
