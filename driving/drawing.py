"""Pictures of a scene: roads, traffic and lights around an ego, and what it may do next."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, UInt8

from driving.canvas import CANDIDATE, CAR, EGO, GROUND, METRES, MIDDLE, ROAD, Canvas, Colour
from driving.features import Poses
from driving.roads import RoadMap
from driving.scene import Kind, Light, Log

COLOURS = {
    Kind.CAR: CAR,
    Kind.HEAVY: (36, 44, 60),
    Kind.BICYCLE: (120, 86, 160),
    Kind.PEDESTRIAN: (160, 86, 120),
}
LIGHTS = {Light.AMBER: (240, 176, 32), Light.RED: (222, 40, 40)}
# All colours of a picture, but for those that edges are smoothed by.
PALETTE: tuple[Colour, ...] = (GROUND, ROAD, MIDDLE, EGO, CANDIDATE, *COLOURS.values(), *LIGHTS.values())


def draw(
    log: Log,
    road_map: RoadMap,
    ego: int,
    candidates: Float[np.ndarray, "A T 3"],
    chosen: Float[np.ndarray, "T 3"] | None = None,
) -> UInt8[np.ndarray, "H W 3"]:
    """The last frame of a log as an ego sees it from above, its way up.

    Args:
        log: of traffic.
        road_map: that it was recorded on.
        ego: its id.
        candidates: trajectories in its frame, in blue.
        chosen: the one that was driven last, in red, in the frame that the ego had before; None: there is none.
    """
    frame = log.frames - 1
    (row,) = log.find(np.array([ego]), np.array([frame]))
    canvas, poses = Canvas(), Poses(np.array([[log.x[row], log.y[row]]]), log.heading[row : row + 1])

    def seen(points: Float[np.ndarray, "K 2"]) -> Float[np.ndarray, "K 2"]:
        return poses.seen(points[None])[0]

    near = np.linalg.norm(road_map.middles - poses.points, axis=1) < METRES
    pieces = road_map.pieces[near][..., :2]
    for points, lane in zip(pieces, road_map.piece_lane[near], strict=True):
        canvas.line(seen(points), float(road_map.widths[lane]), ROAD)
    for points in pieces:
        canvas.line(seen(points), 0.25, MIDDLE)
    for lane, light in zip(*log.lights(frame), strict=True):
        canvas.line(seen(road_map.along(int(lane), np.array([0.0, 1.5]))[:, :2]), 2.6, LIGHTS[Light(light)])
    for trajectory in candidates:
        canvas.way(trajectory, 0.35, CANDIDATE)
        canvas.dot(trajectory[-1, :2], 0.7, CANDIDATE)
    if chosen is not None:
        before = log.find(np.array([ego]), np.array([frame - 1]))
        if before[0] >= 0:
            canvas.line(seen(_placed(log, int(before[0]), chosen)), 0.6, EGO)
    rows = log.rows(frame)
    for other in range(rows.start, rows.stop):
        size = float(log.length[other]), float(log.width[other])
        place = seen(np.array([[log.x[other], log.y[other]]]))[0]
        canvas.box(place, float(log.heading[other] - log.heading[row]), size, _colour(log, other, ego))
    return canvas.picture()


def _placed(log: Log, row: int, trajectory: Float[np.ndarray, "T 3"]) -> Float[np.ndarray, "T 2"]:
    """A trajectory in the map's frame, from where an agent was."""
    cos, sin = math.cos(log.heading[row]), math.sin(log.heading[row])
    x, y = trajectory[:, 0], trajectory[:, 1]
    return np.stack((log.x[row] + cos * x - sin * y, log.y[row] + sin * x + cos * y), 1)


def _colour(log: Log, row: int, ego: int) -> Colour:
    return EGO if log.id[row] == ego else COLOURS[Kind(log.kind[row])]
