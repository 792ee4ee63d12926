"""A picture of the plane in metres, as an ego sees it from above: its way up, what lies to its left on the left."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

# Pixels of a side, metres that they show, and how much larger it is drawn before it is made smaller, which smooths it.
SIDE, METRES, FINER = 512, 110.0, 2
# The ego stands so far up from the lower edge, as a share of the side.
BELOW = 0.32
Colour = tuple[int, int, int]
GROUND, ROAD, MIDDLE = (233, 236, 231), (178, 182, 188), (204, 207, 212)
EGO, CANDIDATE, CAR = (214, 64, 38), (74, 116, 196), (62, 78, 98)


class Canvas:
    """Draws in metres of an ego's frame."""

    def __init__(self) -> None:
        self._scale = FINER * SIDE / METRES
        self._image = Image.new("RGB", (FINER * SIDE, FINER * SIDE), GROUND)
        self._draw = ImageDraw.Draw(self._image)

    def line(self, points: Float[np.ndarray, "K 2"], width: float, colour: Colour) -> None:
        """A line through points, so many metres wide."""
        pixels = [self._pixel(point) for point in points]
        self._draw.line(pixels, fill=colour, width=max(1, round(width * self._scale)), joint="curve")

    def way(self, trajectory: Float[np.ndarray, "T 3"], width: float, colour: Colour) -> None:
        """A trajectory from where the ego is."""
        self.line(np.concatenate((np.zeros((1, 2)), trajectory[:, :2])), width, colour)

    def dot(self, point: Float[np.ndarray, "2"], size: float, colour: Colour) -> None:
        """A disc, so many metres across."""
        (x, y), radius = self._pixel(point), size * self._scale / 2
        self._draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)

    def box(self, place: Float[np.ndarray, "2"], heading: float, size: tuple[float, float], colour: Colour) -> None:
        """Somebody's footprint, of a length and a width; a pointed front tells where it goes."""
        length, width = size[0] / 2, size[1] / 2
        corners = np.array(
            [(length, 0), (0.6 * length, width), (-length, width), (-length, -width), (0.6 * length, -width)]
        )
        cos, sin = np.cos(heading), np.sin(heading)
        turned = corners @ np.array([[cos, sin], [-sin, cos]]) + place
        self._draw.polygon([self._pixel(point) for point in turned], fill=colour, outline=(255, 255, 255))

    def picture(self) -> UInt8[np.ndarray, "H W 3"]:
        """What has been drawn."""
        return np.asarray(self._image.resize((SIDE, SIDE), Image.Resampling.LANCZOS))

    def _pixel(self, point: Float[np.ndarray, "2"]) -> tuple[float, float]:
        side = FINER * SIDE
        return side / 2 - float(point[1]) * self._scale, side * (1 - BELOW) - float(point[0]) * self._scale
