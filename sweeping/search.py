"""A plan that looks for good settings, by Optuna: its trials are kept in a journal, and bad ones are stopped early."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from sweeping.axes import Range
from sweeping.plans import Ending, Row, Run, Template, Trial
from system import safe_files
from system.errors import ConfigError

JOURNAL = "study.journal"
STUDY = "sweep"
STATES = {"finished": TrialState.COMPLETE, "failed": TrialState.FAIL, "pruned": TrialState.PRUNED}


class _Unlocked:
    """Stands for Optuna's lock, a file that a killed process leaves behind: the sweep's own keeps others out."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        """Nothing was taken."""


class Search:
    """Trials whose settings Optuna draws, by what trials before them have reached; each is a run of every seed.

    A trial's score is the mean over its seeds of the metric's last value. It is stopped where the metric of its first
    seed is worse than the median of the trials before it at that step (Optuna's `MedianPruner`).
    """

    def __init__(
        self,
        template: Template,
        axes: Mapping[str, Sequence[str] | Range],
        *,
        seeds: Sequence[str],
        metric: str,
        direction: Literal["minimize", "maximize"],
        trials: int,
        startup: int,
    ) -> None:
        """Open the journal in the template's folder, or go on with it.

        Args:
            template: what all runs have in common; its folder exists.
            axes: lists of values to choose from, and ranges.
            seeds: of each trial.
            metric: of the runs.
            direction: what is better.
            trials: how many there are to be, those in the journal included.
            startup: trials that are drawn at random and never stopped, before there is enough to go by.

        Raises:
            ConfigError: the journal is of another search.
        """
        self.metric: str | None = metric
        self.total = trials
        self._template, self._seeds, self._startup = template, tuple(seeds), startup
        self._space = {key: _distribution(axis) for key, axis in axes.items()}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path = template.folder / JOURNAL
        _cut_half_line(path)
        storage = JournalStorage(JournalFileBackend(str(path), lock_obj=_Unlocked()))  # type: ignore[arg-type]
        self._study = optuna.create_study(
            study_name=STUDY,
            storage=storage,
            direction=direction,
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=startup),
        )
        self._require_same(direction, path)
        # Those that a sweep was stopped in come first.
        self._waiting = [
            optuna.trial.Trial(self._study, frozen._trial_id)
            for frozen in self._study.get_trials(states=(TrialState.RUNNING,))
        ]
        self._running: dict[str, optuna.trial.Trial] = {}

    def _require_same(self, direction: str, path: Path) -> None:
        known = {
            "metric": self.metric,
            "seeds": list(self._seeds),
            "space": {k: str(v) for k, v in self._space.items()},
        }
        was = self._study.user_attrs
        if not was:
            for name, value in known.items():
                self._study.set_user_attr(name, value)
        elif was != known or self._study.direction.name.lower() != direction:
            raise ConfigError(
                f"{path} is of a search of {was.get('metric')} ({self._study.direction.name.lower()}) over other"
                " settings or seeds; give the same again, or another --logdir"
            )

    def next(self) -> Trial | None:
        """As of every plan."""
        if self._waiting:
            drawn = self._waiting.pop(0)
        elif (number := len(self._study.get_trials(deepcopy=False))) < self.total:
            # What a trial draws depends on its number and on those before it, also where a sweep went on in between.
            self._study.sampler = optuna.samplers.TPESampler(seed=number, n_startup_trials=self._startup)
            drawn = self._study.ask(self._space)
        else:
            return None
        name = f"trial{drawn.number:04d}"
        settings = {key: _as_text(value) for key, value in drawn.params.items()}
        self._running[name] = drawn
        return Trial(name, tuple(self._template.run(name, settings, seed) for seed in self._seeds))

    def should_stop(self, trial: Trial, run: Run, rows: Sequence[Row]) -> bool:
        """As of every plan."""
        if run != trial.runs[0]:
            return False
        drawn = self._running[trial.name]
        told = self._study.get_trials(deepcopy=False)[drawn.number].intermediate_values
        for row in rows:
            if row.step not in told and math.isfinite(row.value):
                drawn.report(row.value, row.step)
        return bool(drawn.should_prune())

    def note(self, trial: Trial, ending: Ending, scores: Sequence[float]) -> None:
        """As of every plan; a trial that was stopped stays open, to be gone on with."""
        drawn = self._running.pop(trial.name)
        if ending == "stopped":
            return
        if ending == "finished" and not (scores and all(map(math.isfinite, scores))):
            ending = "failed"
        value = sum(scores) / len(scores) if ending == "finished" else None
        self._study.tell(drawn, value, state=STATES[ending])

    def best(self) -> tuple[str, float, dict[str, Any]] | None:
        """The best trial so far: its name, score and settings; None where none has ended well."""
        if not self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            return None
        best = self._study.best_trial
        return f"trial{best.number:04d}", float(best.value or 0.0), best.params


def corners(axes: Mapping[str, Sequence[str] | Range]) -> list[dict[str, str]]:
    """Settings by which all that a search may draw is checked: every value of a list, and both ends of every range."""
    ends = [
        [_as_text(int(end) if axis.whole else end) for end in (axis.low, axis.high)]
        if isinstance(axis, Range)
        else list(axis)
        for axis in axes.values()
    ]
    columns = itertools.zip_longest(*ends)
    return [
        {key: values[0] if value is None else value for key, value, values in zip(axes, column, ends, strict=True)}
        for column in columns
    ]


def _cut_half_line(path: Path) -> None:
    """Cut what a process that was killed had not written to its end, which Optuna would take for damage."""
    if path.exists():
        content = safe_files.read_bytes(path)
        if (whole := content.rfind(b"\n") + 1) < len(content):
            os.truncate(path, whole)


def _distribution(axis: Sequence[str] | Range) -> BaseDistribution:
    if not isinstance(axis, Range):
        return CategoricalDistribution(tuple(axis))
    if axis.whole:
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return FloatDistribution(axis.low, axis.high, log=axis.log)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)
