"""Reads logs of moves, a row each: from where to where, what it cost, and maybe of which trip it was a part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from config import UserError
from routing.parsing import LARGEST_COORDINATE, InstanceError, Row, decode, fault, number_in, quoted
from routing.tables import LATITUDE, LONGITUDE, X, Y, plain_name, rows_of, with_points
from system.safe_files import read_bytes

# Takes tens of times its size while it is read; this much holds millions of moves.
LARGEST_LOG = 2**28
# Nothing is learnt from fewer moves, nor from a log of which more rows are bad than good.
LEAST_MOVES = 100

FROM, TO = ("from", "origin", "start"), ("to", "target", "destination")
COST, TRIP, PLACE_NAMES = frozenset({"cost"}), frozenset({"trip"}), frozenset({"place", "name"})
# The names of columns of positions, and whether they are degrees: x is longitude there, and y latitude.
POSITIONS = ((X, Y, False), (LONGITUDE, LATITUDE, True))
LOG_REMEDY = (
    "name the columns in the first line: from_x, from_y, to_x, to_y (or from_lon, from_lat, to_lon, to_lat) and cost;"
    " or from, to and cost, with --places FILE; and trip, if moves belong together"
)
PLACES_REMEDY = "name the columns in the first line: place, x and y, or place, lon and lat"


class PlaceTable(NamedTuple):
    """Where places lie that have names.

    Attributes:
        names: of the places.
        positions: x and y, or longitude and latitude in degrees.
        on_earth: which of the two.
    """

    names: tuple[str, ...]
    positions: Float64[np.ndarray, "P 2"]
    on_earth: bool


class Log(NamedTuple):
    """Moves that somebody has made.

    Attributes:
        origin: where they began, in the log's own unit.
        target: where they ended.
        cost: what they cost, in the log's own unit.
        trip: which trip each is a part of, counted from 0; each is its own where the log tells of none.
        on_earth: whether positions are longitude and latitude in degrees.
        table: of the places that the moves go between; None where the log has positions.
        ends: the numbers of the two places of each move; None likewise.
        faults: why rows of the file were left out, a line each.
    """

    origin: Float64[np.ndarray, "M 2"]
    target: Float64[np.ndarray, "M 2"]
    cost: Float64[np.ndarray, " M"]
    trip: Int64[np.ndarray, " M"]
    on_earth: bool
    table: PlaceTable | None
    ends: Int64[np.ndarray, "M 2"] | None
    faults: tuple[str, ...]


def read_trips(path: Path, table: PlaceTable | None) -> Log:
    """The moves of a log.

    Args:
        path: a table whose first line names its columns.
        table: of the places that moves go between; None where the log has positions.

    Raises:
        UserError: it cannot be read, lacks columns, or has too few good rows.
    """
    header, rows = _table(path, LOG_REMEDY)
    plain = [plain_name(name) for name in header.fields]
    cost, trip = _find(plain, COST), _find(plain, TRIP)
    names = [_find(plain, frozenset(words)) for words in (FROM, TO)]
    positions = next((found for found in _position_columns(plain) if None not in found[0]), None)
    if cost is None or (positions is None and None in names):
        raise fault(path, header.number, f"the columns are {', '.join(map(quoted, header.fields))}", LOG_REMEDY)
    if positions is None and table is None:
        raise fault(path, header.number, "moves go between places by name", "say where they lie: --places FILE")
    if positions is not None and table is not None and None in names:
        raise fault(path, header.number, "moves go between positions", "leave --places out, or name columns from, to")
    reader = _Reader(path, len(header.fields), cost, trip)
    if table is not None:
        ends = reader.named(rows, [index for index in names if index is not None], table)
        origin, target = table.positions[ends[:, 0]], table.positions[ends[:, 1]]
        log = reader.log(origin, target, on_earth=table.on_earth, table=table, ends=ends)
    else:
        assert positions is not None
        columns, on_earth = positions
        found = reader.placed(rows, [index for index in columns if index is not None], on_earth=on_earth)
        log = reader.log(found[:, :2], found[:, 2:], on_earth=on_earth)
    _require_enough(path, log)
    return log


def read_places(path: Path) -> PlaceTable:
    """The places of a table.

    Raises:
        UserError: it cannot be read, lacks columns, or a row is bad.
    """
    header, rows = _table(path, PLACES_REMEDY)
    plain = [plain_name(name) for name in header.fields]
    name, kinds = _find(plain, PLACE_NAMES), [(_find(plain, x), _find(plain, y), earth) for x, y, earth in POSITIONS]
    kind = next((kind for kind in kinds if None not in kind), None)
    if name is None or kind is None:
        raise fault(path, header.number, f"the columns are {', '.join(map(quoted, header.fields))}", PLACES_REMEDY)
    x, y, on_earth = kind
    assert x is not None and y is not None
    places: dict[str, list[float]] = {}
    for row in _pointed(path, rows, [x, y]):
        if len(row.fields) != len(header.fields) or not row.fields[name]:
            raise fault(path, row.number, f"has {len(row.fields)} values, or no name", PLACES_REMEDY)
        position, problem = _position(row, [x, y], on_earth=on_earth)
        if problem:
            raise fault(path, row.number, problem, "a place needs a position")
        if row.fields[name] in places:
            raise fault(path, row.number, f"place {quoted(row.fields[name])} a second time", "list every place once")
        places[row.fields[name]] = position
    if not places:
        raise InstanceError(f"{path}: holds no place; {PLACES_REMEDY}")
    return PlaceTable(tuple(places), np.array(list(places.values())), on_earth)


class _Reader:
    """Reads rows one by one, and notes what is wrong with those that it leaves out."""

    def __init__(self, path: Path, width: int, cost: int, trip: int | None) -> None:
        self.path, self.width, self.cost, self.trip = path, width, cost, trip
        self.costs: list[float] = []
        self.trips: list[str] = []
        self.faults: list[str] = []

    def named(self, rows: list[Row], columns: list[int], table: PlaceTable) -> Int64[np.ndarray, "M 2"]:
        """The places of each good row."""
        numbers = {name: number for number, name in enumerate(table.names)}
        ends = []
        for row in _pointed(self.path, rows, [self.cost]):
            if len(row.fields) == self.width:
                found = [numbers.get(row.fields[index]) for index in columns]
                unknown = next((row.fields[index] for index in columns if row.fields[index] not in numbers), None)
                problem = None if unknown is None else f"there is no place {quoted(unknown)}"
            else:
                found, problem = [], None
            if self._takes(row, problem):
                ends.append(found)
        return np.array(ends, dtype=np.int64).reshape(-1, 2)

    def placed(self, rows: list[Row], columns: list[int], *, on_earth: bool) -> Float64[np.ndarray, "M 4"]:
        """The positions of both ends of each good row."""
        found = []
        for row in _pointed(self.path, rows, [*columns, self.cost]):
            ends: list[float] = []
            problem = None
            if len(row.fields) == self.width:
                for pair in (columns[:2], columns[2:]):
                    position, wrong = _position(row, pair, on_earth=on_earth)
                    ends, problem = ends + position, problem or wrong
            if self._takes(row, problem):
                found.append(ends)
        return np.array(found, dtype=np.float64).reshape(-1, 4)

    def _takes(self, row: Row, problem: str | None) -> bool:
        """Note cost and trip of a row whose ends are good, or else what is wrong with it."""
        if len(row.fields) != self.width:
            problem = f"has {len(row.fields)} values, and there are {self.width} columns"
        elif problem is None:
            cost = number_in(row.fields[self.cost])
            if cost is None or not 0 <= cost <= LARGEST_COORDINATE:
                problem = f"cost {quoted(row.fields[self.cost])} is no number from 0 to {LARGEST_COORDINATE:g}"
        if problem is not None:
            self.faults.append(f"{self.path}:{row.number}: {problem}")
            return False
        self.costs.append(float(row.fields[self.cost]))
        self.trips.append(str(len(self.trips)) if self.trip is None else row.fields[self.trip])
        return True

    def log(
        self,
        origin: Float64[np.ndarray, "M 2"],
        target: Float64[np.ndarray, "M 2"],
        *,
        on_earth: bool,
        table: PlaceTable | None = None,
        ends: Int64[np.ndarray, "M 2"] | None = None,
    ) -> Log:
        """All good rows."""
        _, trip = np.unique(np.array(self.trips, dtype=object).astype(str), return_inverse=True)
        costs = np.array(self.costs, dtype=np.float64)
        return Log(origin, target, costs, trip.astype(np.int64), on_earth, table, ends, tuple(self.faults))


def _table(path: Path, remedy: str) -> tuple[Row, list[Row]]:
    """The names of the columns, and the rows below them."""
    try:
        text = decode(read_bytes(path, most=LARGEST_LOG))
        rows = list(rows_of(path, text.replace("\r\n", "\n").replace("\r", "\n").split("\n")))
    except OSError as error:
        raise InstanceError(f"{path}: cannot be read ({error.strerror}); give the path of a table") from None
    except MemoryError:
        raise InstanceError(f"{path}: takes more memory to read than there is; give a smaller file") from None
    if not rows:
        raise InstanceError(f"{path}: holds nothing; {remedy}")
    return rows[0], rows[1:]


def _find(plain: Sequence[str], known: frozenset[str]) -> int | None:
    """The one column that is called like that; None where there is none, or several."""
    found = [index for index, name in enumerate(plain) if name in known]
    return found[0] if len(found) == 1 else None


def _position_columns(plain: Sequence[str]) -> list[tuple[list[int | None], bool]]:
    """The columns of both ends' positions, for each way to write them, and whether they are degrees."""
    ways = []
    for first, second, on_earth in POSITIONS:
        columns = [
            _find(plain, frozenset(word + axis for word in words for axis in axes))
            for words in (FROM, TO)
            for axes in (first, second)
        ]
        ways.append((columns, on_earth))
    return ways


def _pointed(path: Path, rows: list[Row], columns: Sequence[int]) -> list[Row]:
    """The rows with a point, and no commas, in the numbers of some columns."""
    numbers = [Row(row.number, [row.fields[index] for index in columns if index < len(row.fields)]) for row in rows]
    pointed = []
    for row, changed in zip(rows, with_points(path, numbers), strict=True):
        fields = list(row.fields)
        present = [index for index in columns if index < len(fields)]
        for index, field in zip(present, changed.fields, strict=True):
            fields[index] = field
        pointed.append(Row(row.number, fields))
    return pointed


def _position(row: Row, columns: Sequence[int], *, on_earth: bool) -> tuple[list[float], str | None]:
    """The two coordinates in columns of a row, and what is wrong with them."""
    position = []
    for index in columns:
        number = number_in(row.fields[index])
        if number is None or abs(number) > LARGEST_COORDINATE:
            return [], f"coordinate {quoted(row.fields[index])} is no number within +-{LARGEST_COORDINATE:g}"
        position.append(number)
    if on_earth and (abs(position[0]) > 180 or abs(position[1]) > 90):
        return [], f"no place on earth has longitude {position[0]:g} and latitude {position[1]:g}"
    return position, None


def _require_enough(path: Path, log: Log) -> None:
    """Check that there is something to learn from.

    Raises:
        UserError: most rows are bad, there are too few good ones, or all are of one trip.
    """
    good, bad = len(log.cost), len(log.faults)
    first = f"; the first: {log.faults[0]}" if bad else ""
    if bad > good:
        raise UserError(f"{path}: {bad:,} of {good + bad:,} rows cannot be used, so that nothing is learnt{first}")
    if good < LEAST_MOVES:
        raise UserError(f"{path}: has {good:,} good moves, and learning takes {LEAST_MOVES} at least{first}")
    if log.trip.max() == 0:
        raise UserError(f"{path}: all moves are of one trip, and some trips are held out; leave the column out")
