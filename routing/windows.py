"""Time windows: as people give them, in whole numbers as rules and solvers count, and whom nobody can serve in time."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int, Int64

# The longest time in whole numbers: sums of two stand in 32 bits.
LONGEST = 10**9
# Parts of a unit of time, at most, where times have fractions.
FINEST = 1_000
# What float64 may be off by, as a share of the longest time.
SLACK = 1e-9


class Windows(NamedTuple):
    """When nodes may be visited, in whole units of time.

    Attributes:
        drives: how long it takes from each node (row) to each (column).
        ready: when service may begin at the earliest.
        due: when it has to begin at the latest; of the depot, when vehicles have to be back.
        service: how long it takes.
        fineness: such units in one that the instance is given in.
    """

    drives: Int64[np.ndarray, "N N"]
    ready: Int64[np.ndarray, " N"]
    due: Int64[np.ndarray, " N"]
    service: Int64[np.ndarray, " N"]
    fineness: float = 1.0


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

    @property
    def day(self) -> float:
        """How long vehicles may be away."""
        return float(self.due[0])

    def of(self, nodes: Int64[np.ndarray, " M"]) -> TimeWindows:
        """Those of some of the nodes."""
        return TimeWindows(self.ready[nodes], self.due[nodes], self.service[nodes], self.pace)

    def whole(self, lengths: Float64[np.ndarray, "N N"]) -> Windows:
        """The same in whole numbers: who is in time by these is so in truth, since what takes time is rounded up.

        Where all times are whole, they are the same; else they are counted in fractions.

        Args:
            lengths: of moves from each node (row) to each (column).
        """
        drives = self.pace * lengths
        are_whole = all((part == np.rint(part)).all() for part in (self.ready, self.due, self.service, drives))
        # Whatever takes longer than the day is too long, and so is a day and a bit.
        most = max(1.0, self.day)
        fineness = 1.0 if are_whole and most < LONGEST else min(float(FINEST), LONGEST / (2 * most))
        slack = SLACK * fineness * most

        def up(part: Float64[np.ndarray, "*N"]) -> Int64[np.ndarray, "*N"]:
            return np.ceil(fineness * np.minimum(part, most + 2) - slack).astype(np.int64)

        due = np.floor(fineness * np.minimum(self.due, most) + slack).astype(np.int64)
        return Windows(up(drives), up(self.ready), due, up(self.service), fineness)

    def lateness(self, route: Int[np.ndarray, " C"], legs: Float64[np.ndarray, " L"]) -> tuple[int, float]:
        """The first node of a route, the depot at its end included, that a vehicle comes too late to; and by how much.

        By how much is 0, and the node the depot, where it is in time everywhere.

        Args:
            route: customers.
            legs: lengths of the moves to each of them, and home.
        """
        time = 0.0
        for node, leg in zip((*route.tolist(), 0), legs.tolist(), strict=True):
            time += self.pace * leg
            if time > self.due[node] + SLACK * max(1.0, self.day):
                return node, time - float(self.due[node])
            time = max(time, float(self.ready[node])) + float(self.service[node])
        return 0, 0.0


class Unserved(NamedTuple):
    """A node that no vehicle can serve, and why: a clause that goes on behind its name."""

    node: int
    reason: str


def first_unserved(
    windows: TimeWindows, there: Float64[np.ndarray, " N"], back: Float64[np.ndarray, " N"]
) -> Unserved | None:
    """The first node that cannot be served even on a route of its own; None where all can be.

    Args:
        windows: of the nodes.
        there: lengths of the moves from the depot to each node.
        back: of those from each node to the depot.
    """
    slack = SLACK * max(1.0, windows.day)
    there, back = windows.pace * there, windows.pace * back
    begins = np.maximum(there, windows.ready)
    home = begins + windows.service + back
    for node in range(len(there)):
        ready, due = windows.ready[node], windows.due[node]
        if ready > due:
            return Unserved(node, f"has the window {ready:g} to {due:g}, which closes before it opens")
        if node == 0:
            continue
        if begins[node] > due + slack:
            return Unserved(node, f"has to be served by {due:g}, and the way there takes until {there[node]:g}")
        if home[node] > windows.day + slack:
            cause = f"nobody who serves it is back before {home[node]:g}"
            return Unserved(node, f"lies where {cause}, and the depot closes at {windows.day:g}")
    return None


def counted_from_opening(
    ready: Float64[np.ndarray, " N"],
    due: Float64[np.ndarray, " N"],
    service: Float64[np.ndarray, " N"],
    pace: float = 1.0,
) -> TimeWindows:
    """Windows of a day that begins at any hour: vehicles leave when the depot opens, and that is time 0."""
    opens = ready[0]
    return TimeWindows(np.maximum(ready - opens, 0.0), due - opens, service, pace)
