"""What solutions are expected to cost, where positions do not tell that."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from routing.metrics import is_paid
from solving.answers import Solution
from solving.forecasts import Forecaster
from solving.frames import pose
from solving.intervals import Calibration, Forecast


def with_forecasts(
    forecaster: Forecaster | None, solutions: Sequence[Solution], calibration: Calibration | None
) -> list[Solution]:
    """Solutions of a run, in order, each with what its model expects it to cost; within bounds by a calibration.

    Args:
        forecaster: of the run's model; None where it knows no costs, so that all is left as it is.
        solutions: that were chosen in one way.
        calibration: of tours that were chosen in the same way; None where there is none.
    """
    if forecaster is None:
        return list(solutions)
    return [
        solution._replace(forecast=_forecast(forecaster, solution, calibration))
        if solution.by_model and is_paid(solution.instance.metric)
        else solution
        for solution in solutions
    ]


def _forecast(forecaster: Forecaster, solution: Solution, calibration: Calibration | None) -> Forecast | None:
    posed, units = pose([solution.instance], forecaster.device, unit=forecaster.model.rules.costs.unit)
    expected = units * forecaster.tours(posed, solution.tour[None])
    if not np.isfinite(expected).all():
        return None
    return Forecast(float(expected.mean())) if calibration is None else calibration.forecast(expected)[0]
