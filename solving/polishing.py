"""Local search after decoding, by libraries that exist for it: never worse than what it begins with.

Tours are those of fast-tsp, which begins with a tour of its own, and plans those of PyVRP, which begins with the one
that it is handed. Since a solution of the nearest neighbours is handed in as well where that makes a difference, an
answer is never worse than what such a library makes of that.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float64, Int64, UInt16

from routing.files import RoutingInstance
from routing.metrics import GREAT_CIRCLE, UNROUNDED, leg_lengths
from routing.pyvrp_reference import cheapest_plan
from system.memory import require_memory

# Names as they are shown.
FAST_TSP, PYVRP = "fast-tsp", "PyVRP"
# Nodes that a second is for, and what is worth starting for.
NODES_A_SECOND, FEWEST_SECONDS = 200, 1.0
# Fewer nodes leave nothing to change.
FEWEST_NODES = 4
# fast-tsp takes legs as whole numbers up to this one.
LONGEST_WHOLE_LEG = 2**16 - 1
ROWS = 500
ON_EARTH = frozenset({"GEO", GREAT_CIRCLE})


def suited_seconds(num_nodes: int) -> float:
    """How long polishing pays for so many nodes."""
    return max(FEWEST_SECONDS, num_nodes / NODES_A_SECOND)


def polished(
    instance: RoutingInstance,
    own: Int64[np.ndarray, " L"],
    simple: Int64[np.ndarray, " M"],
    *,
    seconds: float,
) -> tuple[Int64[np.ndarray, " K"], str | None, bool]:
    """The better of what local search makes of two solutions, who made it, and whether from the first of them.

    Args:
        instance: where distances tell what moves cost.
        own: a solution; where nothing shorter is found it stays, and nobody made it shorter.
        simple: another one, of the nearest neighbours.
        seconds: for all of it.
    """
    if len(own) < FEWEST_NODES:
        return own, None, True
    if instance.demand is None:
        found = _fast_tour(instance, seconds)
        return (found, FAST_TSP, False) if _shorter(instance, found, own) else (own, None, True)
    tries = [_plan_from(instance, begin, seconds / 2) for begin in (own, simple)]
    best = int(np.argmin([instance.tour_length(each) for each in tries]))
    return (tries[best], PYVRP, best == 0) if _shorter(instance, tries[best], own) else (own, None, True)


def _shorter(instance: RoutingInstance, first: Int64[np.ndarray, " L"], second: Int64[np.ndarray, " M"]) -> bool:
    return instance.tour_length(first) < instance.tour_length(second)


def _fast_tour(instance: RoutingInstance, seconds: float) -> Int64[np.ndarray, " N"]:
    # Few programs polish.
    import fast_tsp

    legs = _whole_legs(instance)
    return np.array(fast_tsp.find_tour(legs, seconds, stop_when_converged=True), dtype=np.int64)


def _plan_from(instance: RoutingInstance, begin: Int64[np.ndarray, " L"], seconds: float) -> Int64[np.ndarray, " M"]:
    plan = cheapest_plan(
        instance.cost_matrix(),
        instance.demand,
        instance.capacity,
        vehicles=instance.vehicles,
        name=instance.name,
        begin=begin,
        seconds=seconds,
        windows=instance.whole_windows(),
    )
    return min(begin, plan, key=instance.tour_length)


def _whole_legs(instance: RoutingInstance) -> UInt16[np.ndarray, "N N"]:
    """Legs as whole numbers: the same where they are, and small enough."""
    count, metric = len(instance.coords), instance.metric
    work = f"polishing {count:,} nodes takes"
    require_memory(8 * count**2, device=torch.device("cpu"), work=work, remedy="leave it out with --polish 0")
    # Where nodes lie on the globe, the bound on their legs is half of its girth.
    longest = max(float(each.max()) for _, each in _rows(instance)) if metric in ON_EARTH else instance.longest_leg()
    kept = metric not in UNROUNDED and longest <= LONGEST_WHOLE_LEG
    unit = 1.0 if kept else LONGEST_WHOLE_LEG / (longest or 1.0)
    legs = np.empty((count, count), dtype=np.uint16)
    for rows, lengths in _rows(instance):
        legs[rows] = np.rint(unit * lengths)
    # From a node to itself, not every metric has 0.
    np.fill_diagonal(legs, 0)
    return legs


def _rows(instance: RoutingInstance) -> Iterator[tuple[slice, Float64[np.ndarray, "R N"]]]:
    """Legs from some nodes at a time, since all of them in full would be the larger part of the memory."""
    coords = instance.coords
    for begin in range(0, len(coords), ROWS):
        rows = slice(begin, begin + ROWS)
        origin, target = np.broadcast_arrays(coords[rows, None], coords[None])
        yield rows, leg_lengths(origin, target, instance.metric)
