"""The task of a planner: to choose among candidates, and to say how each would be driven."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PlanningTask:
    """What a network must know before it meets a scene.

    Attributes:
        modes: M, in which each reference line can be followed.
        points: T, of a trajectory.
    """

    modes: int
    points: int
