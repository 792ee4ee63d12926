"""What a scene of traffic consists of: a map of lanes, and a log of who was where at each moment.

Nothing here knows of a simulator, so that recorded data can come in its place.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int, Int32, Int64, UInt8

from system import arrays
from system.errors import UserError

# Seconds from one frame of a log to the next.
STEP = 0.5
# Points of a piece of a lane, and how long it is at most, in metres.
PIECE_POINTS = 10
PIECE_METRES = 18.0
# How many pieces, those with the nearest middles, are looked at for the nearest lane.
NEAR_PIECES = 12
# A lane that leads in another direction counts as farther away: by so many metres where it is the opposite one, and by
# half of it where it is across.
AGAINST = 8.0


class Kind(IntEnum):
    """What an agent is."""

    CAR = 0
    HEAVY = 1  # lorries and buses
    BICYCLE = 2
    PEDESTRIAN = 3


class Light(IntEnum):
    """What a traffic light shows to those who would enter a lane; those that show green are in no table."""

    AMBER = 1
    RED = 2


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
        pieces: (x, y, cos, sin of the heading, limit) of each point.
        piece_lane: the lane that each piece belongs to.
        piece_arc: metres from the lane's beginning to the piece's.
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
        counts = np.ceil(self.lengths / PIECE_METRES).astype(np.int64)
        self.piece_lane = np.repeat(np.arange(len(self.lanes), dtype=np.int32), counts)
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        self._piece_metres = (self.lengths / counts)[self.piece_lane].astype(np.float32)
        self.piece_arc = (number * self._piece_metres).astype(np.float32)
        self.pieces = self._cut()
        self._middles = self.pieces[:, :, :2].mean(1)

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

    def nearest(self, points: Float[np.ndarray, "N 2"], headings: Float[np.ndarray, " N"], *, within: float) -> Nearest:
        """The nearest lanes to some points, a lane counting as farther away the more it leads elsewhere.

        Args:
            points: metres.
            headings: where they go, radians.
            within: no lane is near that is farther away than so many metres.
        """
        apart = ((points[:, None] - self._middles) ** 2).sum(-1)
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
        against = AGAINST / 2 * (1 - (direction * goes[:, None, None]).sum(-1))
        score = np.where(distance <= within, distance + against, np.inf).reshape(len(points), -1)
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
        for lane in range(len(self.lanes)):
            own = self.piece_lane == lane
            pieces[own, :, :4] = self.along(lane, arcs[own].ravel()).reshape(-1, PIECE_POINTS, 4)
        # Headings are of the straight lines from each point to the next.
        step = np.diff(pieces[:, :, :2], axis=1)
        pieces[:, :-1, 2:4] = step / np.maximum(np.linalg.norm(step, axis=-1, keepdims=True), 1e-6)
        pieces[:, :, 4] = self.limits[self.piece_lane][:, None]
        return pieces


@dataclasses.dataclass(frozen=True)
class Log:
    """Who was where, frame by frame: frame f is the moment f * `STEP` seconds after the log's beginning.

    A table with a row for each agent of each frame: the rows of a frame come together, frame after frame, and by
    ascending `id` within it.

    Attributes:
        name: of the log.
        map_name: of the map that it was recorded on.
        first: the row that each frame begins with, and the number of rows at the end: G is one more than the
            number of frames.
        id: of the agent, the same in all frames.
        kind: one of `Kind`.
        x: of the middle of the agent's footprint, metres.
        y: likewise.
        heading: radians, counter-clockwise from the x axis.
        speed: m/s.
        acceleration: along the heading, m/s^2.
        length: of the footprint, metres.
        width: likewise.
        lane: index in the map; -1: none that cars may use.
        light_first: the row of the table of lights that each frame begins with, and the number of rows at the end.
        light_lane: the lane that a traffic light forbids to enter, as an index in the map.
        light: one of `Light`.
    """

    name: str
    map_name: str
    first: Int64[np.ndarray, " G"]
    id: Int64[np.ndarray, " N"]
    kind: UInt8[np.ndarray, " N"]
    x: Float32[np.ndarray, " N"]
    y: Float32[np.ndarray, " N"]
    heading: Float32[np.ndarray, " N"]
    speed: Float32[np.ndarray, " N"]
    acceleration: Float32[np.ndarray, " N"]
    length: Float32[np.ndarray, " N"]
    width: Float32[np.ndarray, " N"]
    lane: Int32[np.ndarray, " N"]
    light_first: Int64[np.ndarray, " G"]
    light_lane: Int32[np.ndarray, " L"]
    light: UInt8[np.ndarray, " L"]

    @property
    def frames(self) -> int:
        """How many frames there are."""
        return len(self.first) - 1

    @property
    def seconds(self) -> float:
        """From the first frame to the last."""
        return STEP * (self.frames - 1)

    @functools.cached_property
    def ids(self) -> Int64[np.ndarray, " A"]:
        """The agents, in ascending order."""
        return np.unique(self.id)

    @functools.cached_property
    def frame(self) -> Int64[np.ndarray, " N"]:
        """The frame of each row."""
        return np.repeat(np.arange(self.frames), np.diff(self.first))

    @functools.cached_property
    def _keys(self) -> Int64[np.ndarray, " N"]:
        """A number for each row, ascending: from its frame and its agent's place among `ids`."""
        return self.frame * len(self.ids) + np.searchsorted(self.ids, self.id)

    @functools.cached_property
    def _by_agent(self) -> Int64[np.ndarray, " N"]:
        """Rows by agent, and by frame within it."""
        return np.argsort(self.id, kind="stable")

    def rows(self, frame: int) -> slice:
        """The rows of a frame."""
        return slice(int(self.first[frame]), int(self.first[frame + 1]))

    def find(self, agents: Int[np.ndarray, "*S"], frames: Int[np.ndarray, "*S"]) -> Int64[np.ndarray, "*S"]:
        """The rows of agents in frames; -1 where an agent is not there, or the frame is none of the log's."""
        if not len(self._keys):
            return np.full(np.shape(agents), -1, np.int64)
        place = np.minimum(np.searchsorted(self.ids, agents), len(self.ids) - 1)
        known = (self.ids[place] == agents) & (frames >= 0) & (frames < self.frames)
        key = np.where(known, frames * len(self.ids) + place, -1)
        row = np.minimum(np.searchsorted(self._keys, key), len(self._keys) - 1)
        return np.where(self._keys[row] == key, row, -1)

    def track(self, agent: int) -> Int64[np.ndarray, " T"]:
        """The rows of one agent, frame after frame; none where there is no such agent."""
        order = self._by_agent
        begin, end = np.searchsorted(self.id, [agent, agent + 1], sorter=order)
        return order[begin:end]

    def lights(self, frame: int) -> tuple[Int32[np.ndarray, " L"], UInt8[np.ndarray, " L"]]:
        """Lanes that may not be entered in a frame, and what their lights show."""
        rows = slice(int(self.light_first[frame]), int(self.light_first[frame + 1]))
        return self.light_lane[rows], self.light[rows]

    def save(self, path: Path) -> None:
        """Write it as .npz.

        Raises:
            OSError: it cannot be written.
        """
        stored = {field.name: np.asarray(getattr(self, field.name)) for field in dataclasses.fields(self)}
        arrays.write(path, stored)

    @classmethod
    def load(cls, path: Path) -> Log:
        """Read what `save` wrote.

        Raises:
            UserError: the file cannot be read, or holds no log.
        """
        try:
            stored = arrays.read(path)
        except arrays.ArraysFault as fault:
            raise UserError(f"{path} {fault}") from fault
        missing = [name for name in (field.name for field in dataclasses.fields(cls)) if name not in stored]
        if missing:
            raise UserError(f"{path} holds no log of traffic: it has no {missing[0]}")
        columns = {name: stored[name] for name in set(COLUMNS) | set(LIGHT_COLUMNS)}
        fault_found = _table_fault(columns, COLUMNS) or _table_fault(columns, LIGHT_COLUMNS)
        if not fault_found and len(columns["first"]) != len(columns["light_first"]):
            fault_found = "first and light_first are of different lengths"
        if fault_found:
            raise UserError(f"{path} holds no log of traffic: {fault_found}")
        return cls(str(stored["name"]), str(stored["map_name"]), **columns)


# The columns of both tables, each with its type; the first says where frames begin.
COLUMNS = {
    **{"first": np.int64, "id": np.int64, "kind": np.uint8, "lane": np.int32},
    **dict.fromkeys(("x", "y", "heading", "speed", "acceleration", "length", "width"), np.float32),
}
LIGHT_COLUMNS = {"light_first": np.int64, "light_lane": np.int32, "light": np.uint8}


def _table_fault(columns: Mapping[str, np.ndarray], types: Mapping[str, type]) -> str | None:
    """What is wrong with a table of a log; None where nothing is."""
    for name, kind in types.items():
        if columns[name].dtype != kind or columns[name].ndim != 1:
            return f"{name} is {columns[name].dtype} of {columns[name].ndim} axes, and not {kind.__name__} of one"
        if not np.isfinite(columns[name]).all():
            return f"{name} has a number that is not finite"
    first, *others = types
    begin, count = columns[first], len(columns[others[0]])
    if not len(begin) or begin[0] != 0 or begin[-1] != count or (np.diff(begin) < 0).any():
        return f"{first} does not lead from 0 to the {count} rows of {others[0]}"
    short = [name for name in others if len(columns[name]) != count]
    return f"{short[0]} has {len(columns[short[0]])} rows, and {others[0]} {count}" if short else None


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
