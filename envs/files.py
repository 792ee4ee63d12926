"""Reads routing instances from files: TSPLIB, CVRPLIB, CSV and NumPy arrays.

Whatever is wrong with a file is an `InstanceError`: one line with the file, the line, the cause and what would do.
"""

from __future__ import annotations

import io
import os
import re
import struct
import tokenize
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from config import UserError
from envs.metrics import EXACT, FILE_METRICS

# Squares, and sums of a million legs, stay exact enough in float64 to be rounded to whole numbers.
LARGEST_COORDINATE = 1e12
# The rules count loads in 32 bits.
LARGEST_LOAD = 1e9

COORDS_REMEDY = "NODE_COORD_SECTION needs one line `number x y` for each of DIMENSION nodes"
DEMAND_REMEDY = "DEMAND_SECTION needs one line `number demand` for each of DIMENSION nodes"
METRIC_REMEDY = f"coordinates with EDGE_WEIGHT_TYPE {', '.join(FILE_METRICS)} are needed"
# Constraints that would be broken without a word, where a file holds them.
CONSTRAINTS = ("DISTANCE", "SERVICE_TIME", "VEHICLES")
SECTIONS = {
    "TSP": ("NODE_COORD_SECTION", "DISPLAY_DATA_SECTION"),
    "CVRP": ("NODE_COORD_SECTION", "DEMAND_SECTION", "DEPOT_SECTION", "DISPLAY_DATA_SECTION"),
}
# What numpy and zipfile raise on bytes that are no array.
ARRAY_ERRORS = (
    *(ValueError, TypeError, OSError, EOFError, LookupError, MemoryError, OverflowError, RuntimeError, AttributeError),
    *(zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError, SyntaxError),
)


class InstanceError(UserError):
    """An instance file that cannot be used: one line with the file, the cause and what would do."""


class RoutingInstance(NamedTuple):
    """One problem to be solved, as a user has it.

    Attributes:
        name: the file's name without its suffix, with its place in a batch.
        problem: `tsp` or `cvrp`, as in `envs.routing.RULES`.
        coords: positions in the file's own unit; node 0 is the start or the depot.
        metric: one of `envs.metrics`.
        demand: of each node, 0 at the depot; None for a TSP.
        capacity: of each vehicle; None for a TSP.
        reference: length of the best solution that the file itself tells of; None where it tells of none.
    """

    name: str
    problem: str
    coords: Float64[np.ndarray, "N 2"]
    metric: str
    demand: Int64[np.ndarray, " N"] | None = None
    capacity: int | None = None
    reference: float | None = None


def read_instances(path: str | os.PathLike) -> list[RoutingInstance]:
    """Every instance in a file, which its suffix describes.

    `.csv` has a line `x,y` for each node; `.npy` an array [N, 2] or [I, N, 2]; `.npz` a batch: `coords` [I, N, 2] and,
    for CVRP, `demand` [I, N] and `capacity` [I] or a number. Anything else is read as TSPLIB or CVRPLIB.

    Raises:
        InstanceError: the file cannot be read, or holds no instance that can be solved.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InstanceError(f"{path}: cannot be read ({error.strerror}); give the path of an instance file") from None
    if path.suffix.lower() in (".npy", ".npz"):
        return _read_arrays(path, content)
    # Comments of old files are in any encoding, and nothing that counts lies outside ASCII.
    lines = content.decode("utf-8", errors="replace").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if path.suffix.lower() == ".csv":
        return [_read_csv(path, lines)]
    return [_read_tsplib(path, lines)]


class _Row(NamedTuple):
    """A line of data, split into its fields."""

    number: int
    fields: list[str]


class _Text(NamedTuple):
    """A TSPLIB file in its parts: keyword -> line number and value, and section -> its line and its rows."""

    path: Path
    specification: dict[str, tuple[int, str]]
    sections: dict[str, tuple[int, list[_Row]]]

    def fault(self, line: int, cause: str, remedy: str) -> InstanceError:
        return _fault(self.path, line, cause, remedy)

    def value(self, keyword: str, remedy: str) -> tuple[int, str]:
        if keyword not in self.specification:
            raise InstanceError(f"{self.path}: has no {keyword}; {remedy}")
        return self.specification[keyword]

    def rows(self, section: str, remedy: str) -> tuple[int, list[_Row]]:
        if section not in self.sections:
            raise InstanceError(f"{self.path}: has no {section}; {remedy}")
        return self.sections[section]


def _fault(path: Path, line: int, cause: str, remedy: str) -> InstanceError:
    return InstanceError(f"{path}:{line}: {cause}; {remedy}")


def _quoted(text: str) -> str:
    """Text of a file as a message can hold it: short, on one line."""
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _read_tsplib(path: Path, lines: list[str]) -> RoutingInstance:
    # vrplib and tsplib95 give neither the line of a mistake nor (vrplib) the numbers of the nodes, without which a file
    # whose lines are out of order is another instance. So files are split here, and vrplib reads and writes solutions.
    text = _split(path, lines)
    line, problem = text.value("TYPE", "TYPE: TSP or TYPE: CVRP is needed")
    if problem not in SECTIONS:
        raise text.fault(line, f"TYPE is {_quoted(problem)}", "only TSP and CVRP can be solved")
    metric_line, metric = text.value("EDGE_WEIGHT_TYPE", METRIC_REMEDY)
    if metric not in FILE_METRICS:
        raise text.fault(metric_line, f"EDGE_WEIGHT_TYPE is {_quoted(metric)}", METRIC_REMEDY)
    for section, (line, _) in text.sections.items():
        if section not in SECTIONS[problem]:
            raise text.fault(line, f"{_quoted(section)} cannot be taken into account", "remove it, and its constraint")
    _, dimension = _whole_value(text, "DIMENSION", least=1, most=LARGEST_COORDINATE)
    coords = _coords(text, dimension, metric)
    if problem == "TSP":
        return RoutingInstance(name=path.stem, problem="tsp", coords=coords, metric=metric)
    for keyword in CONSTRAINTS:
        if keyword in text.specification:
            line = text.specification[keyword][0]
            raise text.fault(line, f"{keyword} limits the routes", "only capacity can be taken into account")
    _, capacity = _whole_value(text, "CAPACITY", least=0, most=LARGEST_LOAD)
    demand = _demand(text, dimension, capacity)
    _check_depot(text)
    comment = text.specification.get("COMMENT", (0, ""))[1]
    known = re.search(r"(?:optimal|best) value:?\s*(\d+(?:\.\d+)?)", comment, re.IGNORECASE)
    return RoutingInstance(
        name=path.stem,
        problem="cvrp",
        coords=coords,
        metric=metric,
        demand=demand,
        capacity=capacity,
        reference=float(known[1]) if known and metric == "EUC_2D" else None,
    )


def _split(path: Path, lines: list[str]) -> _Text:
    text = _Text(path, {}, {})
    rows: list[_Row] | None = None
    for number, line in enumerate(lines, start=1):
        keyword, colon, value = (part.strip() for part in line.partition(":"))
        if not line.strip():
            continue
        if keyword == "EOF":
            break
        is_section = keyword.endswith("_SECTION")
        if is_section or (colon and re.fullmatch("[A-Za-z_]+", keyword)):
            if keyword in text.sections or keyword in text.specification:
                raise text.fault(number, f"{_quoted(keyword)} is given twice", "remove one of them")
            if is_section:
                rows = []
                text.sections[keyword] = (number, rows)
            else:
                text.specification[keyword] = (number, value)
                rows = None
        elif rows is None:
            raise text.fault(
                number, f"{_quoted(line.strip())} is no `KEYWORD: value`", "a TSPLIB or CVRPLIB file is needed"
            )
        else:
            rows.append(_Row(number, line.split()))
    return text


def _whole_value(text: _Text, keyword: str, *, least: int, most: float) -> tuple[int, int]:
    remedy = f"a whole number from {least} to {most:g} is needed"
    line, value = text.value(keyword, remedy)
    number = _whole(value)
    if number is None or not least <= number <= most:
        raise text.fault(line, f"{keyword} is {_quoted(value)}", remedy)
    return line, number


def _whole(field: str) -> int | None:
    """A whole number, also where it is written as 12.0; None where the text is no such number."""
    number = _number(field)
    if number is None or not number.is_integer() or abs(number) > LARGEST_COORDINATE:
        return None
    return int(number)


def _number(field: str) -> float | None:
    """A finite number; None where the text is none."""
    # Python's own reading takes digits of every script and underscores between them.
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", field, re.ASCII):
        return None
    number = float(field)
    return number if np.isfinite(number) else None


def _numbered(text: _Text, section: str, dimension: int, *, columns: int, remedy: str) -> list[_Row]:
    """The rows of a section in the order of their nodes, each of `columns` fields behind the node's number."""
    section_line, rows = text.rows(section, remedy)
    placed: dict[int, _Row] = {}
    for row in rows:
        if len(row.fields) != columns + 1:
            raise text.fault(row.number, f"{section} has a line of {len(row.fields)} fields", remedy)
        node = _whole(row.fields[0])
        if node is None or not 1 <= node <= dimension:
            cause = f"node number {_quoted(row.fields[0])} in {section}, and DIMENSION is {dimension}"
            raise text.fault(row.number, cause, remedy)
        if node in placed:
            raise text.fault(row.number, f"node {node} stands in line {placed[node].number} already", remedy)
        placed[node] = row
    if len(placed) != dimension:
        last = rows[-1].number if rows else section_line
        cause = f"{section} ends after {len(placed)} nodes, and DIMENSION is {dimension}"
        raise text.fault(last, cause, remedy)
    return [placed[node] for node in range(1, dimension + 1)]


def _coords(text: _Text, dimension: int, metric: str) -> Float64[np.ndarray, "N 2"]:
    # Looked at before anything is made of that size: a mistyped DIMENSION must not fill the memory.
    rows = _numbered(text, "NODE_COORD_SECTION", dimension, columns=2, remedy=COORDS_REMEDY)
    coords = np.array([_position(text.path, row, row.fields[1:]) for row in rows])
    if metric == "GEO":
        for row, (latitude, longitude) in zip(rows, coords, strict=True):
            if abs(latitude) > 90 or abs(longitude) > 180:
                cause = f"no place on earth has latitude {latitude:g} and longitude {longitude:g}"
                raise text.fault(row.number, cause, "GEO takes degrees and minutes as DDD.MM")
    return coords


def _position(path: Path, row: _Row, fields: list[str]) -> list[float]:
    position = [_number(field) for field in fields]
    for field, number in zip(fields, position, strict=True):
        if number is None or abs(number) > LARGEST_COORDINATE:
            remedy = f"a number within +-{LARGEST_COORDINATE:g} is needed"
            raise _fault(path, row.number, f"coordinate {_quoted(field)}", remedy)
    return [number for number in position if number is not None]


def _demand(text: _Text, dimension: int, capacity: int) -> Int64[np.ndarray, " N"]:
    demand: list[int] = []
    for row in _numbered(text, "DEMAND_SECTION", dimension, columns=1, remedy=DEMAND_REMEDY):
        amount = _whole(row.fields[1])
        if amount is None or not 0 <= amount <= LARGEST_LOAD:
            remedy = f"a whole number from 0 to {LARGEST_LOAD:g} is needed"
            raise text.fault(row.number, f"demand {_quoted(row.fields[1])}", remedy)
        if not demand and amount:
            raise text.fault(row.number, f"the depot, node 1, has demand {amount}", "it needs demand 0")
        if amount > capacity:
            raise text.fault(row.number, f"demand {amount} is above CAPACITY {capacity}", "no vehicle can carry it")
        demand.append(amount)
    return np.array(demand, dtype=np.int64)


def _check_depot(text: _Text) -> None:
    remedy = "DEPOT_SECTION needs node 1 and then -1"
    line, rows = text.rows("DEPOT_SECTION", remedy)
    depots = [(row.number, field) for row in rows for field in row.fields]
    # A few files leave the closing -1 out.
    if depots and depots[-1][1] == "-1":
        depots.pop()
    if len(depots) != 1 or _whole(depots[0][1]) != 1:
        line = depots[-1][0] if depots else line
        found = ", ".join(field for _, field in depots[:5]) or "nothing"
        raise text.fault(line, f"DEPOT_SECTION holds {_quoted(found)}", remedy)


def _read_csv(path: Path, lines: list[str]) -> RoutingInstance:
    remedy = "a CSV file needs one line `x,y` for each node"
    positions: list[list[float]] = []
    begun = False
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        fields = re.split(r"\s*[,;]\s*|\s+", line.strip().removeprefix("\ufeff"))
        if len(fields) != 2:
            raise _fault(path, number, f"has {len(fields)} values", remedy)
        is_header = not begun and all(_number(field) is None for field in fields)
        begun = True
        if not is_header:
            positions.append(_position(path, _Row(number, fields), fields))
    if not positions:
        raise InstanceError(f"{path}: holds no node; {remedy}")
    return RoutingInstance(name=path.stem, problem="tsp", coords=np.array(positions), metric=EXACT)


def _read_arrays(path: Path, content: bytes) -> list[RoutingInstance]:
    try:
        with warnings.catch_warnings():
            # numpy warns of a header that it mends, and numbers that are wrong then are refused below.
            warnings.simplefilter("ignore")
            loaded = np.load(io.BytesIO(content), allow_pickle=False)
            arrays = dict(loaded) if isinstance(loaded, np.lib.npyio.NpzFile) else {"coords": loaded}
    except ARRAY_ERRORS as error:
        cause = " ".join(str(error).split())[:100]
        raise InstanceError(f"{path}: is no NumPy file of numbers ({cause}); numpy.save and savez write them") from None
    unknown = arrays.keys() - {"coords", "demand", "capacity"}
    if unknown or "coords" not in arrays or ("demand" in arrays) != ("capacity" in arrays):
        found = _quoted(", ".join(sorted(arrays)))
        raise InstanceError(
            f"{path}: holds {found}; `coords` [I, N, 2] is needed, with `demand` [I, N] and `capacity` [I] for CVRP"
        )
    coords = _number_array(path, "coords", arrays["coords"], largest=LARGEST_COORDINATE)
    several = coords.ndim == 3
    coords = coords if several else coords[None]
    if coords.ndim != 3 or coords.shape[-1] != 2 or coords.size == 0:
        raise InstanceError(
            f"{path}: coords has shape {arrays['coords'].shape}; [N, 2], or [I, N, 2] for a batch, is needed"
        )
    width = len(str(len(coords) - 1))
    names = [f"{path.stem}-{index:0{width}}" if several else path.stem for index in range(len(coords))]
    if "demand" not in arrays:
        return [RoutingInstance(name, "tsp", nodes, EXACT) for name, nodes in zip(names, coords, strict=True)]
    demand, capacity = _loads(path, arrays, coords.shape[:2])
    return [
        RoutingInstance(name, "cvrp", nodes, EXACT, amounts, int(most))
        for name, nodes, amounts, most in zip(names, coords, demand, capacity, strict=True)
    ]


def _number_array(path: Path, name: str, array: np.ndarray, *, largest: float) -> np.ndarray:
    if array.dtype.kind not in "iuf":
        raise InstanceError(f"{path}: {name} is of type {array.dtype}; an array of numbers is needed")
    array = array.astype(np.float64)
    # Written so that NaN is refused too.
    impossible = np.argwhere(~(np.abs(array) <= largest))
    if len(impossible):
        place = tuple(int(index) for index in impossible[0])
        raise InstanceError(f"{path}: {name}{list(place)} is {array[place]}; numbers within +-{largest:g} are needed")
    return array


def _loads(
    path: Path, arrays: dict[str, np.ndarray], shape: tuple[int, ...]
) -> tuple[Int64[np.ndarray, "I N"], Int64[np.ndarray, " I"]]:
    """Demands and capacities of a batch."""
    demand = _number_array(path, "demand", arrays["demand"], largest=LARGEST_LOAD)
    capacity = _number_array(path, "capacity", arrays["capacity"], largest=LARGEST_LOAD)
    demand = demand[None] if demand.ndim == 1 and shape[0] == 1 else demand
    if demand.shape != shape or capacity.size not in (1, shape[0]) or capacity.ndim > 1:
        raise InstanceError(
            f"{path}: demand has shape {demand.shape} and capacity {capacity.shape} beside coords of {shape[0]}"
            f" instances with {shape[1]} nodes; [I, N] and [I], or one capacity for all, are needed"
        )
    capacity = np.broadcast_to(capacity.reshape(-1), (shape[0],))
    for faulty, cause in (
        (demand[:, 0:1] != 0, "has a demand at its depot, node 0; it needs 0 there"),
        ((demand < 0) | (demand != np.floor(demand)), "has a demand that is negative or no whole number"),
        ((capacity < 0) | (capacity != np.floor(capacity)), "has a capacity that is negative or no whole number"),
        (demand > capacity[:, None], "has a demand above its capacity; no vehicle can carry it"),
    ):
        if faulty.any():
            raise InstanceError(f"{path}: instance {int(np.argwhere(faulty)[0, 0])} {cause}")
    return demand.astype(np.int64), capacity.astype(np.int64)
