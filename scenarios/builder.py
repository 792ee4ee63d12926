"""The scenarios of a log: the way of every car, cut into stretches of ten seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from driving.roads import RoadMap
from driving.scene import STEP, Kind, Log
from scenarios.manoeuvres import Course, following, lane_changes, type_of
from scenarios.scenario import ROWS, Scenario, token_of

# Metres beyond what its speed explains, from which on an agent has been put elsewhere rather than driven there.
JUMP = 6.0
# A decision and what came of it.
LEAST_ROWS = 2


class Built(NamedTuple):
    """Scenarios of a log, and how many stretches are none, by reason."""

    scenarios: list[Scenario]
    left_out: Counter[str]


def build(log: Log, road_map: RoadMap) -> Built:
    """All scenarios of a log, by agent and frame. No frame of an agent is in two of them."""
    follows = following(log)
    built = Built([], Counter())
    cars = np.unique(log.id[log.kind == Kind.CAR])
    for agent in cars.tolist():
        for stretch, ends_on_road in _stretches(log, log.track(agent)):
            changes = np.zeros(len(stretch), bool)
            changes[1:] = lane_changes(log.lane[stretch[:-1]], log.lane[stretch[1:]], road_map)
            for begin in range(0, len(stretch), ROWS):
                window = slice(begin, begin + ROWS)
                rows = stretch[window]
                if len(rows) < LEAST_ROWS:
                    built.left_out["stretches of a single row"] += 1
                    continue
                course = Course(log.speed[rows], log.heading[rows], changes[window], follows[rows])
                built.scenarios.append(_scenario(log, rows, course, goal_on_road=ends_on_road))
    return built


def _stretches(log: Log, track: Int64[np.ndarray, " T"]) -> Iterator[tuple[Int64[np.ndarray, " S"], bool]]:
    """The parts of an agent's track in which it is there in every frame, and whether each part ends on a lane.

    A simulator takes cars that block one another out of the traffic, and puts them back elsewhere.
    """
    places = _places(log, track)
    moved = np.linalg.norm(np.diff(places, axis=0), axis=1)
    fastest = np.maximum(log.speed[track[:-1]], log.speed[track[1:]])
    apart = (np.diff(log.frame[track]) != 1) | (moved > STEP * fastest + JUMP)
    for stretch in np.split(track, np.flatnonzero(apart) + 1):
        yield stretch, bool(log.lane[stretch[-1]] >= 0)


def _scenario(log: Log, rows: Int64[np.ndarray, " T"], course: Course, *, goal_on_road: bool) -> Scenario:
    agent, frame = int(log.id[rows[0]]), int(log.frame[rows[0]])
    places = _places(log, rows)
    return Scenario(
        log=log.name,
        map=log.map_name,
        type=type_of(course),
        token=token_of(log.name, agent, frame, rows=len(rows)),
        agent=agent,
        frame=frame,
        rows=len(rows),
        speeds=tuple(np.round(course.speeds.astype(np.float64), 2).tolist()),
        displacement=round(float(np.linalg.norm(places[-1] - places[0])), 2),
        goal_on_road=goal_on_road,
    )


def _places(log: Log, rows: Int64[np.ndarray, " T"]) -> Float64[np.ndarray, "T 2"]:
    return np.stack((log.x[rows], log.y[rows]), 1).astype(np.float64)
