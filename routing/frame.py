"""Between a user's own units and those that models learn in: positions in the unit square, costs of 0.5 on average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64

from config import UserError
from routing.trips import Log

# What a move costs on average, in units of cost: as in the unit square, whose distances are 0.52.
MEAN_COST = 0.5
# How far outside of the log's box a node may lie, in the unit square.
MARGIN = 0.05


@dataclass(frozen=True, eq=False)
class Frame:
    """Where a log's positions lie in the unit square, and what one unit of cost is in its own unit.

    `inside` brings positions into the square, with the same scale along both axes; of longitude and latitude, a
    degree of longitude is shortened as it is in the middle of the box. A cost of the log is `unit` times a model's.

    Attributes:
        corner: the least x and y of the log's box, or longitude and latitude in degrees.
        scale: lengths in the square for one unit along x and along y.
        size: of the box in the square; the longer side is 1.
        unit: what a cost of 1 is, in the log's own unit.
        on_earth: whether positions are longitude and latitude.
        names: of the places, where the log goes between places of a table; none where it has positions alone.
        places: where these lie, in the square.
        seen: whether the moves that are learnt from go to each of them.
    """

    corner: Float64[np.ndarray, " 2"]
    scale: Float64[np.ndarray, " 2"]
    size: Float64[np.ndarray, " 2"]
    unit: float
    on_earth: bool
    names: tuple[str, ...]
    places: Float64[np.ndarray, "P 2"]
    seen: Bool[np.ndarray, " P"]

    @classmethod
    def around(cls, log: Log, *, learnt: Bool[np.ndarray, " M"]) -> Frame:
        """The frame of a log, and of its table of places.

        Args:
            log: the moves.
            learnt: which of them are learnt from.

        Raises:
            UserError: all positions are one, or all costs are 0.
        """
        names: tuple[str, ...] = ()
        seen = np.zeros(0, dtype=bool)
        every = np.concatenate((log.origin, log.target))
        if log.table is not None:
            assert log.ends is not None, "moves go between the places of a table"
            names, every = log.table.names, log.table.positions
            seen = np.bincount(log.ends[learnt].ravel(), minlength=len(names)) > 0
        corner, extent = every.min(0), np.ptp(every, axis=0)
        shortened = np.ones(2)
        if log.on_earth:
            shortened[0] = np.cos(np.radians(corner[1] + extent[1] / 2))
        longest, mean = float((extent * shortened).max()), float(log.cost.mean())
        if not longest > 0:
            raise UserError("all moves are at one position; there is nothing to learn")
        if not mean > 0:
            raise UserError("all moves cost 0; there is nothing to learn")
        scale = shortened / longest
        places = (every - corner) * scale if names else np.zeros((0, 2))
        return cls(corner, scale, extent * scale, mean / MEAN_COST, log.on_earth, names, places, seen)

    def inside(self, positions: Float[np.ndarray, "*B 2"]) -> Float64[np.ndarray, "*B 2"]:
        """Positions of the log's kind in the unit square; what lies outside the log's box lies outside the square."""
        return (positions - self.corner) * self.scale

    def located(self, positions: Float64[np.ndarray, "N D"], *, are_degrees: bool) -> Float64[np.ndarray, "N 2"]:
        """Positions as a user's file has them, latitudes first where they are degrees, in the unit square.

        Raises:
            UserError: they are of another kind than the log's, or lie outside of its box.
        """
        if are_degrees != self.on_earth or positions.shape[1] != 2:
            wanted = "lat and lon" if self.on_earth else "x and y"
            raise UserError(f"says otherwise than the log that the run learnt from where nodes are: give {wanted}")
        inside = self.inside(positions[:, ::-1] if are_degrees else positions)
        outside = ((inside < -MARGIN) | (inside > self.size + MARGIN)).any(-1)
        if outside.any():
            x, y = positions[outside][0]
            raise UserError(f"has a node at ({x:g}, {y:g}), outside of the box of the log that the run learnt from")
        return inside

    def numbers_of(self, names: Sequence[str]) -> Int64[np.ndarray, " N"]:
        """The numbers of places by their names.

        Raises:
            UserError: there is no such place.
        """
        numbers = {name: number for number, name in enumerate(self.names)}
        for name in names:
            if name not in numbers:
                raise UserError(f"place {name!r} is none of the {len(numbers)} that the run has learnt of")
        return np.array([numbers[name] for name in names], dtype=np.int64)

    def state_dict(self) -> dict[str, Any]:
        """As checkpoints hold it."""
        arrays = {name: torch.from_numpy(getattr(self, name)) for name in ("corner", "scale", "size", "places", "seen")}
        return {**arrays, "unit": self.unit, "on_earth": self.on_earth, "names": list(self.names)}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Frame:
        """The inverse of `state_dict`.

        Raises:
            UserError: the state is that of no frame.
        """
        arrays = {name: state[name].double().cpu().numpy() for name in ("corner", "scale", "size", "places")}
        names, seen = tuple(state["names"]), state["seen"].bool().cpu().numpy()
        pairs = all(arrays[name].shape == (2,) for name in ("corner", "scale", "size"))
        tables = arrays["places"].shape == (len(names), 2) and seen.shape == (len(names),)
        finite = all(np.isfinite(each).all() for each in arrays.values()) and 0 < state["unit"] < np.inf
        if not (pairs and tables and finite):
            raise UserError("the checkpoint's frame of a log contradicts itself; give another checkpoint")
        return cls(**arrays, unit=float(state["unit"]), on_earth=state["on_earth"], names=names, seen=seen)
