"""A map of the lanes that cars may use, and which of them is the nearest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int32

from system import arrays
from system.errors import UserError

# Points of a piece of a lane, and how long it is at most, in metres.
PIECE_POINTS = 10
PIECE_METRES = 18.0
# How many pieces, those with the nearest middles, are looked at for the nearest lane.
NEAR_PIECES = 12
# A lane that leads in another direction counts as farther away: by so many metres where it is the opposite one, and by
# half of it where it is across.
AGAINST = 8.0


class Lane(NamedTuple):
    """A lane that cars may use.

    Attributes:
        name: unique in its map.
        points: of its centre line, in the direction of driving, metres.
        width: metres.
        limit: the highest speed allowed, m/s.
        successors: lanes that its end leads to, as indices in the map.
        left: the lane beside it in the same direction, as an index in the map; -1: there is none.
        right: likewise.
        in_junction: whether it crosses a junction.
    """

    name: str
    points: Float32[np.ndarray, "K 2"]
    width: float
    limit: float
    successors: tuple[int, ...] = ()
    left: int = -1
    right: int = -1
    in_junction: bool = False


class Nearest(NamedTuple):
    """Where points lie along the lanes nearest to them; where no lane is near, `lane` is -1 and the rest 0.

    Attributes:
        lane: indices in the map.
        arc: metres along the lane.
        offset: metres beside it, left is positive.
        heading: of the lane there, radians.
    """

    lane: Int32[np.ndarray, " N"]
    arc: Float32[np.ndarray, " N"]
    offset: Float32[np.ndarray, " N"]
    heading: Float32[np.ndarray, " N"]


class RoadMap:
    """Lanes, and arrays over all of them by which the nearest is found.

    Every lane is cut into pieces of the same length, of `PIECE_METRES` at most, each with `PIECE_POINTS` points.

    Attributes:
        name: of the map.
        lanes: all of them.
        lengths: metres, of each lane.
        limits: m/s, of each lane.
        widths: metres, of each lane.
        predecessors: of each lane, those that lead to it.
        pieces: (x, y, cos, sin of the heading, limit) of each point.
        piece_lane: the lane that each piece belongs to.
        piece_arc: metres from the lane's beginning to the piece's.
        middles: of the pieces.
    """

    def __init__(self, name: str, lanes: Sequence[Lane]) -> None:
        """Prepare a map.

        Raises:
            UserError: it has no lane, one without length, or one that leads to a lane that there is not.
        """
        if not lanes:
            raise UserError(f"map {name} has no lanes that cars may use")
        self.name, self.lanes = name, tuple(lanes)
        for lane in self.lanes:
            _require_sound(lane, len(self.lanes))
        self._arcs = [_arcs(lane.points) for lane in self.lanes]
        self.lengths = np.array([arcs[-1] for arcs in self._arcs], np.float32)
        self.limits = np.array([lane.limit for lane in self.lanes], np.float32)
        self.widths = np.array([lane.width for lane in self.lanes], np.float32)
        self.predecessors: tuple[list[int], ...] = tuple([] for _ in self.lanes)
        for index, lane in enumerate(self.lanes):
            for other in lane.successors:
                self.predecessors[other].append(index)
        counts = np.ceil(self.lengths / PIECE_METRES).astype(np.int64)
        self.piece_lane = np.repeat(np.arange(len(self.lanes), dtype=np.int32), counts)
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        self._piece_metres = (self.lengths / counts)[self.piece_lane].astype(np.float32)
        self.piece_arc = (number * self._piece_metres).astype(np.float32)
        self.pieces = self._cut()
        self.middles = self.pieces[:, :, :2].mean(1)

    def along(self, lane: int, arcs: Float[np.ndarray, " K"]) -> Float32[np.ndarray, "K 4"]:
        """Points of a lane's centre line, and its heading there: (x, y, cos, sin).

        Args:
            lane: index of the lane.
            arcs: metres from its beginning; held within its length.
        """
        points, known = self.lanes[lane].points.astype(np.float64), self._arcs[lane]
        segment = np.clip(np.searchsorted(known, arcs, side="right") - 1, 0, len(known) - 2)
        step = np.diff(points, axis=0)[segment]
        metres = np.diff(known)[segment]
        share = np.clip((arcs - known[segment]) / metres, 0, 1)
        return np.concatenate((points[segment] + share[:, None] * step, step / metres[:, None]), 1).astype(np.float32)

    def nearest(
        self,
        points: Float[np.ndarray, "N 2"],
        headings: Float[np.ndarray, " N"],
        *,
        within: float,
        least_cosine: float = -1.0,
    ) -> Nearest:
        """The nearest lanes to some points, a lane counting as farther away the more it leads elsewhere.

        Args:
            points: metres.
            headings: where they go, radians.
            within: no lane is near that is farther away than so many metres.
            least_cosine: of the angle between the way that a lane leads and the heading; -1: any way will do.
        """
        apart = ((points[:, None] - self.middles) ** 2).sum(-1)
        some = min(NEAR_PIECES, apart.shape[1])
        chosen = np.argpartition(apart, some - 1, axis=1)[:, :some]
        pieces = self.pieces[chosen]
        begin, direction = pieces[:, :, :-1, :2], pieces[:, :, :-1, 2:4]
        # The points of a piece stand for its curve: what lies between them is straight.
        segment = self._piece_metres[chosen][..., None] / (PIECE_POINTS - 1)
        away = points[:, None, None] - begin
        ahead = np.clip((away * direction).sum(-1), 0, segment)
        beside = direction[..., 0] * away[..., 1] - direction[..., 1] * away[..., 0]
        distance = np.linalg.norm(away - ahead[..., None] * direction, axis=-1)
        goes = np.stack((np.cos(headings), np.sin(headings)), -1)
        cosine = (direction * goes[:, None, None]).sum(-1)
        near = (distance <= within) & (cosine >= least_cosine)
        score = np.where(near, distance + AGAINST / 2 * (1 - cosine), np.inf)
        score = score.reshape(len(points), some * (PIECE_POINTS - 1))
        best = score.argmin(1)
        rows = np.arange(len(points))
        found = np.isfinite(score[rows, best])
        piece, number = np.divmod(best, PIECE_POINTS - 1)
        lane = self.piece_lane[chosen[rows, piece]]
        arc = self.piece_arc[chosen[rows, piece]] + number * segment[rows, piece, 0] + ahead[rows, piece, number]
        course = direction[rows, piece, number]
        return Nearest(
            np.where(found, lane, -1).astype(np.int32),
            np.where(found, arc, 0).astype(np.float32),
            np.where(found, beside[rows, piece, number], 0).astype(np.float32),
            np.where(found, np.arctan2(course[:, 1], course[:, 0]), 0).astype(np.float32),
        )

    def save(self, path: Path) -> None:
        """Write it as .npz.

        Raises:
            OSError: it cannot be written.
        """
        lanes = self.lanes
        arrays.write(
            path,
            {
                "name": np.array(self.name),
                "names": np.array([lane.name for lane in lanes]),
                "points": np.concatenate([lane.points for lane in lanes]),
                "point_count": np.array([len(lane.points) for lane in lanes]),
                "width": self.widths,
                "limit": self.limits,
                "successors": np.array([other for lane in lanes for other in lane.successors], np.int64),
                "successor_count": np.array([len(lane.successors) for lane in lanes]),
                "beside": np.array([(lane.left, lane.right) for lane in lanes]),
                "in_junction": np.array([lane.in_junction for lane in lanes]),
            },
        )

    @classmethod
    def load(cls, path: Path) -> RoadMap:
        """Read what `save` wrote.

        Raises:
            UserError: the file cannot be read, or holds no map.
        """
        try:
            stored = arrays.read(path)
            points = np.split(stored["points"].astype(np.float32), np.cumsum(stored["point_count"])[:-1])
            successors = np.split(stored["successors"], np.cumsum(stored["successor_count"])[:-1])
            lanes = [
                Lane(
                    name=str(stored["names"][index]),
                    points=points[index],
                    width=float(stored["width"][index]),
                    limit=float(stored["limit"][index]),
                    successors=tuple(successors[index].tolist()),
                    left=int(stored["beside"][index, 0]),
                    right=int(stored["beside"][index, 1]),
                    in_junction=bool(stored["in_junction"][index]),
                )
                for index in range(len(stored["names"]))
            ]
            return cls(str(stored["name"]), lanes)
        except arrays.ArraysFault as fault:
            raise UserError(f"{path} {fault}") from fault
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"{path} holds no map of lanes ({error})") from error

    def _cut(self) -> Float32[np.ndarray, "C P 5"]:
        """The points of all pieces."""
        steps = np.linspace(0, 1, PIECE_POINTS)
        arcs = self.piece_arc[:, None] + self._piece_metres[:, None] * steps
        pieces = np.empty((len(arcs), PIECE_POINTS, 5), np.float32)
        begins = np.searchsorted(self.piece_lane, np.arange(len(self.lanes) + 1))
        for lane in range(len(self.lanes)):
            own = slice(begins[lane], begins[lane + 1])
            pieces[own, :, :4] = self.along(lane, arcs[own].ravel()).reshape(-1, PIECE_POINTS, 4)
        # Headings are of the straight lines from each point to the next.
        step = np.diff(pieces[:, :, :2], axis=1)
        pieces[:, :-1, 2:4] = step / np.maximum(np.linalg.norm(step, axis=-1, keepdims=True), 1e-6)
        pieces[:, :, 4] = self.limits[self.piece_lane][:, None]
        return pieces


def _arcs(points: Float[np.ndarray, "K 2"]) -> Float[np.ndarray, " K"]:
    """Metres from the beginning to each point."""
    steps = np.linalg.norm(np.diff(points.astype(np.float64), axis=0), axis=1)
    return np.concatenate(([0.0], np.cumsum(steps)))


def _require_sound(lane: Lane, count: int) -> None:
    if len(lane.points) < 2 or not np.isfinite(lane.points).all() or (_arcs(lane.points)[1:] <= 0).any():
        raise UserError(f"lane {lane.name} needs two points at least, all finite and apart from one another")
    if (np.diff(_arcs(lane.points)) <= 0).any():
        raise UserError(f"lane {lane.name} has the same point twice in a row")
    others = (*lane.successors, lane.left, lane.right)
    if any(not -1 <= other < count for other in others) or -1 in lane.successors:
        raise UserError(f"lane {lane.name} leads to a lane that there is not; there are {count}")
