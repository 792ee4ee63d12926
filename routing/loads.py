"""What the columns of a table say of loads and times: a plan for vehicles instead of a tour."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from routing.metrics import EXACT
from routing.parsing import (
    LARGEST_COORDINATE,
    LARGEST_LOAD,
    RoutingInstance,
    Row,
    fault,
    number_in,
    quoted,
    whole_number_in,
)
from routing.windows import counted_from_opening

DEMAND, CAPACITY, READY, DUE, SERVICE = "demand", "capacity", "ready", "due", "service"
# Names of columns, without spaces and marks.
COLUMNS = {
    DEMAND: frozenset({"demand", "demands"}),
    CAPACITY: frozenset({"capacity"}),
    READY: frozenset({"ready", "readytime", "twstart"}),
    DUE: frozenset({"due", "duedate", "duetime", "twend"}),
    SERVICE: frozenset({"service", "servicetime"}),
}
LOADS_REMEDY = "columns demand and capacity are needed together, with ready and due (and service) for time windows"
CAPACITY_REMEDY = "the same whole number from 1 up is needed in each line, or in the depot's alone"


def with_loads(
    path: Path, header: Row | None, rows: list[Row], instance: RoutingInstance, *, plain: Callable[[str], str]
) -> RoutingInstance:
    """The instance with the demands, capacity and time windows that columns hold; as it is where there are none.

    Args:
        path: of the file.
        header: names of the columns; None where they have none.
        rows: of the nodes, the depot first.
        instance: their positions.
        plain: the name of a column without spaces and marks.

    Raises:
        InstanceError: they make no plan.
    """
    places = {} if header is None else _places(path, header, plain)
    if header is None or not places:
        return instance
    missing = [name for name in (DEMAND, CAPACITY) if name not in places]
    if not missing and places.keys() & {READY, DUE, SERVICE}:
        missing = [name for name in (READY, DUE) if name not in places]
    if missing:
        raise fault(path, header.number, f"has no column {missing[0]} beside {min(places)}", LOADS_REMEDY)
    capacity = _capacity(path, rows, places[CAPACITY])
    demand = [_demand(path, row, row.fields[places[DEMAND]], capacity) for row in rows]
    if demand[0]:
        raise fault(path, rows[0].number, f"the first node, the depot, has demand {demand[0]}", "it needs demand 0")
    amounts = np.array(demand, dtype=np.int64)
    instance = instance._replace(problem="cvrp", demand=amounts, capacity=capacity)
    if READY not in places:
        return instance
    if instance.metric != EXACT:
        remedy = "give x and y in units of time, such as minutes of driving"
        raise fault(path, header.number, "time windows beside degrees say nothing of how fast one drives", remedy)
    ready, due = (_times(path, rows, places[name]) for name in (READY, DUE))
    service = _times(path, rows, places[SERVICE]) if SERVICE in places else np.zeros(len(rows))
    if service[0]:
        raise fault(path, rows[0].number, f"the depot has a service time of {service[0]:g}", "it needs 0 there")
    instance = instance._replace(problem="vrptw", windows=counted_from_opening(ready, due, service))
    instance.require_served(path, called="customer", counted_from=0)
    return instance


def _places(path: Path, header: Row, plain: Callable[[str], str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for index, name in enumerate(header.fields):
        for column, names in COLUMNS.items():
            if plain(name) in names:
                if column in found:
                    raise fault(path, header.number, f"{quoted(name)} is a second column {column}", "remove one")
                found[column] = index
    return found


def _capacity(path: Path, rows: list[Row], place: int) -> int:
    written = [row.fields[place] for row in rows if row.fields[place] not in ("", "null")]
    capacity = whole_number_in(written[0]) if written else None
    if capacity is None or not 1 <= capacity <= LARGEST_LOAD:
        raise fault(path, rows[0].number, f"capacity {quoted(written[0] if written else '')}", CAPACITY_REMEDY)
    for row in rows:
        if row.fields[place] not in ("", "null") and whole_number_in(row.fields[place]) != capacity:
            cause = f"capacity {quoted(row.fields[place])} beside {capacity}"
            raise fault(path, row.number, cause, CAPACITY_REMEDY)
    return capacity


def _demand(path: Path, row: Row, field: str, capacity: int) -> int:
    amount = whole_number_in(field)
    if amount is None or not 0 <= amount <= LARGEST_LOAD:
        raise fault(path, row.number, f"demand {quoted(field)}", f"a whole number from 0 to {LARGEST_LOAD:g} is needed")
    if amount > capacity:
        raise fault(path, row.number, f"demand {amount} is above the capacity of {capacity}", "no vehicle can carry it")
    return amount


def _times(path: Path, rows: list[Row], place: int) -> Float64[np.ndarray, " N"]:
    found = []
    for row in rows:
        number = number_in(row.fields[place])
        if number is None or not 0 <= number <= LARGEST_COORDINATE:
            remedy = f"a number from 0 to {LARGEST_COORDINATE:g} is needed"
            raise fault(path, row.number, f"time {quoted(row.fields[place])}", remedy)
        found.append(number)
    return np.array(found)
