"""Pictures of a scene: roads, traffic and lights around an ego, and what it may do next."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from driving.features import Poses
from driving.roads import RoadMap
from driving.scene import Kind, Light, Log

# Pixels of a side, metres that they show, and how much larger it is drawn before it is made smaller, which smooths it.
SIDE, METRES, FINER = 512, 110.0, 2
# The ego stands so far up from the lower edge, as a share of the side.
BELOW = 0.32
Colour = tuple[int, int, int]
GROUND, ROAD, MIDDLE = (233, 236, 231), (178, 182, 188), (204, 207, 212)
EGO, CHOSEN, CANDIDATE = (214, 64, 38), (214, 64, 38), (74, 116, 196)
COLOURS = {
    Kind.CAR: (62, 78, 98),
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
    canvas = _Canvas(Poses(np.array([[log.x[row], log.y[row]]]), log.heading[row : row + 1]))
    near = np.linalg.norm(road_map.middles - canvas.poses.points, axis=1) < METRES
    pieces = road_map.pieces[near][..., :2]
    for points, lane in zip(pieces, road_map.piece_lane[near], strict=True):
        canvas.line(canvas.seen(points), float(road_map.widths[lane]), ROAD)
    for points in pieces:
        canvas.line(canvas.seen(points), 0.25, MIDDLE)
    for lane, light in zip(*log.lights(frame), strict=True):
        canvas.line(canvas.seen(road_map.along(int(lane), np.array([0.0, 1.5]))[:, :2]), 2.6, LIGHTS[Light(light)])
    for trajectory in candidates:
        canvas.line(np.concatenate((np.zeros((1, 2)), trajectory[:, :2])), 0.35, CANDIDATE)
        canvas.dot(trajectory[-1, :2], 0.7, CANDIDATE)
    if chosen is not None:
        before = log.find(np.array([ego]), np.array([frame - 1]))
        if before[0] >= 0:
            canvas.line(canvas.seen(_placed(log, int(before[0]), chosen)), 0.6, CHOSEN)
    rows = log.rows(frame)
    for other in range(rows.start, rows.stop):
        size = float(log.length[other]), float(log.width[other])
        place = canvas.seen(np.array([[log.x[other], log.y[other]]]))[0]
        canvas.box(place, float(log.heading[other] - log.heading[row]), size, _colour(log, other, ego))
    return canvas.picture()


def _placed(log: Log, row: int, trajectory: Float[np.ndarray, "T 3"]) -> Float[np.ndarray, "T 2"]:
    """A trajectory in the map's frame, from where an agent was."""
    cos, sin = math.cos(log.heading[row]), math.sin(log.heading[row])
    x, y = trajectory[:, 0], trajectory[:, 1]
    return np.stack((log.x[row] + cos * x - sin * y, log.y[row] + sin * x + cos * y), 1)


def _colour(log: Log, row: int, ego: int) -> Colour:
    return EGO if log.id[row] == ego else COLOURS[Kind(log.kind[row])]


class _Canvas:
    """A picture in metres, in the frame of an ego."""

    def __init__(self, poses: Poses) -> None:
        self.poses = poses
        self._scale = FINER * SIDE / METRES
        self._image = Image.new("RGB", (FINER * SIDE, FINER * SIDE), GROUND)
        self._draw = ImageDraw.Draw(self._image)

    def seen(self, points: Float[np.ndarray, "K 2"]) -> Float[np.ndarray, "K 2"]:
        return self.poses.seen(points[None])[0]

    def line(self, points: Float[np.ndarray, "K 2"], width: float, colour: Colour) -> None:
        pixels = [self._pixel(point) for point in points]
        self._draw.line(pixels, fill=colour, width=max(1, round(width * self._scale)), joint="curve")

    def dot(self, point: Float[np.ndarray, "2"], size: float, colour: Colour) -> None:
        (x, y), radius = self._pixel(point), size * self._scale / 2
        self._draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)

    def box(self, place: Float[np.ndarray, "2"], heading: float, size: tuple[float, float], colour: Colour) -> None:
        length, width = size[0] / 2, size[1] / 2
        # A pointed front tells where it goes.
        corners = np.array(
            [(length, 0), (0.6 * length, width), (-length, width), (-length, -width), (0.6 * length, -width)]
        )
        cos, sin = math.cos(heading), math.sin(heading)
        turned = corners @ np.array([[cos, sin], [-sin, cos]]) + place
        self._draw.polygon([self._pixel(point) for point in turned], fill=colour, outline=(255, 255, 255))

    def picture(self) -> UInt8[np.ndarray, "H W 3"]:
        return np.asarray(self._image.resize((SIDE, SIDE), Image.Resampling.LANCZOS))

    def _pixel(self, point: Float[np.ndarray, "2"]) -> tuple[float, float]:
        """What lies ahead is up, what lies to the left is left."""
        side = FINER * SIDE
        return side / 2 - float(point[1]) * self._scale, side * (1 - BELOW) - float(point[0]) * self._scale
