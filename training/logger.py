"""What a run logs: rows of metrics.jsonl, and what other sinks are given."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from comparing.runs import METRICS
from training.records import MetricsFile
from training.sinks import MakeSink, Sink, TensorBoardSink


class Logger:
    """Scalars to metrics.jsonl and to sinks, pictures and text to sinks; x is env steps everywhere.

    Each row of metrics.jsonl is on its way to the disk before `scalars` returns. `state_dict` marks a place in the
    file and `load_state_dict` cuts it there, so that a resumed run repeats no row. What cannot be written is no reason
    to stop: `notices` say so.
    """

    def __init__(
        self,
        logdir: Path,
        *,
        resume_step: int | None = None,
        sinks: Sequence[MakeSink] = (TensorBoardSink,),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the files of `logdir`, and the sinks.

        Args:
            logdir: an existing folder.
            resume_step: the step of the checkpoint that the run goes on from: `load_state_dict` is to follow. None
                for a run that begins: what an earlier process logged there, without reaching a checkpoint, is kept
                aside.
            sinks: what makes them, in their order.
            config: the run's, for those who show it.

        Raises:
            OSError: they cannot be written.
            UserError: a sink cannot begin.
        """
        self._sinks: list[Sink] = []
        with contextlib.ExitStack() as begun:
            for make in sinks:
                self._sinks.append(make(logdir, resume_step=resume_step, config=config or {}))
                begun.callback(self._sinks[-1].close)
            self._metrics = MetricsFile(logdir / METRICS, resume_step=resume_step)
            begun.pop_all()

    def scalars(self, step: int, seconds: float, values: Mapping[str, float | int]) -> None:
        """Log one row. A value that is not finite is null in metrics.jsonl, since JSON has no word for it."""
        row: dict[str, float | int | None] = {"step": step, "seconds": round(seconds, 3)}
        assert not row.keys() & values.keys()
        row |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        for sink in self._sinks:
            sink.scalars(step, round(seconds, 3), values)
        self._metrics.add(json.dumps(row, allow_nan=False).encode())

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Log a picture, uint8 `[height, width, 3]`."""
        for sink in self._sinks:
            sink.image(step, name, image)

    def text(self, name: str, markdown: str, *, step: int | None = None) -> None:
        """Log a page; with `step`, a line of a diary."""
        for sink in self._sinks:
            sink.text(name, markdown, step=step)

    def notices(self) -> list[str]:
        """What the user should read about files and sinks, a line each, and not said before."""
        lines: list[str] = []
        for notices in (*(sink.notices for sink in self._sinks), self._metrics.notices):
            lines += notices
            notices.clear()
        return lines

    def state_dict(self) -> dict[str, Any]:
        """The place in metrics.jsonl up to which a run resumed from here keeps the rows, and what they are."""
        return self._metrics.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], *, elsewhere: bool = False) -> None:
        """Cut metrics.jsonl at the marked place.

        Args:
            state: from `state_dict`.
            elsewhere: the checkpoint is from another folder: there is nothing to cut, and the rows begin here.

        Raises:
            OSError: the file cannot be changed.
        """
        self._metrics.load_state_dict(state, elsewhere=elsewhere)

    def close(self) -> None:
        """Close files and sinks."""
        self._metrics.close()
        for sink in self._sinks:
            sink.close()


class SilentLogger(Logger):
    """The logger of a rank that another one logs for."""

    def __init__(self) -> None:
        """Open nothing."""

    def scalars(self, step: int, seconds: float, values: Mapping[str, float | int]) -> None:
        """The first rank has them."""

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Likewise."""

    def text(self, name: str, markdown: str, *, step: int | None = None) -> None:
        """Likewise."""

    def notices(self) -> list[str]:
        """There are no files to tell of."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], *, elsewhere: bool = False) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing is open."""
