"""Time windows as people give them, in a unit of their own: how long driving takes, and whom nobody can serve."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

# The longest time, in ticks: sums of two stand in 32 bits.
LONGEST = 10**9
# Ticks of a unit of time, at most, where times have fractions.
FINEST = 1_000
# Of a tick, by which a float64 may be off.
SLACK = 1e-6


class TimeWindows(NamedTuple):
    """When nodes may be visited. Vehicles leave the depot, node 0, at time 0, and wait where they come early.

    Attributes:
        ready: when service may begin at the earliest.
        due: when it has to begin at the latest; of the depot, when vehicles have to be back.
        service: how long it takes.
        pace: units of time that a unit of length takes.
    """

    ready: Float64[np.ndarray, " N"]
    due: Float64[np.ndarray, " N"]
    service: Float64[np.ndarray, " N"]
    pace: float = 1.0

    def of(self, nodes: Int64[np.ndarray, " M"]) -> TimeWindows:
        """Those of some of the nodes."""
        return TimeWindows(self.ready[nodes], self.due[nodes], self.service[nodes], self.pace)


class Ticks(NamedTuple):
    """The same in whole numbers, with which nobody is late who keeps to them: early times and drives are rounded up.

    Attributes:
        drives: how long it takes from each node (row) to each (column).
        ready: as of `TimeWindows`.
        due: likewise.
        service: likewise.
        each: ticks of a unit of time.
    """

    drives: Int64[np.ndarray, "N N"]
    ready: Int64[np.ndarray, " N"]
    due: Int64[np.ndarray, " N"]
    service: Int64[np.ndarray, " N"]
    each: float


def in_ticks(windows: TimeWindows, lengths: Float64[np.ndarray, "N N"]) -> Ticks:
    """Windows and drives in whole numbers: the file's own where it has no others, and else fractions of them.

    Args:
        windows: of the nodes.
        lengths: of moves from each node (row) to each (column).
    """
    drives = windows.pace * lengths
    parts = (windows.ready, windows.due, windows.service, drives)
    whole = all((part == np.rint(part)).all() for part in parts)
    # Nothing comes after the depot closes, so that what takes longer is only too long.
    end = max(1.0, float(windows.due[0]))
    each = 1.0 if whole and end <= LONGEST else min(float(FINEST), LONGEST / end)

    def up(part: np.ndarray) -> Int64[np.ndarray, "*N"]:
        return np.ceil(each * np.minimum(part, end + 1) - SLACK).astype(np.int64)

    due = np.floor(each * np.minimum(windows.due, end) + SLACK).astype(np.int64)
    return Ticks(up(drives), up(windows.ready), due, up(windows.service), each)
