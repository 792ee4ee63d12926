"""What every reader of instance files shares: the instance, the error, and numbers that are read strictly.

Whatever is wrong with a file is an `InstanceError`: one line with the file, the line, the cause and what would do.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int, Int64, Num

from config import UserError
from routing import metrics
from routing.windows import TimeWindows, Windows, first_unserved

# Squares, and sums of a million legs, stay exact enough in float64 to be rounded to whole numbers.
LARGEST_COORDINATE = 1e12
# The rules count loads in 32 bits.
LARGEST_LOAD = 1e9


class InstanceError(UserError):
    """An instance file that cannot be used: one line with the file, the cause and what would do."""


class RoutingInstance(NamedTuple):
    """One problem to be solved, as a user has it.

    Attributes:
        name: the file's name without its suffix, with its place in a batch.
        problem: `tsp`, `cvrp` or `vrptw`, as in `envs.routing.RULES`.
        coords: positions in the file's own unit; node 0 is the start or the depot. Where costs are given, they are for
            pictures alone, and without any numbers (D is 0) where the file has none.
        metric: one of `routing.metrics`, `GIVEN` with costs.
        demand: of each node, 0 at the depot; None for a TSP.
        capacity: of each vehicle; None for a TSP.
        reference: length of the best solution that the file itself tells of; None where it tells of none.
        vehicles: routes that a plan may have; None where any number may.
        costs: what a move from each node (row) to each (column) costs, 0 from a node to itself, where the file gives a
            matrix: int64 if all of them are whole, else float64. None where positions tell, or nobody knows.
        place: which place of a run's cost world each node is; None where the file says nothing of places.
        called: what the file calls those places, by number or by name; None likewise.
        windows: when nodes may be visited; None but for `vrptw`.
    """

    name: str
    problem: str
    coords: Float64[np.ndarray, "N D"]
    metric: str
    demand: Int64[np.ndarray, " N"] | None = None
    capacity: int | None = None
    reference: float | None = None
    vehicles: int | None = None
    costs: Num[np.ndarray, "N N"] | None = None
    place: Int64[np.ndarray, " N"] | None = None
    called: tuple[str, ...] | None = None
    windows: TimeWindows | None = None

    @property
    def is_priced(self) -> bool:
        """Whether anybody knows what moves between the nodes cost."""
        return self.costs is not None or not metrics.is_paid(self.metric)

    def tour_length(self, tour: Int[np.ndarray, " L"]) -> int | float:
        """Length of a closed tour; an int where all costs are whole."""
        if self.costs is None:
            return metrics.tour_length(self.coords, tour, self.metric)
        return self.costs[tour, np.roll(tour, -1)].sum().item()

    def legs(self, origin: Int[np.ndarray, " L"], target: Int[np.ndarray, " L"]) -> Float64[np.ndarray, " L"]:
        """What moves from nodes to nodes cost."""
        if self.costs is None:
            return metrics.leg_lengths(self.coords[origin], self.coords[target], self.metric)
        return self.costs[origin, target].astype(np.float64)

    def cost_matrix(self) -> Float64[np.ndarray, "N N"]:
        """What moves from each node (row) to each (column) cost, 0 from a node to itself."""
        if self.costs is None:
            return metrics.distance_matrix(self.coords, self.metric)
        return self.costs.astype(np.float64)

    def whole_windows(self) -> Windows | None:
        """Windows, and how long driving takes, in whole numbers; None where there are none."""
        return None if self.windows is None else self.windows.whole(self.cost_matrix())

    def require_served(self, path: Path, *, called: str, counted_from: int) -> None:
        """Check that every customer can be served in time on a route of its own.

        Args:
            path: of the file.
            called: what the file calls a node.
            counted_from: the number of the depot there.

        Raises:
            InstanceError: one cannot be.
        """
        assert self.windows is not None, "without windows nobody is late"
        nodes, depot = np.arange(len(self.coords)), np.zeros(len(self.coords), dtype=np.int64)
        unserved = first_unserved(self.windows, self.legs(depot, nodes), self.legs(nodes, depot))
        if unserved is not None:
            name = f"{called} {unserved.node + counted_from}" if unserved.node else "the depot"
            raise InstanceError(f"{path}: {name} {unserved.reason}; no plan can keep to that: correct its times")

    def longest_leg(self) -> float:
        """A length that no move between two of the nodes exceeds."""
        if self.costs is None:
            return metrics.longest_leg(self.coords, self.metric)
        return float(self.costs.max())


class Row(NamedTuple):
    """A line of data, split into its fields."""

    number: int
    fields: list[str]


def fault(path: Path, line: int, cause: str, remedy: str) -> InstanceError:
    """The error of a line."""
    return InstanceError(f"{path}:{line}: {cause}; {remedy}")


def quoted(text: str) -> str:
    """Text of a file as a message can hold it: short, on one line."""
    return repr(text if len(text) <= 40 else text[:37] + "...")


def decode(content: bytes) -> str:
    """The text of a file, in UTF-8, or in UTF-16 as spreadsheets export it."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", errors="replace")
    # Comments of old files are in any encoding, and nothing that counts lies outside ASCII.
    return content.decode("utf-8-sig", errors="replace")


def number_in(field: str) -> float | None:
    """A finite number; None where the text is none."""
    # Python's own reading takes digits of every script and underscores between them.
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", field, re.ASCII):
        return None
    number = float(field)
    return number if np.isfinite(number) else None


def whole_number_in(field: str) -> int | None:
    """A whole number, also where it is written as 12.0 or 1,200; None where the text is no such number."""
    number = number_in(without_thousands(field))
    if number is None or not number.is_integer() or abs(number) > LARGEST_COORDINATE:
        return None
    return int(number)


def without_thousands(field: str) -> str:
    """A number without the commas between its thousands."""
    return field.replace(",", "") if re.fullmatch(r"[+-]?[1-9]\d{0,2}(,\d{3})+(\.\d*)?", field, re.ASCII) else field


def position_in(path: Path, row: Row, fields: Sequence[str]) -> list[float]:
    """The coordinates that fields of a row hold.

    Raises:
        InstanceError: one is no number, or too large.
    """
    position = []
    for field in fields:
        number = number_in(field)
        if number is None or abs(number) > LARGEST_COORDINATE:
            remedy = f"a number within +-{LARGEST_COORDINATE:g} is needed"
            raise fault(path, row.number, f"coordinate {quoted(field)}", remedy)
        position.append(number)
    return position


def check_on_earth(path: Path, line: int, latitude: float, longitude: float, *, remedy: str) -> None:
    """Check that there is such a place.

    Raises:
        InstanceError: there is none.
    """
    if abs(latitude) > 90 or abs(longitude) > 180:
        raise fault(path, line, f"no place on earth has latitude {latitude:g} and longitude {longitude:g}", remedy)
