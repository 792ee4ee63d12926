"""Solutions of routing instances: the rules that each must keep, and the files that hold them.

A solution is a flat sequence of nodes, closed at its end: a tour from any node, or for CVRP the depot 0, a route, 0,
the next route, and so on, without a 0 at the end.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import vrplib
from jaxtyping import Int
from vrplib.parse import parse_solution

from routing.files import RoutingInstance
from system import safe_files, terminal

logger = logging.getLogger(__name__)

# Of a leg, in files of best known plans with time windows: CVRPLIB's drop all behind the first decimal.
ROUNDED_AWAY = 0.1
# Bytes: millions of nodes.
LARGEST_SOLUTION = 2**26


class IllegalSolution(RuntimeError):
    """A solution that breaks the rules of its problem."""


def check_solution(instance: RoutingInstance, tour: Int[np.ndarray, " L"], *, allowed: float = 0.0) -> None:
    """Check a solution against the rules, from the instance and the sequence of nodes alone.

    With time windows, a vehicle may be late by what is `allowed` for each leg of its route.

    Raises:
        IllegalSolution: it breaks one; the message says which.
    """
    count = len(instance.coords)
    if instance.demand is None:
        if not np.array_equal(np.sort(tour), np.arange(count)):
            raise IllegalSolution(f"{instance.name}: the tour does not visit each of {count} nodes exactly once")
        return
    assert instance.capacity is not None, "an instance with demands has a capacity"
    if not len(tour) or tour[0] != 0:
        raise IllegalSolution(f"{instance.name}: the first route does not begin at the depot")
    customers = np.sort(tour[tour != 0])
    if not np.array_equal(customers, np.arange(1, count)):
        raise IllegalSolution(f"{instance.name}: the routes do not visit each of {count - 1} customers exactly once")
    for number, route in enumerate(split_routes(tour), start=1):
        if not len(route) and count > 1:
            raise IllegalSolution(f"{instance.name}: route {number} is empty")
        load = int(instance.demand[route].sum())
        if load > instance.capacity:
            raise IllegalSolution(f"{instance.name}: route {number} carries {load}, above {instance.capacity}")
    if instance.windows is not None:
        _check_times(instance, tour, allowed)


def _check_times(instance: RoutingInstance, tour: Int[np.ndarray, " L"], allowed: float) -> None:
    """Check that no vehicle is late by more than what is allowed for each of its legs."""
    assert instance.windows is not None, "without windows nobody is late"
    for number, route in enumerate(split_routes(tour), start=1):
        legs = instance.legs(np.append(0, route), np.append(route, 0))
        node, late = instance.windows.lateness(route, legs)
        if late > allowed * (len(route) + 1):
            where = f"customer {node}" if node else "the depot"
            raise IllegalSolution(f"{instance.name}: route {number} comes to {where} {late:g} too late")


def split_routes(tour: Int[np.ndarray, " L"]) -> list[Int[np.ndarray, " C"]]:
    """The customers of each route of a CVRP solution."""
    depots = np.flatnonzero(tour == 0)
    return [tour[begin + 1 : end] for begin, end in zip(depots, [*depots[1:], len(tour)], strict=True)]


def route_counts(tours: Int[np.ndarray, "Q L"]) -> Int[np.ndarray, " Q"]:
    """Routes of each CVRP solution: how often it leaves the depot. Waiting there, at its end too, is none."""
    return ((tours == 0) & (np.roll(tours, -1, axis=-1) != 0)).sum(-1)


def join_routes(routes: list[list[int]]) -> Int[np.ndarray, " L"]:
    """The inverse of `split_routes`; an instance without customers stays at its depot."""
    return np.array([node for route in routes for node in (0, *route)] or [0], dtype=np.int64)


def solution_path(folder: Path, instance: RoutingInstance) -> Path:
    """Where the solution of an instance goes in a folder."""
    return folder / f"{instance.name}.{'tour' if instance.demand is None else 'sol'}"


def write_solution(
    path: Path, instance: RoutingInstance, tour: Int[np.ndarray, " L"], *, expected: float | None = None
) -> None:
    """Write a TSPLIB tour (nodes from 1) or a CVRPLIB solution (customers from 1).

    `expected` is what it is expected to cost, which stands for its length where nobody knows that.
    """
    length = instance.tour_length(tour) if instance.is_priced else expected
    if instance.demand is not None:
        routes = [route.tolist() for route in split_routes(tour) if len(route)]
        with safe_files.replacing(path) as temporary:
            vrplib.write_solution(temporary, routes, {"Cost": length})
        return
    comment = f"COMMENT : {'length' if instance.is_priced else 'expected cost'} {length}"
    lines = [f"NAME : {path.name}", comment, "TYPE : TOUR"]
    lines += [f"DIMENSION : {len(tour)}", "TOUR_SECTION", *map(str, tour + 1), "-1", "EOF"]
    safe_files.write_text(path, "\n".join(lines) + "\n")


def known_length(path: str | os.PathLike, instance: RoutingInstance) -> int | float | None:
    """Length of the best solution that is known: of NAME.opt.tour or NAME.sol beside the file, or what the file says.

    The length is computed from the nodes; a solution that cannot be used is logged and done without.
    """
    beside = Path(path).with_suffix(".opt.tour" if instance.demand is None else ".sol")
    if not beside.exists():
        return instance.reference
    try:
        text = safe_files.read_bytes(beside, most=LARGEST_SOLUTION).decode("utf-8", errors="replace")
        tour = _tour_in(text) if instance.demand is None else join_routes(parse_solution(text)["routes"])
        check_solution(instance, tour, allowed=ROUNDED_AWAY if instance.windows is not None else 0.0)
    except (OSError, ValueError, LookupError, TypeError, OverflowError, IllegalSolution) as error:
        logger.warning("%s", terminal.one_line(f"{beside} is no solution of {path} ({str(error)[:100]})"))
        return instance.reference
    return instance.tour_length(tour)


def _tour_in(text: str) -> Int[np.ndarray, " L"]:
    words = text.split()
    begin = words.index("TOUR_SECTION") + 1
    return np.array([int(word) for word in words[begin : words.index("-1", begin)]], dtype=np.int64) - 1
