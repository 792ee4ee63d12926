"""Reads the text form of Solomon's instances, and of Gehring's and Homberger's: vehicles, then a table of customers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from routing.metrics import EXACT
from routing.parsing import (
    LARGEST_COORDINATE,
    LARGEST_LOAD,
    RoutingInstance,
    Row,
    fault,
    number_in,
    position_in,
    quoted,
    whole_number_in,
)
from routing.windows import counted_from_opening

VEHICLES_REMEDY = "below VEHICLE and NUMBER CAPACITY a line of two whole numbers from 1 up is needed"
TABLE_REMEDY = (
    "below CUSTOMER a line `number x y demand ready due service` for each is needed, the depot first, as number 0"
)
COLUMNS = 7
# In the order of the columns, behind number and position.
DEMAND, TIMES = 3, (4, 5, 6)
NAMES = ("ready time", "due date", "service time")


def is_solomon(text: str) -> bool:
    """Whether a file is in this form: lines VEHICLE and CUSTOMER, each alone."""
    return all(re.search(rf"^\s*{word}\s*$", text, re.MULTILINE | re.IGNORECASE) for word in ("VEHICLE", "CUSTOMER"))


def read_solomon(path: Path, lines: list[str]) -> RoutingInstance:
    """The instance of such a file. Distances are Euclidean and unrounded, and driving takes as long as they are.

    Raises:
        InstanceError: it holds none, or one that no plan can serve.
    """
    rows = [Row(number, line.split()) for number, line in enumerate(lines, start=1) if line.strip()]
    words = [" ".join(row.fields).upper() for row in rows]
    vehicle, customer = words.index("VEHICLE"), words.index("CUSTOMER")
    vehicles, capacity = _fleet(path, rows, vehicle, customer)
    table = list(_table(path, rows[customer + 1 :]))
    if not table:
        raise fault(path, rows[customer].number, "no node stands in the table", TABLE_REMEDY)
    coords = np.array([position_in(path, row, row.fields[1:3]) for row in table])
    times = [np.array([_time(path, row, column) for row in table]) for column in TIMES]
    if times[2][0]:
        raise fault(path, table[0].number, f"the depot has a service time of {times[2][0]:g}", "it needs 0 there")
    demand = [_demand(path, row, capacity) for row in table]
    instance = RoutingInstance(
        name=path.stem,
        problem="vrptw",
        coords=coords,
        metric=EXACT,
        demand=np.array(demand, dtype=np.int64),
        capacity=capacity,
        vehicles=vehicles if vehicles < len(table) - 1 else None,
        windows=counted_from_opening(times[0], times[1], times[2]),
    )
    instance.require_served(path, called="customer", counted_from=0)
    return instance


def _fleet(path: Path, rows: list[Row], vehicle: int, customer: int) -> tuple[int, int]:
    """How many vehicles there are, and what each carries."""
    numbers = [row for row in rows[vehicle + 1 : customer] if number_in(row.fields[0]) is not None]
    if len(numbers) != 1 or len(numbers[0].fields) != 2:
        raise fault(path, rows[vehicle].number, f"{len(numbers)} lines of numbers for the vehicles", VEHICLES_REMEDY)
    found = [whole_number_in(field) for field in numbers[0].fields]
    for number, field in zip(found, numbers[0].fields, strict=True):
        if number is None or not 1 <= number <= LARGEST_LOAD:
            raise fault(path, numbers[0].number, f"{quoted(field)} for the vehicles", VEHICLES_REMEDY)
    count, capacity = found
    assert count is not None and capacity is not None, "checked above"
    return count, capacity


def _table(path: Path, rows: list[Row]) -> Iterator[Row]:
    """The lines of the table, in the order of their numbers, below its heads."""
    number = 0
    for row in rows:
        if not number and number_in(row.fields[0]) is None:
            # Heads may take two lines.
            continue
        if len(row.fields) != COLUMNS:
            raise fault(path, row.number, f"has {len(row.fields)} values", TABLE_REMEDY)
        if whole_number_in(row.fields[0]) != number:
            raise fault(path, row.number, f"number {quoted(row.fields[0])} where {number} comes next", TABLE_REMEDY)
        number += 1
        yield row


def _time(path: Path, row: Row, column: int) -> float:
    field, name = row.fields[column], NAMES[column - TIMES[0]]
    number = number_in(field)
    if number is None or not 0 <= number <= LARGEST_COORDINATE:
        raise fault(path, row.number, f"{name} {quoted(field)}", f"a number from 0 to {LARGEST_COORDINATE:g} is needed")
    return number


def _demand(path: Path, row: Row, capacity: int) -> int:
    field = row.fields[DEMAND]
    amount = whole_number_in(field)
    if amount is None or not 0 <= amount <= LARGEST_LOAD:
        raise fault(path, row.number, f"demand {quoted(field)}", f"a whole number from 0 to {LARGEST_LOAD:g} is needed")
    if amount and row.fields[0] == "0":
        raise fault(path, row.number, f"the depot has demand {amount}", "it needs demand 0")
    if amount > capacity:
        raise fault(path, row.number, f"demand {amount} is above the capacity of {capacity}", "no vehicle can carry it")
    return amount
