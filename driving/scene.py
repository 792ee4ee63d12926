"""A log of traffic: who was where at each moment, and what the lights showed.

Nothing here knows of a simulator, so that recorded data can come in its place.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int, Int32, Int64, UInt8

from system import arrays
from system.errors import UserError

# Seconds from one frame of a log to the next.
STEP = 0.5


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
