"""What an ego observes of a scene, and what became of it: one definition for the cache and for the environment."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Int64

from driving.candidates import ACTIONS, STEPS, action_mask, label
from driving.lines import LINE_FEATURES, LINES, POINTS, closed_lanes, lane_of, reference_lines
from driving.roads import PIECE_POINTS, RoadMap
from driving.scene import STEP, Log

# What an ego knows of itself, in this order: m/s, m/s^2, rad/s, metres, metres, m/s.
EGO = ("speed", "acceleration", "yaw_rate", "length", "width", "limit")
# Other agents, the nearest first, at so many moments `STEP` seconds apart, the last of them now.
AGENTS, MOMENTS = 24, 3
# What is known of each at each moment: (x, y, cos, sin of the heading, speed along x and y, length, width).
AGENT_FEATURES = 8
# Pieces of lanes, the nearest first, and (x, y, cos, sin, limit) of each point.
ROADS, ROAD_FEATURES = 40, 5
# Nothing is observed that is farther away, in metres.
RADIUS = 100.0


class Feature(NamedTuple):
    """Shape and type of one array of an ego's features."""

    shape: tuple[int, ...]
    dtype: type


FEATURES = {
    "ego": Feature((len(EGO),), np.float32),
    "agents": Feature((AGENTS, MOMENTS, AGENT_FEATURES), np.float32),
    "agents_valid": Feature((AGENTS, MOMENTS), np.bool_),
    "roads": Feature((ROADS, PIECE_POINTS, ROAD_FEATURES), np.float32),
    "roads_valid": Feature((ROADS, PIECE_POINTS), np.bool_),
    "lines": Feature((LINES, POINTS, LINE_FEATURES), np.float32),
    "lines_valid": Feature((LINES, POINTS), np.bool_),
    "action_mask": Feature((ACTIONS,), np.bool_),
}
TARGETS = {
    "future": Feature((STEPS, 3), np.float32),
    "future_valid": Feature((STEPS,), np.bool_),
    "action": Feature((), np.int64),
}


class Poses(NamedTuple):
    """Where egos are and look, by which others come into their frames.

    Attributes:
        points: metres.
        headings: radians.
    """

    points: Float[np.ndarray, "N 2"]
    headings: Float[np.ndarray, " N"]

    def turned(self, vectors: Float[np.ndarray, "N *S 2"]) -> Float[np.ndarray, "N *S 2"]:
        """Directions as the egos see them."""
        shape = (len(self.headings), *(1,) * (vectors.ndim - 2))
        cos, sin = (function(self.headings).reshape(shape) for function in (np.cos, np.sin))
        x, y = vectors[..., 0], vectors[..., 1]
        return np.stack((cos * x + sin * y, cos * y - sin * x), -1)

    def seen(self, points: Float[np.ndarray, "N *S 2"]) -> Float[np.ndarray, "N *S 2"]:
        """Points as the egos see them."""
        own = self.points.reshape(len(points), *(1,) * (points.ndim - 2), 2)
        return self.turned(points - own)


def features(
    log: Log, road_map: RoadMap, agents: Int[np.ndarray, " N"], frame: int, *, targets: bool = True
) -> dict[str, np.ndarray]:
    """What some agents of a frame observe, each as an ego: `FEATURES`, and `TARGETS` where they are asked for.

    Everything is in the ego's frame, in which it stands at the origin and looks along x. Padding is 0, and not valid.

    - `ego`: see `EGO`. The limit is that of its lane, 0 where it is on none.
    - `agents`: the nearest others, whoever they are, at the last `MOMENTS` frames.
    - `roads`: the pieces of lanes whose middles are nearest.
    - `lines`, `lines_valid`: see `lines.Lines`; `action_mask`: see `candidates`.
    - `future`: (x, y, heading) after each of the next `STEPS` steps, while the log has them.
    - `action`: the candidate that it took, see `candidates.label`.

    Args:
        log: of traffic.
        road_map: that it was recorded on.
        agents: by their ids; all of them are in the frame.
        frame: of the log.
        targets: whether to look into the future.
    """
    rows = log.find(agents, np.full(len(agents), frame))
    assert (rows >= 0).all(), "an agent is not in the frame"
    poses = Poses(np.stack((log.x[rows], log.y[rows]), 1), log.heading[rows])
    nearest = lane_of(road_map, poses.points, poses.headings)
    lines = reference_lines(road_map, nearest, *poses, closed_lanes(road_map, *log.lights(frame)))
    limits = np.where(nearest.lane >= 0, road_map.limits[nearest.lane], 0)
    found = {"ego": _ego(log, rows, frame, limits)}
    found["agents"], found["agents_valid"] = _others(log, rows, frame, poses)
    found["roads"], found["roads_valid"] = _roads(road_map, poses)
    found["lines"], found["lines_valid"] = lines
    found["action_mask"] = action_mask(lines.valid)
    if targets:
        found["future"], found["future_valid"] = _future(log, agents, frame, poses)
        known = (found[key] for key in ("future", "future_valid", "lines", "lines_valid", "ego"))
        found["action"] = label(*known)
    return found


def _ego(
    log: Log, rows: Int64[np.ndarray, " N"], frame: int, limits: Float[np.ndarray, " N"]
) -> Float[np.ndarray, "N E"]:
    before = log.find(log.id[rows], np.full(len(rows), frame - 1))
    turned = np.where(before >= 0, log.heading[rows] - log.heading[before], 0)
    yaw_rate = np.arctan2(np.sin(turned), np.cos(turned)) / STEP
    own = (log.speed[rows], log.acceleration[rows], yaw_rate, log.length[rows], log.width[rows], limits)
    return np.stack(own, 1).astype(np.float32)


def _others(
    log: Log, rows: Int64[np.ndarray, " N"], frame: int, poses: Poses
) -> tuple[Float[np.ndarray, "N A H F"], np.ndarray]:
    """The nearest agents of a frame, and where they have been."""
    present = np.arange(*log.rows(frame).indices(len(log.id)))
    points = np.stack((log.x[present], log.y[present]), 1)
    apart = np.linalg.norm(poses.points[:, None] - points, axis=-1)
    apart[present == rows[:, None]] = np.inf
    nearest = np.argsort(apart, axis=1, kind="stable")[:, :AGENTS]
    near = np.take_along_axis(apart, nearest, 1) <= RADIUS
    moments = frame - np.arange(MOMENTS)[::-1]
    ids = np.broadcast_to(log.id[present][nearest][..., None], (*nearest.shape, MOMENTS))
    found = log.find(ids, np.broadcast_to(moments, ids.shape))
    valid = (found >= 0) & near[..., None]
    column = np.where(valid, found, 0)
    heading = np.stack((np.cos(log.heading[column]), np.sin(log.heading[column])), -1)
    heading = poses.turned(heading)
    seen = (
        poses.seen(np.stack((log.x[column], log.y[column]), -1)),
        heading,
        heading * log.speed[column][..., None],
        np.stack((log.length[column], log.width[column]), -1),
    )
    return _padded(np.concatenate(seen, -1), valid, AGENTS)


def _roads(road_map: RoadMap, poses: Poses) -> tuple[Float[np.ndarray, "N P K F"], np.ndarray]:
    """The nearest pieces of lanes."""
    apart = np.linalg.norm(poses.points[:, None] - road_map.middles, axis=-1)
    count = min(ROADS, apart.shape[1])
    nearest = np.argpartition(apart, count - 1, axis=1)[:, :count]
    distance = np.take_along_axis(apart, nearest, 1)
    order = np.argsort(distance, axis=1, kind="stable")
    nearest, distance = (np.take_along_axis(array, order, 1) for array in (nearest, distance))
    pieces = road_map.pieces[nearest]
    seen = (poses.seen(pieces[..., :2]), poses.turned(pieces[..., 2:4]), pieces[..., 4:])
    valid = np.broadcast_to((distance <= RADIUS)[..., None], pieces.shape[:3])
    return _padded(np.concatenate(seen, -1), valid, ROADS)


def _future(
    log: Log, agents: Int[np.ndarray, " N"], frame: int, poses: Poses
) -> tuple[Float[np.ndarray, "N T 3"], np.ndarray]:
    """Where egos are after each of the next steps."""
    moments = np.broadcast_to(frame + np.arange(1, STEPS + 1), (len(agents), STEPS))
    found = log.find(np.broadcast_to(agents[:, None], moments.shape), moments)
    valid = found >= 0
    turned = log.heading[found] - poses.headings[:, None]
    heading = np.arctan2(np.sin(turned), np.cos(turned))
    points = poses.seen(np.stack((log.x[found], log.y[found]), -1))
    return _padded(np.concatenate((points, heading[..., None]), -1), valid, STEPS)


def _padded(
    values: Float[np.ndarray, "N n *S F"], valid: np.ndarray, count: int
) -> tuple[Float[np.ndarray, "N m *S F"], np.ndarray]:
    """So many entries of each ego, those that are not valid being 0."""
    missing = ((0, 0), (0, count - values.shape[1]))
    zeroed = np.where(valid[..., None], values, 0).astype(np.float32)
    return (
        np.pad(zeroed, (*missing, *((0, 0),) * (values.ndim - 2))),
        np.pad(valid, (*missing, *((0, 0),) * (valid.ndim - 2))),
    )
