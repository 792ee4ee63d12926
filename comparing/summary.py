"""What is told of a run in numbers, and of several seeds: interquartile mean and bootstrap interval."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from comparing.runs import Run, Series

# The first of these that a run has is its return; our own names come first, then those of common libraries.
RETURNS = (
    "valid_return",
    "eval/mean_reward",
    "eval_return",
    "train_return",
    "rollout/ep_rew_mean",
    "charts/episodic_return",
    "episode/score",
)
# The first of these that a run has is taken: of single episodes where they were logged, else means between two logs.
TRAIN_RETURNS = ("episode_return", "train_return", "rollout/ep_rew_mean", "charts/episodic_return", "episode/score")
GAP = "valid_gap"
FAMILIAR_GAPS = (10.0, 5.0, 2.0, 1.0)
FEW_SEEDS = 5
RESAMPLES = 2000
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """An interquartile mean over seeds and its bootstrap interval; of one seed, its value three times."""

    mean: float
    low: float
    high: float


class Asked(NamedTuple):
    """What the table should tell beyond the usual.

    Attributes:
        gaps: percent, for the env steps and minutes to them; None for those of 10, 5, 2 and 1 that a run reaches.
        returns: the same for returns.
        at_steps: env steps at which the gap, or the return, is told.
        at_minutes: the same in minutes.
        bands: limits between the bands of training returns; None for the quartiles of all runs together.
        phases: into how many equal parts of its env steps a run is divided.
    """

    gaps: tuple[float, ...] | None = None
    returns: tuple[float, ...] = ()
    at_steps: tuple[float, ...] = ()
    at_minutes: tuple[float, ...] = ()
    bands: tuple[float, ...] | None = None
    phases: int = 3


class Quantity(NamedTuple):
    """A row of the table: its name, how numbers are written, what a run gives, if anything, and if it was asked for."""

    name: str
    form: str
    of: Callable[[Run], float | None]
    asked: bool = False


def interquartile_mean(values: Float[np.ndarray, "*R S"]) -> Float[np.ndarray, "*R"]:
    """Mean of the middle half of the last axis.

    A quarter of the values, rounded down, is cut at each end, so that of fewer than four it is the mean. After Agarwal
    et al. 2021, "Deep reinforcement learning at the edge of the statistical precipice".
    """
    cut = values.shape[-1] // 4
    return np.sort(values, axis=-1)[..., cut : values.shape[-1] - cut].mean(-1)


def resamples(seeds: int) -> Int[np.ndarray, "R S"]:
    """Rows of seeds drawn with replacement: every way there is where these are few, else some by a fixed generator."""
    if seeds <= FEW_SEEDS:
        return np.indices((seeds,) * seeds).reshape(seeds, -1).T
    return np.random.default_rng(0).integers(seeds, size=(RESAMPLES, seeds))


def interval(
    values: Float[np.ndarray, "P S"],
) -> tuple[Float[np.ndarray, " P"], Float[np.ndarray, " P"], Float[np.ndarray, " P"]]:
    """Interquartile mean over the last axis, the seeds, and the limits of its percentile bootstrap interval."""
    means = interquartile_mean(values[..., resamples(values.shape[-1])])
    tail = (1 - CONFIDENCE) / 2
    # The distribution over the resamples is discrete: its quantiles are values that it takes.
    low, high = np.quantile(means, [tail, 1 - tail], axis=-1, method="inverted_cdf")
    return interquartile_mean(values), low, high


def over_seeds(values: Sequence[float | None]) -> Interval | None:
    """The interval over those seeds that have a finite value; None where none has."""
    present = [value for value in values if value is not None and math.isfinite(value)]
    return Interval(*(float(limit[0]) for limit in interval(np.array([present])))) if present else None


def return_name(run: Run) -> str | None:
    """Which of the run's metrics is its return."""
    return next((name for name in RETURNS if name in run.series), None)


def is_measured_by_gap(loaded: Sequence[Run]) -> bool:
    """Whether runs are compared by their gaps, which all of them then have, or by their returns."""
    return all(GAP in run.series for run in loaded)


def score_name(run: Run, *, by_gap: bool) -> str | None:
    """The metric that a run is compared by."""
    return GAP if by_gap else return_name(run)


def value_at(run: Run, name: str | None, axis: str, mark: float) -> float | None:
    """The last value at or before a mark, or up to 1 % behind it, since environments step together.

    Args:
        run: where to look.
        name: the metric.
        axis: steps or minutes.
        mark: where on that axis; None is the answer if the run ended well before it.
    """
    series = run.series.get(name or "")
    if series is None or getattr(run, axis) < 0.98 * mark:
        return None
    values = series.values[getattr(series, axis) <= 1.01 * mark]
    return float(values[-1]) if len(values) else None


def reached(series: Series | None, axis: str, target: float, *, falling: bool) -> float | None:
    """Env steps or minutes at the first value that is as good as `target`; None if none is."""
    if series is None:
        return None
    (good,) = np.nonzero(series.values <= target if falling else series.values >= target)
    return float(getattr(series, axis)[good[0]]) if len(good) else None


def share_in_band(series: Series | None, low: float, high: float) -> float | None:
    """Percent of the finite values that lie in [low, high)."""
    values = _finite(series)
    return float(100 * np.mean((values >= low) & (values < high))) if len(values) else None


def phase_mean(series: Series | None, phase: int, phases: int, *, steps: float) -> float | None:
    """Mean of the finite values in one of equal parts of a run of `steps` env steps; its end belongs to a part."""
    if series is None:
        return None
    low, high = steps * phase / phases, steps * (phase + 1) / phases
    inside = (series.steps > low) & (series.steps <= high) & np.isfinite(series.values)
    return float(series.values[inside].mean()) if inside.any() else None


def skipped_updates(run: Run) -> float | None:
    """Updates that the guard skipped, summed over the optimisers; None for a run that says nothing of it."""
    counts = [_most(series) for name, series in run.series.items() if name.endswith("_skips_max")]
    return sum(counts) if counts else None


def rollbacks(run: Run) -> float | None:
    """Returns of the guard to an earlier state; None for a run that says nothing of it."""
    return _most(run.series["rollbacks_max"]) if "rollbacks_max" in run.series else None


def quantities(loaded: Sequence[Run], asked: Asked) -> list[Quantity]:
    """The rows of the table."""
    by_gap = is_measured_by_gap(loaded)
    rows = [Quantity("env steps", ",.0f", lambda run: run.steps), Quantity("minutes", ".1f", lambda run: run.minutes)]
    rows += _results("return", ".4g", return_name, test="eval_return", best=np.max)
    rows += _results("reward", ".4g", lambda _run: "valid_reward", test="eval_reward", best=np.max)
    rows += _results("gap, %", ".2f", lambda _run: GAP, test="eval_gap", best=np.min)
    rows += [_score_at("steps", mark, by_gap=by_gap) for mark in asked.at_steps]
    rows += [_score_at("minutes", mark, by_gap=by_gap) for mark in asked.at_minutes]
    for axis in _UNITS:
        rows += [_time_to(axis, gap, by_gap=True, asked=asked.gaps is not None) for gap in asked.gaps or FAMILIAR_GAPS]
        rows += [_time_to(axis, target, by_gap=False, asked=True) for target in asked.returns]
    rows += _bands(_quartiles(loaded) if asked.bands is None else asked.bands, asked=asked.bands is not None)
    rows += [_phase(phase, asked.phases) for phase in range(asked.phases)]
    return [*rows, Quantity("skipped updates", ",.0f", skipped_updates), Quantity("rollbacks", ",.0f", rollbacks)]


_UNITS = {"steps": "env steps", "minutes": "minutes"}


def _results(
    name: str, form: str, metric: Callable[[Run], str | None], *, test: str, best: Callable[[np.ndarray], float]
) -> list[Quantity]:
    """Last, best, and on the test set, which a finished run has looked at once."""

    def last(run: Run) -> float | None:
        series = run.series.get(metric(run) or "")
        return None if series is None else float(series.values[-1])

    def at_best(run: Run) -> float | None:
        values = _finite(run.series.get(metric(run) or ""))
        return float(best(values)) if len(values) else None

    def tested(run: Run) -> float | None:
        return float(run.series[test].values[-1]) if run.status == "finished" and test in run.series else None

    return [
        Quantity(f"last {name}", form, last),
        Quantity(f"best {name}", form, at_best),
        Quantity(f"test {name}", form, tested),
    ]


def _score_at(axis: str, mark: float, *, by_gap: bool) -> Quantity:
    def of(run: Run) -> float | None:
        return value_at(run, score_name(run, by_gap=by_gap), axis, mark)

    at = f"at {mark:,g} {_UNITS[axis]}"
    if by_gap:
        return Quantity(f"gap {at}, %", ".2f", of, asked=True)
    return Quantity(f"return {at}", ".4g", of, asked=True)


def _time_to(axis: str, target: float, *, by_gap: bool, asked: bool) -> Quantity:
    def of(run: Run) -> float | None:
        return reached(run.series.get(score_name(run, by_gap=by_gap) or ""), axis, target, falling=by_gap)

    name = f"{_UNITS[axis]} to gap {target:g} %" if by_gap else f"{_UNITS[axis]} to return {target:g}"
    return Quantity(name, ",.0f" if axis == "steps" else ".1f", of, asked=asked)


def _bands(limits: Sequence[float], *, asked: bool) -> list[Quantity]:
    edges = [-math.inf, *limits, math.inf] if limits else []
    return [_band(low, high, asked=asked) for low, high in itertools.pairwise(edges)]


def _band(low: float, high: float, *, asked: bool) -> Quantity:
    def of(run: Run) -> float | None:
        return share_in_band(_train_returns(run), low, high)

    name = f"{low:g} to {high:g}"
    if low == -math.inf:
        name = f"below {high:g}"
    elif high == math.inf:
        name = f"from {low:g}"
    return Quantity(f"training returns {name}, %", ".0f", of, asked=asked)


def _phase(phase: int, phases: int) -> Quantity:
    def of(run: Run) -> float | None:
        return phase_mean(_train_returns(run), phase, phases, steps=run.steps)

    return Quantity(f"training return, part {phase + 1} of {phases}", ".4g", of)


def _train_returns(run: Run) -> Series | None:
    return next((run.series[name] for name in TRAIN_RETURNS if name in run.series), None)


def _quartiles(loaded: Sequence[Run]) -> tuple[float, ...]:
    """Limits of bands that hold a quarter each of all training returns, to three digits."""
    values = np.concatenate([np.empty(0), *(_finite(_train_returns(run)) for run in loaded)])
    if not len(values):
        return ()
    return tuple(sorted({float(f"{value:.3g}") for value in np.quantile(values, [0.25, 0.5, 0.75])}))


def _finite(series: Series | None) -> np.ndarray:
    return np.empty(0) if series is None else series.values[np.isfinite(series.values)]


def _most(series: Series) -> float:
    """The largest finite value: for what is counted since the run began, the count."""
    return float(_finite(series).max(initial=0.0))
