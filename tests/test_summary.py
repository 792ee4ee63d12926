from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from comparing.runs import Run, Series
from comparing.summary import (
    Asked,
    interquartile_mean,
    interval,
    over_seeds,
    phase_mean,
    quantities,
    reached,
    resamples,
    share_in_band,
    skipped_updates,
    value_at,
)


def series(steps: list[float], values: list[float]) -> Series:
    """A minute for every 100 env steps."""
    return Series(np.array(steps, dtype=float), np.array(steps) / 100, np.array(values, dtype=float))


def run(**metrics: Series) -> Run:
    steps = max(one.steps[-1] for one in metrics.values())
    return Run(Path("logdir/a"), metrics, steps, steps / 100, None, {}, None, "stopped", ())


def told(one: Run, asked: Asked | None = None) -> dict[str, float | None]:
    return {row.name: row.of(one) for row in quantities([one], asked or Asked())}


def test_interquartile_mean_cuts_a_quarter_at_each_end():
    assert interquartile_mean(np.array([[100.0, 3.0, 1.0, -50.0]])) == [2.0]
    # One of the seven is cut at each end: (2 + 3 + 4 + 5 + 6) / 5.
    assert interquartile_mean(np.array([[1.0, 2, 3, 4, 5, 6, 700]])) == [4.0]


def test_interquartile_mean_of_three_is_the_mean():
    assert interquartile_mean(np.array([[1.0, 2.0, 9.0], [0.0, 0.0, 3.0]])).tolist() == [4.0, 1.0]


def test_resamples_of_few_seeds_are_all_there_are():
    assert sorted(map(tuple, resamples(2).tolist())) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len(set(map(tuple, resamples(4).tolist()))) == 4**4


def test_resamples_of_many_seeds_are_the_same_each_time():
    assert np.array_equal(resamples(8), resamples(8))
    assert resamples(8).min() == 0 and resamples(8).max() == 7


def test_interval_of_three_seeds_is_their_range():
    # The smallest of 27 resampled means has probability 1/27, above 2.5 %.
    assert over_seeds([1.0, 2.0, 6.0]) == (3.0, 1.0, 6.0)


def test_interval_of_four_seeds_by_hand():
    # The middle two of four draws have the mean 1, 1/2 or 0 if at least three, two or fewer of the draws are 1: with
    # probabilities of 13, 54 and 189 in 256, each above 2.5 %.
    assert over_seeds([0.0, 0.0, 0.0, 1.0]) == (0.0, 0.0, 1.0)


def test_interval_of_many_normal_seeds_is_near_the_normal_one():
    values = np.random.default_rng(1).normal(size=(20, 40))
    mean, low, high = interval(values)
    # The interquartile mean of normal values has a standard error of about 1.09 / sqrt(n).
    assert ((low < mean) & (mean < high)).all()
    assert float((high - low).mean()) == pytest.approx(2 * 1.96 * 1.09 / math.sqrt(40), rel=0.1)


def test_over_seeds_leaves_out_what_is_missing():
    found = over_seeds([None, 2.0, math.nan, 4.0])
    assert found is not None and found.mean == 3.0
    assert over_seeds([None, math.inf]) is None


def test_value_at_is_the_last_before_the_mark():
    one = run(valid_gap=series([100, 200], [9.0, 5.0]), fps=series([250], [1.0]))
    assert value_at(one, "valid_gap", "steps", 197.0) == 9.0
    # Environments step together, so that a row may stand up to 1 % behind its mark.
    assert value_at(one, "valid_gap", "steps", 199.0) == 5.0
    assert value_at(one, "valid_gap", "minutes", 2.4) == 5.0
    assert value_at(one, "valid_gap", "steps", 50.0) is None
    assert value_at(one, "valid_gap", "steps", 300.0) is None


def test_reached_is_the_first_value_as_good():
    gaps = series([0, 100, 200, 300], [100.0, 5.0, 7.0, 2.0])
    assert reached(gaps, "steps", 5.0, falling=True) == 100
    assert reached(gaps, "minutes", 4.0, falling=True) == 3.0
    assert reached(gaps, "steps", 1.0, falling=True) is None
    assert reached(gaps, "steps", 101.0, falling=False) is None


def test_share_in_band_includes_the_lower_limit():
    returns = series([1, 2, 3, 4, 5], [-2.0, -1.0, 0.0, 1.0, math.nan])
    assert share_in_band(returns, -1.0, 1.0) == 50.0
    assert share_in_band(returns, -math.inf, -1.0) == 25.0


def test_phase_mean_divides_the_run_equally():
    returns = series([10, 30, 31, 60, 90], [1.0, 3.0, 10.0, 20.0, 7.0])
    assert [phase_mean(returns, phase, 3, steps=90.0) for phase in range(3)] == [2.0, 15.0, 7.0]
    assert phase_mean(returns, 0, 10, steps=90.0) is None


def test_skipped_updates_adds_up_the_optimisers():
    assert skipped_updates(run(model_skips_max=series([1, 2], [1, 3]), actor_skips_max=series([1, 2], [0, 1]))) == 4.0
    assert skipped_updates(run(loss=series([1], [1]))) is None


def test_quantities_tell_last_best_and_test():
    metrics = {"valid_gap": series([1, 2, 3], [9.0, 2.0, 4.0]), "valid_return": series([1, 2, 3], [-9.0, -2.0, -4.0])}
    stopped = run(eval_gap=series([3], [5.0]), **metrics)
    values = told(stopped._replace(status="finished"))
    assert [values[f"{which} gap, %"] for which in ("last", "best", "test")] == [4.0, 2.0, 5.0]
    assert [values[f"{which} return"] for which in ("last", "best")] == [-4.0, -2.0]
    assert told(stopped)["test gap, %"] is None


def test_quantities_bands_default_to_quartiles():
    values = told(run(train_return=series([1, 2, 3, 4], [0.0, 1.0, 2.0, 3.0])))
    # Quartiles 0.75, 1.5 and 2.25.
    assert [value for name, value in values.items() if name.startswith("training returns")] == [25.0] * 4


def test_bands_and_phases_are_of_single_episodes_where_they_were_logged():
    episodes = {"episode_return": series([1, 2, 3, 4], [0.0, 0.0, 0.0, 8.0])}
    values = told(run(train_return=series([2, 4], [0.0, 4.0]), **episodes), Asked(bands=(5.0,), phases=2))
    assert values["training returns from 5, %"] == 25.0
    assert values["training return, part 2 of 2"] == 4.0


def test_quantities_have_what_was_asked_for():
    values = told(
        run(train_return=series([100, 200], [-300.0, -100.0])),
        Asked(returns=(-200.0,), at_steps=(100.0,), bands=(-200.0,), phases=2),
    )
    assert values["env steps to return -200"] == 200.0
    assert values["minutes to return -200"] == 2.0
    assert values["return at 100 env steps"] == -300.0
    assert values["training returns from -200, %"] == 50.0
    assert values["training return, part 2 of 2"] == -100.0
