"""Scores that DreamerV3's authors have released, and those of a run at the same steps of the simulator."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from comparing.runs import Run, Series
from comparing.summary import TRAIN_RETURNS
from config import ConfigError
from settings.environment import read_arguments

FILE = Path(__file__).with_name("published.csv")
SUITES = ("atari100k", "dmc_proprio", "dmc_vision")
SOURCE = "github.com/danijar/dreamerv3, commit e3f0224"
# A run's score at a mark is the mean of the training episodes in the last part of the way there.
WINDOW = 0.1
# Frames of a decision in Atari, where `env.kwargs` does not say otherwise.
FRAMES = 4
# Points of a run's curve.
BINS = 50


class Scores(NamedTuple):
    """What was released of a task.

    Attributes:
        seeds: runs that the figures are of.
        steps: of the simulator: frames of Atari; where an action is repeated, each repetition counts.
        mean: return of training episodes, over the seeds.
        std: its standard deviation over them.
    """

    seeds: int
    steps: Float[np.ndarray, " P"]
    mean: Float[np.ndarray, " P"]
    std: Float[np.ndarray, " P"]


def scores_of(suite: str, task: str) -> Scores:
    """What was released of a task.

    Raises:
        ConfigError: nothing was.
    """
    with FILE.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(line for line in file if line[0] != "#") if row["suite"] == suite]
    found = [row for row in rows if row["task"] == task]
    if not found:
        tasks = ", ".join(dict.fromkeys(row["task"] for row in rows))
        raise ConfigError(f"--published {suite} has no figures of {task}; it has those of {tasks}")
    steps, mean, std = (np.array([float(row[name]) for row in found]) for name in ("steps", "mean", "std"))
    return Scores(int(found[0]["seeds"]), steps, mean, std)


def task_of(runs: Sequence[Run]) -> str:
    """The task that all runs have.

    Raises:
        ConfigError: they have several, or one has no config to tell.
    """
    if foreign := next((run for run in runs if run.config is None), None):
        raise ConfigError(f"--published goes by the task in config.yaml, which {foreign.path} does not have")
    tasks = sorted({str(run.config["task"]) for run in runs if run.config is not None})
    if len(tasks) > 1:
        raise ConfigError(f"--published draws one task, and these runs have {', '.join(tasks)}: compare them apart")
    return tasks[0]


def simulator_steps(run: Run) -> int:
    """Steps of the simulator that one env step, a decision, takes; of Atari, frames."""
    config = {} if run.config is None else run.config.flat()
    repeat = int(config.get("env.repeat", 1))
    if not str(config.get("task")).startswith("atari_"):
        return repeat
    return repeat * int(read_arguments(str(config.get("env.kwargs", ""))).get("frames", FRAMES))


def score_at(run: Run, mark: float) -> float | None:
    """Mean return of the training episodes that ended in the last tenth of the way to a mark.

    Args:
        run: where to look.
        mark: in steps of the simulator; None is the answer if the run ended well before it, or nothing ended there.
    """
    series = _training(run)
    if series is None or run.steps * simulator_steps(run) < 0.98 * mark:
        return None
    # Environments step together, and episodes are logged with them.
    inside = (series.steps > (1 - WINDOW) * mark) & (series.steps <= 1.01 * mark) & np.isfinite(series.values)
    return float(series.values[inside].mean()) if inside.any() else None


def curve_of(run: Run) -> Series | None:
    """Mean return of training episodes in equal parts of a run, at steps of the simulator; None if there are none."""
    series = _training(run)
    if series is None:
        return None
    width = max(run.steps * simulator_steps(run), 1) / BINS
    # A part ends with the step that is written behind it.
    part = np.ceil(series.steps / width)
    points = []
    for number in np.unique(part):
        inside = (part == number) & np.isfinite(series.values)
        if inside.any():
            points.append([each[inside].mean() for each in series])
    return Series(*map(np.array, zip(*points, strict=True))) if points else None


def table(suite: str, task: str, scores: Scores, groups: Mapping[str, Sequence[Run]]) -> list[list[str]]:
    """The released figures and those of groups of runs, a row for each mark that a run has come to."""
    rows = [[f"{task}, steps of the simulator", f"{suite} ({scores.seeds} seeds)", *groups]]
    for mark, mean, std in zip(scores.steps, scores.mean, scores.std, strict=True):
        found = [[score_at(run, mark) for run in runs] for runs in groups.values()]
        if any(score is not None for of_group in found for score in of_group):
            rows.append([f"{mark:,.0f}", f"{mean:.1f} ± {std:.1f}", *map(_mean_and_deviation, found)])
    return rows


def _mean_and_deviation(values: Sequence[float | None]) -> str:
    """Mean over seeds and, of several, their standard deviation, as the released figures are given."""
    present = [value for value in values if value is not None]
    if not present:
        return "-"
    text = f"{np.mean(present):.1f}" + (f" ± {np.std(present):.1f}" if len(present) > 1 else "")
    return text if len(present) == len(values) else f"{text} ({len(present)} of {len(values)})"


def _training(run: Run) -> Series | None:
    """Returns of training episodes, at steps of the simulator."""
    series = next((run.series[name] for name in TRAIN_RETURNS if name in run.series), None)
    return None if series is None else series._replace(steps=series.steps * simulator_steps(run))


def as_json(suite: str, task: str, scores: Scores) -> dict[str, object]:
    """The released figures as plain lists."""
    figures = {name: getattr(scores, name).tolist() for name in ("steps", "mean", "std")}
    return {"suite": suite, "task": task, "source": SOURCE, "seeds": scores.seeds, **figures}
