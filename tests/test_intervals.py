"""What tours are expected to cost, within bounds: how these are found out, and how often they hold."""

from __future__ import annotations

import numpy as np
import pytest

from solving.intervals import Calibration, least_tours


def wrong_model(count: int, seed: int, *, members: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Expected and paid costs of a model that is a tenth too cheap, and less sure of some tours than of others."""
    random = np.random.RandomState(seed)
    truth, scale = random.uniform(2, 5, count), random.choice([0.02, 0.2], count)
    expected = 0.9 * truth + scale * random.standard_normal((members, count))
    return expected, truth + scale * random.standard_t(3, count) / 2


def bounds(calibration: Calibration, expected: np.ndarray) -> np.ndarray:
    return np.array([(each.low, each.high) for each in calibration.forecast(expected)])


@pytest.mark.parametrize("members", [1, 5])
def test_forecasts_hold_in_nine_cases_of_ten(members: int):
    calibration = Calibration.of(*wrong_model(2000, 0, members=members), nodes=20)
    expected, paid = wrong_model(4000, 1, members=members)
    inside = [low <= cost <= high for (low, high), cost in zip(bounds(calibration, expected), paid, strict=True)]
    assert np.mean(inside) == pytest.approx(0.9, abs=0.02)


def test_forecasts_take_the_bias_out():
    calibration = Calibration.of(*wrong_model(2000, 0), nodes=20)
    expected, paid = wrong_model(4000, 1)
    assert expected.mean() == pytest.approx(0.9 * paid.mean(), rel=0.01)
    assert np.mean([each.cost for each in calibration.forecast(expected)]) == pytest.approx(paid.mean(), rel=0.01)


def test_forecasts_are_wider_where_members_disagree():
    calibration = Calibration.of(*wrong_model(2000, 0), nodes=20)
    agreed, disputed = np.diff(bounds(calibration, np.array([[3.0, 2.5], [3.0, 3.5]])))
    assert disputed > 2 * agreed


def test_calibration_of_as_few_tours_as_it_takes_spans_all_of_them():
    count = least_tours()
    assert count == 19
    paid = np.linspace(0.5, 1.5, count)
    (forecast,) = Calibration.of(np.ones((1, count)), paid, nodes=20).forecast(np.ones((1, 1)))
    assert forecast.cost == pytest.approx(1.0)
    assert (forecast.low, forecast.high) == (pytest.approx(0.5), pytest.approx(1.5))


def test_calibration_leaves_a_twentieth_out_on_either_side():
    # Of 99 tours and one to come, the fifth from either end: each hundredth is as likely.
    paid = np.linspace(0.51, 1.49, 99)
    (forecast,) = Calibration.of(np.ones((1, 99)), paid, nodes=20).forecast(np.ones((1, 1)))
    assert (forecast.low, forecast.high) == (pytest.approx(0.55), pytest.approx(1.45))


def test_calibration_of_a_model_that_was_never_wrong_is_finite():
    paid = np.linspace(1, 2, 30)
    (forecast,) = Calibration.of(paid[None], paid, nodes=20).forecast(np.ones((1, 1)))
    assert forecast.low == pytest.approx(1.0) and forecast.high == pytest.approx(1.0)


def test_calibration_comes_back_from_plain_numbers():
    calibration = Calibration.of(*wrong_model(100, 0), nodes=20)
    assert Calibration.read(calibration._asdict()) == calibration


@pytest.mark.parametrize("change", [{"bias": float("nan")}, {"bias": "1"}, {"bias": [1.0]}, {"odd": 1.0}])
def test_calibration_of_anything_but_numbers_is_refused(change: dict):
    values = {"bias": 1.0, "error": 0.1, "low": -1.0, "high": 1.0, "nodes": 20, "instances": 100}
    with pytest.raises(TypeError):
        Calibration.read(values | change)
