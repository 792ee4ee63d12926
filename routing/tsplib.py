"""Reads TSPLIB and CVRPLIB files as they are in the world: keywords in any case, and with more behind their values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64, Num

from routing.matrices import (
    COST_REMEDY,
    FULL,
    LAYOUTS,
    are_costs,
    as_costs,
    laid_out,
    layout_places,
    layout_size,
    numbers_in,
    without_positions,
)
from routing.metrics import EXACT, FILE_METRICS, GIVEN
from routing.parsing import (
    LARGEST_COORDINATE,
    LARGEST_LOAD,
    InstanceError,
    RoutingInstance,
    Row,
    check_on_earth,
    fault,
    number_in,
    position_in,
    quoted,
    whole_number_in,
    without_thousands,
)
from routing.windows import counted_from_opening

COORDS_REMEDY = "NODE_COORD_SECTION needs one line `number x y` for each of DIMENSION nodes"
DEEP_COORDS_REMEDY = "NODE_COORD_SECTION needs one line `number x y z` for each of DIMENSION nodes"
DEMAND_REMEDY = "DEMAND_SECTION needs one line `number demand` for each of DIMENSION nodes"
# The name of `EXACT` in these files.
EXACT_2D = "EXACT_2D"
# The one of costs that stand in a matrix.
EXPLICIT = "EXPLICIT"
METRICS_LISTED = ", ".join((*FILE_METRICS, EXACT_2D))
METRIC_REMEDY = f"coordinates with EDGE_WEIGHT_TYPE {METRICS_LISTED}, or a matrix with {EXPLICIT}, are needed"
LAYOUT_REMEDY = f"one of {', '.join(LAYOUTS)} is needed"
SECTIONS = {
    "TSP": ("NODE_COORD_SECTION", "DISPLAY_DATA_SECTION"),
    "ATSP": ("NODE_COORD_SECTION", "DISPLAY_DATA_SECTION"),
    "CVRP": ("NODE_COORD_SECTION", "DEMAND_SECTION", "DEPOT_SECTION", "DISPLAY_DATA_SECTION"),
}
SECTIONS["VRPTW"] = (*SECTIONS["CVRP"], "TIME_WINDOW_SECTION", "SERVICE_TIME_SECTION")
# Two names of one problem.
RENAMED = {"CVRPTW": "VRPTW"}
WINDOWS_REMEDY = "TIME_WINDOW_SECTION needs one line `number ready due` for each of DIMENSION nodes"
SERVICE_REMEDY = "SERVICE_TIME_SECTION needs one line `number time` for each of DIMENSION nodes, 0 for the depot"
MATRIX_SECTION = "EDGE_WEIGHT_SECTION"
# Keywords that stand without a colon in some files.
KEYWORDS = frozenset(
    {"NAME", "TYPE", "COMMENT", "DIMENSION", "CAPACITY", "VEHICLES", "DISTANCE", "SERVICE_TIME", "EDGE_WEIGHT_TYPE"}
    | {"EDGE_WEIGHT_FORMAT", "NODE_COORD_TYPE", "DISPLAY_DATA_TYPE"}
)
REFERENCE = re.compile(r"(?:optimal|best) value\s*:?\s*(\d[\d,]*(?:\.\d+)?(?:e\+?\d+)?)(?![\d.,]*\d)", re.IGNORECASE)


class _Text(NamedTuple):
    """A TSPLIB file in its parts: keyword -> line number and value, and section -> its line and its rows."""

    path: Path
    specification: dict[str, tuple[int, str]]
    sections: dict[str, tuple[int, list[Row]]]

    def fault(self, line: int, cause: str, remedy: str) -> InstanceError:
        return fault(self.path, line, cause, remedy)

    def value(self, keyword: str, remedy: str) -> tuple[int, str]:
        if keyword not in self.specification:
            raise InstanceError(f"{self.path}: has no {keyword}; {remedy}")
        return self.specification[keyword]

    def word(self, keyword: str, remedy: str) -> tuple[int, str]:
        """The first word of a value, in capitals: some files explain it behind."""
        line, value = self.value(keyword, remedy)
        return line, value.upper().split()[0] if value else ""

    def rows(self, section: str, remedy: str) -> tuple[int, list[Row]]:
        if section not in self.sections:
            raise InstanceError(f"{self.path}: has no {section}; {remedy}")
        return self.sections[section]


def read_tsplib(path: Path, lines: list[str]) -> RoutingInstance:
    """The instance of a TSPLIB or CVRPLIB file.

    Raises:
        InstanceError: it holds none, or one with constraints that cannot be kept.
    """
    # vrplib and tsplib95 give neither the line of a mistake nor (vrplib) the numbers of the nodes, without which a file
    # whose lines are out of order is another instance. So files are split here, and vrplib reads and writes solutions.
    text = _split(path, lines)
    line, problem = text.word("TYPE", "TYPE: TSP, ATSP, CVRP or VRPTW is needed")
    problem = RENAMED.get(problem, problem)
    if problem not in SECTIONS:
        raise text.fault(line, f"TYPE is {quoted(problem)}", "only TSP, ATSP, CVRP and VRPTW can be solved")
    line, metric = text.word("EDGE_WEIGHT_TYPE", METRIC_REMEDY)
    if metric not in (*FILE_METRICS, EXACT_2D, EXPLICIT):
        raise text.fault(line, f"EDGE_WEIGHT_TYPE is {quoted(metric)}", METRIC_REMEDY)
    if problem == "ATSP" and metric != EXPLICIT:
        remedy = "costs that depend on the direction stand in a matrix, with EXPLICIT"
        raise text.fault(line, f"EDGE_WEIGHT_TYPE is {quoted(metric)} of an ATSP", remedy)
    for section, (line, _) in text.sections.items():
        if section not in SECTIONS[problem] and (section, metric) != (MATRIX_SECTION, EXPLICIT):
            raise text.fault(line, f"{quoted(section)} cannot be taken into account", "remove it, and its constraint")
    dimension = _whole_value(text, "DIMENSION", least=1, most=LARGEST_COORDINATE)
    if metric == EXPLICIT:
        # Numbers of the matrix are counted before there is anything of DIMENSION.
        costs = _costs(text, dimension, problem)
        instance = RoutingInstance(path.stem, "tsp", _shown_at(text, dimension), GIVEN, costs=costs)
    else:
        coords = _coords(text, dimension, metric)
        instance = RoutingInstance(path.stem, "tsp", coords, EXACT if metric == EXACT_2D else metric)
    if problem not in ("CVRP", "VRPTW"):
        return instance
    instance = _with_loads(text, instance, metric)
    return _with_windows(text, instance) if problem == "VRPTW" else instance


def _with_loads(text: _Text, instance: RoutingInstance, metric: str) -> RoutingInstance:
    """A CVRP instance: positions or costs with vehicles, and what they carry."""
    capacity = _whole_value(text, "CAPACITY", least=0, most=LARGEST_LOAD)
    count = len(instance.coords)
    _check_route_limit(text, count, instance.longest_leg())
    demand = _demand(text, count, capacity)
    _check_depot(text)
    known = REFERENCE.search(text.specification.get("COMMENT", (0, ""))[1]) if metric in ("EUC_2D", EXPLICIT) else None
    return instance._replace(
        problem="cvrp",
        demand=demand,
        capacity=capacity,
        reference=number_in(without_thousands(known[1].rstrip(","))) if known else None,
        vehicles=_vehicles(text, customers=count - 1),
    )


def _with_windows(text: _Text, instance: RoutingInstance) -> RoutingInstance:
    """A VRPTW instance: driving takes as long as legs are, or as the matrix says."""
    count = len(instance.coords)
    rows = _numbered(text, "TIME_WINDOW_SECTION", count, columns=2, remedy=WINDOWS_REMEDY)
    ready, due = np.array([[_time(text, row, field) for field in row.fields[1:]] for row in rows]).T
    if "SERVICE_TIME_SECTION" in text.sections:
        rows = _numbered(text, "SERVICE_TIME_SECTION", count, columns=1, remedy=SERVICE_REMEDY)
        service = np.array([_time(text, row, row.fields[1]) for row in rows])
        if service[0]:
            raise text.fault(rows[0].number, f"the depot has a service time of {service[0]:g}", "it needs 0 there")
    else:
        line, value = text.specification.get("SERVICE_TIME", (0, "0"))
        service = np.full(count, _time(text, Row(line, []), value))
        service[0] = 0.0
    windows = counted_from_opening(ready, due, service)
    # What its comment calls the best was found by other rules of rounding.
    instance = instance._replace(problem="vrptw", windows=windows, reference=None)
    instance.require_served(text.path, called="node", counted_from=1)
    return instance


def _time(text: _Text, row: Row, field: str) -> float:
    number = number_in(field)
    if number is None or not 0 <= number <= LARGEST_COORDINATE:
        remedy = f"a number from 0 to {LARGEST_COORDINATE:g} is needed"
        raise text.fault(row.number, f"time {quoted(field)}", remedy)
    return number


def _split(path: Path, lines: list[str]) -> _Text:
    text = _Text(path, {}, {})
    rows: list[Row] | None = None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        keyword, value = _keyword(line)
        if keyword == "EOF":
            break
        if not keyword:
            if rows is None:
                cause = f"{quoted(line.strip())} is no `KEYWORD: value`"
                raise text.fault(number, cause, "a TSPLIB or CVRPLIB file is needed")
            rows.append(Row(number, line.split()))
        elif keyword == "COMMENT" and keyword in text.specification:
            first, before = text.specification[keyword]
            text.specification[keyword] = first, f"{before} {value}"
        elif keyword in text.sections or keyword in text.specification:
            raise text.fault(number, f"{quoted(keyword)} is given twice", "remove one of them")
        elif keyword.endswith("_SECTION"):
            rows = []
            text.sections[keyword] = (number, rows)
        else:
            text.specification[keyword] = (number, value)
            rows = None
    return text


def _keyword(line: str) -> tuple[str, str]:
    """The keyword of a line in capitals, and its value; empty where the line has none."""
    keyword, colon, value = (part.strip() for part in line.partition(":"))
    if colon and re.fullmatch("[A-Za-z_]+", keyword):
        return keyword.upper(), value
    word, value = [*line.split(maxsplit=1), ""][:2]
    word = word.upper()
    alone = not value and (word == "EOF" or word.endswith("_SECTION"))
    return (word, value.strip()) if alone or (value and word in KEYWORDS) else ("", "")


def _whole_value(text: _Text, keyword: str, *, least: int, most: float) -> int:
    remedy = f"a whole number from {least} to {most:g} is needed"
    line, value = text.value(keyword, remedy)
    number = whole_number_in(value)
    if number is None or not least <= number <= most:
        raise text.fault(line, f"{keyword} is {quoted(value)}", remedy)
    return number


def _numbered(text: _Text, section: str, dimension: int, *, columns: int, remedy: str) -> list[Row]:
    """The rows of a section in the order of their nodes, each of `columns` fields behind the node's number."""
    section_line, rows = text.rows(section, remedy)
    placed: dict[int, Row] = {}
    for row in rows:
        if len(row.fields) != columns + 1:
            raise text.fault(row.number, f"{section} has a line of {len(row.fields)} fields", remedy)
        node = whole_number_in(row.fields[0])
        if node is None or not 1 <= node <= dimension:
            cause = f"node number {quoted(row.fields[0])} in {section}, and DIMENSION is {dimension}"
            raise text.fault(row.number, cause, remedy)
        if node in placed:
            raise text.fault(row.number, f"node {node} stands in line {placed[node].number} already", remedy)
        placed[node] = row
    if len(placed) != dimension:
        last = rows[-1].number if rows else section_line
        cause = f"{section} ends after {len(placed)} nodes, and DIMENSION is {dimension}"
        raise text.fault(last, cause, remedy)
    return [placed[node] for node in range(1, dimension + 1)]


def _coords(text: _Text, dimension: int, metric: str) -> Float64[np.ndarray, "N D"]:
    deep = metric.endswith("_3D")
    remedy = DEEP_COORDS_REMEDY if deep else COORDS_REMEDY
    # This is checked before anything of that size is made: a mistyped DIMENSION must not fill the memory.
    rows = _numbered(text, "NODE_COORD_SECTION", dimension, columns=3 if deep else 2, remedy=remedy)
    coords = np.array([position_in(text.path, row, row.fields[1:]) for row in rows])
    if metric == "GEO":
        for row, (latitude, longitude) in zip(rows, coords.tolist(), strict=True):
            check_on_earth(text.path, row.number, latitude, longitude, remedy="GEO takes degrees and minutes as DDD.MM")
    return coords


def _costs(text: _Text, dimension: int, problem: str) -> Num[np.ndarray, "N N"]:
    """The matrix of an EDGE_WEIGHT_SECTION, whose numbers may be broken into lines anywhere."""
    layout = FULL
    if problem != "ATSP" or "EDGE_WEIGHT_FORMAT" in text.specification:
        line, layout = text.word("EDGE_WEIGHT_FORMAT", LAYOUT_REMEDY)
        if layout not in LAYOUTS:
            raise text.fault(line, f"EDGE_WEIGHT_FORMAT is {quoted(layout)}", LAYOUT_REMEDY)
        if problem == "ATSP" and layout != FULL:
            raise text.fault(line, f"EDGE_WEIGHT_FORMAT is {quoted(layout)} of an ATSP", f"it needs {FULL}")
    needed = layout_size(layout, dimension)
    section_line, rows = text.rows(MATRIX_SECTION, f"it needs the {needed:,} numbers of a {layout}")
    fields = [field for row in rows for field in row.fields]
    if len(fields) != needed:
        last = rows[-1].number if rows else section_line
        cause = f"{MATRIX_SECTION} holds {len(fields):,} numbers"
        raise text.fault(last, cause, f"{layout} of {dimension:,} nodes needs {needed:,}")
    numbers = numbers_in(fields)
    impossible = ~are_costs(numbers)
    if impossible.any():
        origins, targets = layout_places(layout, dimension)
        for place in np.flatnonzero(impossible & (origins != targets)).tolist():
            ends = np.cumsum([len(row.fields) for row in rows])
            line = rows[int(np.searchsorted(ends, place, side="right"))].number
            cause = f"cost {quoted(fields[place])} from node {origins[place] + 1} to node {targets[place] + 1}"
            raise text.fault(line, cause, COST_REMEDY)
    return as_costs(laid_out(numbers, layout, dimension))


def _shown_at(text: _Text, dimension: int) -> Float64[np.ndarray, "N D"]:
    """Where a picture shows the nodes of a matrix, if the file says so."""
    section = next((name for name in ("DISPLAY_DATA_SECTION", "NODE_COORD_SECTION") if name in text.sections), None)
    if section is None:
        return without_positions(dimension)
    _, rows = text.sections[section]
    columns = 3 if rows and len(rows[0].fields) == 4 else 2
    remedy = f"{section} needs one line `number x y` for each of DIMENSION nodes"
    numbered = _numbered(text, section, dimension, columns=columns, remedy=remedy)
    return np.array([position_in(text.path, row, row.fields[1:]) for row in numbered])


def _check_route_limit(text: _Text, num_nodes: int, longest_leg: float) -> None:
    """Check that no route can be as long as DISTANCE, service of each customer included.

    Raises:
        InstanceError: one can.
    """
    remedy = "a number from 0 up is needed"
    limits = {}
    for keyword in ("DISTANCE", "SERVICE_TIME"):
        if keyword in text.specification:
            line, value = text.specification[keyword]
            number = number_in(without_thousands(value))
            if number is None or number < 0:
                raise text.fault(line, f"{keyword} is {quoted(value)}", remedy)
            limits[keyword] = number
    if "DISTANCE" not in limits:
        # Service that no limit counts costs nothing.
        return
    longest = num_nodes * (longest_leg + limits.get("SERVICE_TIME", 0.0))
    if limits["DISTANCE"] < longest:
        cause = f"DISTANCE limits the routes to {limits['DISTANCE']:g}, and one could have {longest:g}"
        raise text.fault(text.specification["DISTANCE"][0], cause, "only capacity can be taken into account")


def _vehicles(text: _Text, *, customers: int) -> int | None:
    """How many routes there may be; None where a route for each customer is allowed."""
    if "VEHICLES" not in text.specification:
        return None
    number = _whole_value(text, "VEHICLES", least=1, most=LARGEST_LOAD)
    return number if number < customers else None


def _demand(text: _Text, dimension: int, capacity: int) -> Int64[np.ndarray, " N"]:
    demand: list[int] = []
    for row in _numbered(text, "DEMAND_SECTION", dimension, columns=1, remedy=DEMAND_REMEDY):
        amount = whole_number_in(row.fields[1])
        if amount is None or not 0 <= amount <= LARGEST_LOAD:
            remedy = f"a whole number from 0 to {LARGEST_LOAD:g} is needed"
            raise text.fault(row.number, f"demand {quoted(row.fields[1])}", remedy)
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
    if len(depots) != 1 or whole_number_in(depots[0][1]) != 1:
        line = depots[-1][0] if depots else line
        found = ", ".join(field for _, field in depots[:5]) or "nothing"
        raise text.fault(line, f"DEPOT_SECTION holds {quoted(found)}", remedy)
