"""What a sweep does next: the trials of a grid, and what every plan of trials can be asked."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, runtime_checkable

# How a trial has ended. One that was stopped is gone on with by the next sweep in its folder.
Ending = Literal["finished", "failed", "pruned", "stopped"]
LONGEST_VALUE = 40


class Row(NamedTuple):
    """What a run has logged of the metric that a search goes by."""

    step: int
    value: float


class Run(NamedTuple):
    """One run: the arguments of its program, and its folder."""

    arguments: tuple[str, ...]
    logdir: Path


class Trial(NamedTuple):
    """One setting of the keys that are varied: its name, and its runs, one after the other."""

    name: str
    runs: tuple[Run, ...]


@runtime_checkable
class Plan(Protocol):
    """Says which trial comes next, and is told how trials go.

    Attributes:
        metric: what of the runs' metrics it wants to see; None for nothing.
        total: how many trials it will have.
    """

    metric: str | None
    total: int

    def next(self) -> Trial | None:
        """The next trial; None where there is none."""

    def should_stop(self, trial: Trial, run: Run, rows: Sequence[Row]) -> bool:
        """Whether a trial is not worth going on with, by all that its run has logged so far."""

    def note(self, trial: Trial, ending: Ending, scores: Sequence[float]) -> None:
        """Take note of how a trial has ended, with the last value of the metric of each of its runs."""


class Template(NamedTuple):
    """What the runs of a sweep have in common: sections, settings, and the folder that they lie in."""

    sections: tuple[str, ...]
    settings: Mapping[str, str]
    folder: Path

    def run(self, name: str, settings: Mapping[str, str], seed: str) -> Run:
        """The run of a seed under further settings."""
        logdir = self.folder / f"{name}-seed{seed}".lstrip("-")
        sections = ["--configs", *self.sections] if self.sections else []
        flags = {**self.settings, **settings, "seed": seed, "logdir": str(logdir)}
        return Run((*sections, *(f"--{key}={value}" for key, value in flags.items())), logdir)


class Grid:
    """Every combination of some values with every seed, each a trial of one run."""

    metric: str | None = None

    def __init__(self, template: Template, axes: Mapping[str, Sequence[str]], *, seeds: Sequence[str]) -> None:
        """Combine the values of `axes`; the last key and the seeds change fastest."""
        self.trials: list[Trial] = []
        for values in itertools.product(*axes.values()):
            settings = dict(zip(axes, values, strict=True))
            name = "-".join(f"{key}={_as_name(value)}" for key, value in settings.items())
            # Long values may have the same beginning.
            taken = {run.logdir.name.rpartition("-seed")[0] for trial in self.trials for run in trial.runs}
            if name in taken:
                name = next(other for number in itertools.count(2) if (other := f"{name}_{number}") not in taken)
            runs = (template.run(name, settings, seed) for seed in seeds)
            self.trials += [Trial(run.logdir.name, (run,)) for run in runs]
        self.total = len(self.trials)
        self._waiting = list(self.trials)

    def next(self) -> Trial | None:
        """As of every plan."""
        return self._waiting.pop(0) if self._waiting else None

    def should_stop(self, trial: Trial, run: Run, rows: Sequence[Row]) -> bool:
        """A grid is gone through to its end."""
        return False

    def note(self, trial: Trial, ending: Ending, scores: Sequence[float]) -> None:
        """What runs leave in their folders is all there is to know."""


def _as_name(value: str) -> str:
    """A value as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", value).strip("_")[:LONGEST_VALUE]
