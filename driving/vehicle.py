"""A car that follows a trajectory as well as its engine, its brakes and its steering allow."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import Float, Float32

from driving.scene import STEP

# m/s^2: of the engine, and of the brakes.
STRONGEST, HARDEST = 3.0, 6.0
# The axles are so far apart, and the rear one so far behind the middle, in shares of the length.
WHEELBASE, REAR = 0.6, 0.3
# The wheels turn so far, in radians, and so fast, in radians a second.
SHARPEST, QUICKEST = 0.6, 0.8
# It means to be right so many seconds ahead, and steers to a point so far ahead in seconds, in metres at least.
AHEAD_SECONDS, LOOK_SECONDS, LOOK_METRES = 1.0, 0.5, 3.0
# Metres by which a trajectory is extended beyond its end.
BEYOND = 30.0
# Points of a trajectory closer together than this, in metres, do not tell a direction.
STILL = 0.05


@dataclasses.dataclass
class Car:
    """A kinematic bicycle.

    Attributes:
        x: of its middle, metres.
        y: likewise.
        heading: radians.
        speed: m/s, not negative.
        length: metres.
        steering: of the front wheels, radians, to the left.
    """

    x: float
    y: float
    heading: float
    speed: float
    length: float
    steering: float = 0.0

    def follow(self, path: Path, seconds: float, tick: float) -> None:
        """Drive on.

        Args:
            path: the trajectory.
            seconds: since the trajectory began.
            tick: how long to drive, seconds.
        """
        driven = path.arc_of(self.x, self.y)
        due = path.arc_at(seconds + AHEAD_SECONDS)
        wanted = 2 * (due - driven - self.speed * AHEAD_SECONDS) / AHEAD_SECONDS**2
        speed = max(0.0, self.speed + tick * min(max(wanted, -HARDEST), STRONGEST))
        rear_x = self.x - REAR * self.length * math.cos(self.heading)
        rear_y = self.y - REAR * self.length * math.sin(self.heading)
        # Pure pursuit (Coulter 1992): the circle through the rear axle that meets the path ahead.
        aim_x, aim_y = path.point(driven + max(LOOK_METRES, LOOK_SECONDS * self.speed))
        angle = math.atan2(aim_y - rear_y, aim_x - rear_x) - self.heading
        distance = max(math.hypot(aim_x - rear_x, aim_y - rear_y), LOOK_METRES)
        wanted = math.atan(WHEELBASE * self.length * 2 * math.sin(angle) / distance)
        wanted = min(max(wanted, -SHARPEST), SHARPEST)
        turned = min(max(wanted - self.steering, -QUICKEST * tick), QUICKEST * tick)
        self.steering += turned
        metres = (self.speed + speed) / 2 * tick
        middle = self.heading + metres * math.tan(self.steering) / (WHEELBASE * self.length) / 2
        rear_x, rear_y = rear_x + metres * math.cos(middle), rear_y + metres * math.sin(middle)
        self.heading += metres * math.tan(self.steering) / (WHEELBASE * self.length)
        self.x = rear_x + REAR * self.length * math.cos(self.heading)
        self.y = rear_y + REAR * self.length * math.sin(self.heading)
        self.speed = speed


def braked(trajectory: Float[np.ndarray, "T 3"], *, speed: float) -> Float32[np.ndarray, "T 3"]:
    """The way of a trajectory, with the brakes on as hard as they are.

    Args:
        trajectory: x, y in metres and heading in radians after each of the next steps, in the car's frame.
        speed: of the car, m/s.

    Returns:
        The same of a car that stops on it.
    """
    path = Path(Car(0.0, 0.0, 0.0, speed, length=0.0), trajectory)
    seconds = np.minimum(STEP * np.arange(1, len(trajectory) + 1), speed / HARDEST)
    return path.poses(speed * seconds - HARDEST * seconds**2 / 2).astype(np.float32)


class Path:
    """A trajectory from where a car is, in the map's frame, and straight on from its end."""

    def __init__(self, car: Car, trajectory: Float[np.ndarray, "T 3"]) -> None:
        """Begin at a car.

        Args:
            car: as it is now.
            trajectory: (x, y, heading) after each of the next steps, in the car's frame.
        """
        own = np.concatenate((np.zeros((1, 3)), trajectory.astype(np.float64)))
        cos, sin = math.cos(car.heading), math.sin(car.heading)
        points = np.stack((car.x + cos * own[:, 0] - sin * own[:, 1], car.y + sin * own[:, 0] + cos * own[:, 1]), 1)
        metres = np.linalg.norm(np.diff(points, axis=0), axis=1)
        self._due = np.concatenate(([0.0], np.cumsum(metres)))
        moves = np.concatenate(([True], metres > STILL))
        arcs, points, headings = self._due[moves], points[moves], own[moves, 2]
        end = car.heading + headings[-1] if len(points) > 1 else car.heading
        last = points[-1] + BEYOND * np.array([math.cos(end), math.sin(end)])
        self._arcs = np.append(arcs, arcs[-1] + BEYOND)
        self._points = np.concatenate((points, last[None]))
        self._headings = np.append(car.heading + headings, end)

    def arc_at(self, seconds: float) -> float:
        """Metres that are due so long after the beginning."""
        return float(np.interp(seconds / STEP, np.arange(len(self._due)), self._due))

    def arc_of(self, x: float, y: float) -> float:
        """Metres to the point of the path that is nearest."""
        begin, step = self._points[:-1], np.diff(self._points, axis=0)
        away = np.array([x, y]) - begin
        share = np.clip((away * step).sum(1) / np.maximum((step**2).sum(1), 1e-9), 0, 1)
        nearest = np.linalg.norm(away - share[:, None] * step, axis=1).argmin()
        return float(self._arcs[nearest] + share[nearest] * (self._arcs[nearest + 1] - self._arcs[nearest]))

    def point(self, arc: float) -> tuple[float, float]:
        """The point of the path after so many metres."""
        x, y = (float(np.interp(arc, self._arcs, self._points[:, axis])) for axis in (0, 1))
        return x, y

    def poses(self, arcs: Float[np.ndarray, " T"]) -> Float[np.ndarray, "T 3"]:
        """The points of the path after so many metres, and the headings there, in radians."""
        numbers = (self._points[:, 0], self._points[:, 1], np.unwrap(self._headings))
        return np.stack([np.interp(arcs, self._arcs, each) for each in numbers], 1)
