"""Reads square tables of costs, as spreadsheets and data frames write them: with names above and beside, or without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float64

from routing.matrices import COST_REMEDY, as_costs, impossible_cost, numbers_in, without_positions
from routing.metrics import GIVEN
from routing.parsing import RoutingInstance, Row, fault, number_in, quoted, whole_number_in

# Two places in two columns are positions.
FEWEST_NODES = 3
# What stands from a place to itself where that is no number, besides nothing at all.
NO_WAY = frozenset({"-", "--", "x", "inf", "infinity", "nan", "na", "n/a", "none", "null", "∞"})


def read_square(path: Path, rows: list[Row], *, are_positions: bool) -> RoutingInstance | None:
    """The instance whose costs fill a square table, rows from and columns to; None where this is no such table.

    Args:
        path: of the file.
        rows: all of it, each of as many fields.
        are_positions: names of columns, or two of three columns behind a number or a name, say where nodes are. Then
            only the same names above and beside make it a matrix.

    Raises:
        InstanceError: it is one, of costs that cannot be.
    """
    count, columns = len(rows), len(rows[0].fields)
    if columns - count not in (-1, 0, 1):
        return None
    named_above = count > columns or (count == columns and _names_both(rows))
    named_beside = columns > count or (count == columns and named_above)
    names = rows[0].fields[int(named_beside) :] if named_above else []
    body = rows[int(named_above) :]
    labels = [row.fields[0] for row in body] if named_beside else []
    fields = [row.fields[int(named_beside) :] for row in body]
    if len(fields) < FEWEST_NODES:
        return None
    matrix = numbers_in([field for each in fields for field in each]).reshape(len(fields), len(fields))
    # A column of words is no column of costs.
    if np.isnan(matrix).all(0).any():
        return None
    if not (names and names == labels) and (are_positions or not _tells(names, labels, matrix.diagonal())):
        return None
    if names != labels and sorted(names) == sorted(labels):
        cause = "rows and columns of costs have the same names in another order"
        raise fault(path, rows[0].number, cause, "put them in the same order")
    _check(path, body, fields, matrix)
    costs = as_costs(matrix)
    return RoutingInstance(path.stem, "tsp", without_positions(len(costs)), GIVEN, costs=costs)


def _names_both(rows: list[Row]) -> bool:
    """Whether a table with as many rows as columns has names above and beside its numbers."""
    (corner, *above), beside = rows[0].fields, [row.fields[0] for row in rows[1:]]
    if number_in(corner) is not None or corner.lower() in NO_WAY:
        return False
    return above == beside or all(number_in(name) is None for name in above)


def _tells(names: list[str], labels: list[str], diagonal: Float64[np.ndarray, " N"]) -> bool:
    """Whether a table with other names above than beside, or without names on a side, looks like one of costs."""
    if not names and not labels:
        return True
    # What people write from a place to itself is the same everywhere; in a table of anything else that is chance.
    same = np.isnan(diagonal).all() or (diagonal == diagonal[0]).all()
    return bool(same) and all(_are_names(each) for each in (names, labels) if each)


def _are_names(names: list[str]) -> bool:
    numbers = [whole_number_in(name) for name in names]
    counted = any(numbers == list(range(begin, begin + len(names))) for begin in (0, 1))
    return counted or all(number is None for number in numbers)


def _check(path: Path, body: list[Row], fields: list[list[str]], matrix: Float64[np.ndarray, "N N"]) -> None:
    if place := impossible_cost(matrix):
        origin, target = place
        cause = f"cost {quoted(fields[origin][target])} from place {origin + 1} to place {target + 1}"
        raise fault(path, body[origin].number, cause, COST_REMEDY)
