"""What a tour is expected to cost, and within which bounds, by how wrong a model was about tours whose costs are known.

An ensemble's spread over a tour, and a share of the tour's cost beside it, make a deviation; how many deviations paid
costs were away from expected ones, at the quantiles that leave out a tenth, makes bounds (split conformal prediction:
J. Lei et al., "Distribution-free predictive inference for regression", 2018, sections 2.2 and 5.2). A tour is chosen
because it looks cheap, so that it costs more than it is expected to; tours that were chosen in the same way tell that,
too.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

# How often the bounds are to hold.
SHARE = 0.9
# The least share of a cost that its error is taken to be: a model that was never wrong is not known never to be.
LEAST_ERROR = 1e-6


class Forecast(NamedTuple):
    """What a tour is expected to cost; `low` and `high` are None where nobody knows how wrong that may be.

    `nodes` is of the tours by which that is known, `driven` how many of these were trips of a log.
    """

    cost: float
    low: float | None = None
    high: float | None = None
    nodes: int | None = None
    driven: int = 0


class Calibration(NamedTuple):
    """How wrong a model was about tours that were chosen in one way.

    Attributes:
        bias: what they cost, by what they were expected to cost.
        error: root mean square of what the spread does not tell, as a share of the expected cost.
        low: how many deviations paid costs may be away, from so many
        high: to so many.
        nodes: of the instances.
        instances: how many tours there were.
        driven: how many of them were trips of a log, which nobody chose by what the model expects.
    """

    bias: float
    error: float
    low: float
    high: float
    nodes: int
    instances: int
    driven: int = 0

    @classmethod
    def of(
        cls, expected: Float64[np.ndarray, "K I"], paid: Float64[np.ndarray, " I"], *, nodes: int, driven: int = 0
    ) -> Calibration:
        """From what tours cost, and what each member of an ensemble expected.

        `least_tours()` of them are needed. They may be of any origin, but those to come have to be chosen likewise.
        """
        mean, spread = expected.mean(0), expected.std(0)
        assert len(paid) >= least_tours(), f"{len(paid)} tours tell no quantiles"
        # Where costs are earned, too, sums may be around 0.
        bias = float(paid.sum() / mean.sum()) if min(paid.sum(), mean.sum()) > 0 else 1.0
        unexplained = np.mean(np.square(paid - bias * mean) - np.square(spread))
        error = math.sqrt(max(unexplained / np.mean(np.square(mean)), LEAST_ERROR**2))
        away = np.sort((paid - bias * mean) / _deviation(mean, spread, error))
        # Of n and one more, each is as likely to be at any place in order.
        rank = math.ceil((len(paid) + 1) * (1 + SHARE) / 2)
        return cls(bias, error, float(away[-rank]), float(away[rank - 1]), nodes, len(paid), driven)

    @classmethod
    def read(cls, values: Any) -> Calibration:
        """From the numbers by name that a checkpoint holds.

        Raises:
            TypeError: they are no calibration.
        """
        found = cls(**values)
        if not all(type(each) in (int, float) and math.isfinite(each) for each in found):
            raise TypeError("a calibration holds finite numbers alone")
        return found

    def forecast(self, expected: Float64[np.ndarray, "K I"]) -> list[Forecast]:
        """Of tours that were chosen in the same way."""
        mean, spread = expected.mean(0), expected.std(0)
        deviation = _deviation(mean, spread, self.error)
        bounds = (self.bias * mean + away * deviation for away in (0.0, self.low, self.high))
        rows = zip(*(bound.tolist() for bound in bounds), strict=True)
        return [Forecast(cost, low, high, self.nodes, self.driven) for cost, low, high in rows]


def _deviation(
    mean: Float64[np.ndarray, " I"], spread: Float64[np.ndarray, " I"], error: float
) -> Float64[np.ndarray, " I"]:
    return np.hypot(spread, error * np.abs(mean)) + np.finfo(np.float64).tiny


def least_tours() -> int:
    """How many tours a calibration takes: of fewer, the dearest one says nothing of the dearest twentieth."""
    return math.ceil((1 + SHARE) / (1 - SHARE) - 1e-9)
