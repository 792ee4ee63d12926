"""How wrong a model is about trips that somebody has driven, where a log of them is all that is known."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64, Int64

from solving.intervals import Calibration, least_tours

# A move alone is no trip: what errors of moves add up to, only several of them tell.
LEAST_MOVES = 2


def calibrate_by_trips(
    expected: Float64[np.ndarray, "K M"], paid: Float64[np.ndarray, " M"], trip: Int64[np.ndarray, " M"]
) -> Calibration | None:
    """A calibration by whole trips; None where there are too few with `LEAST_MOVES`, or the model is not finite.

    The trips are to be as tours to come are in all but who chooses: a tour of N nodes has N moves. That it is chosen
    because it looks cheap, no trip tells that was driven before there was a model.

    Args:
        expected: what each member of an ensemble expects of moves that it has not learnt from.
        paid: what they cost.
        trip: of which trip each of them is a part.
    """
    _, numbers, moves = np.unique(trip, return_inverse=True, return_counts=True)
    long_enough = moves >= LEAST_MOVES
    if long_enough.sum() < least_tours() or not np.isfinite(expected).all():
        return None

    def sums(values: Float64[np.ndarray, " M"]) -> Float64[np.ndarray, " I"]:
        return np.bincount(numbers, weights=values)[long_enough]

    whole = np.stack([sums(each) for each in expected])
    nodes, trips = round(float(np.median(moves[long_enough]))), int(long_enough.sum())
    return Calibration.of(whole, sums(paid), nodes=nodes, driven=trips)
