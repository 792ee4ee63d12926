"""Reference solutions by PyVRP, of TSP and CVRP alike: near-optimal at the sizes trained on.

PyVRP (Wouda et al. 2024) is the field's open solver of vehicle-routing problems, and maintained.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int, Int64
from tqdm import tqdm

from config import UserError
from routing.files import RoutingInstance
from routing.instances import LKH_UNITS, cached_lengths, tour_costs, whole_distances
from routing.metrics import EXACT, distance_matrix
from routing.solutions import join_routes, split_routes
from routing.windows import Windows

# Part of the name of every cache file: to be raised when plans change.
REFERENCE_VERSION = "pyvrp-0.14-2"

# PyVRP works on integers, and its penalties for too much load reach no further than about this longest leg.
PYVRP_UNITS = 10_000

# Iterations, so that a plan depends on no clock. With 20 customers, 8 for each node find what 50 do. With 50 customers,
# plans are 1.2 % longer with 8 than with 80, and 0.5 % with 25: the number grows with the cube of the nodes.
FEWEST_ITERATIONS, MOST_ITERATIONS, CUBE_SHARE = 200, 10_000, 32


def pyvrp_solution(
    instance: RoutingInstance, *, costs: Float64[np.ndarray, "N N"] | None = None, iterations: int | None = None
) -> Int64[np.ndarray, " L"]:
    """A solution as `routing.solutions` writes it; the same on every call.

    Args:
        instance: of any size.
        costs: to solve it by, in place of its own.
        iterations: of the local search; as many as such an instance needs where not given.

    Raises:
        UserError: no plan was found.
    """
    return cheapest_plan(
        instance.cost_matrix() if costs is None else costs,
        instance.demand,
        instance.capacity,
        vehicles=instance.vehicles,
        name=instance.name,
        iterations=iterations,
        windows=instance.whole_windows(),
    )


def cheapest_plan(
    costs: Float64[np.ndarray, "N N"],
    demand: Int[np.ndarray, " N"] | None,
    capacity: int | None,
    *,
    vehicles: int | None = None,
    name: str = "a random instance",
    iterations: int | None = None,
    begin: Int64[np.ndarray, " K"] | None = None,
    seconds: float | None = None,
    windows: Windows | None = None,
) -> Int64[np.ndarray, " L"]:
    """The same by the costs of moves from each node (row) to each (column); a tour where there is no demand.

    `vehicles` is the number of routes that there may be; any number where not given. The search begins with the plan
    `begin`, if there is one, and takes so many `seconds` in place of iterations, if they are given. With
    `windows`, vehicles leave the depot at time 0, wait where they come early, and are never late.
    """
    # Few programs ask for a reference that is not in the cache.
    import pyvrp
    from pyvrp.stop import MaxIterations, MaxRuntime

    count = len(costs)
    if count < 3 and windows is None:
        return join_routes([[node] for node in range(1, count)]) if demand is not None else np.arange(count)
    if demand is None:
        loads: list[list[int]] = [[] for _ in range(count)]
        fleet, units = pyvrp.VehicleType(1), LKH_UNITS
    else:
        loads = [[int(amount)] for amount in demand]
        late: dict[str, Any] = {} if windows is None else {"tw_late": int(windows.due[0])}
        fleet = pyvrp.VehicleType(vehicles or count - 1, capacity=[int(capacity or 0)], **late)
        units = PYVRP_UNITS
    distances: Any = whole_distances(costs, units=units)
    durations: Any = np.zeros_like(distances) if windows is None else windows.drives
    data = pyvrp.ProblemData(
        locations=[pyvrp.Location(0, 0)] * count,
        clients=[pyvrp.Client(node, delivery=loads[node], **_window(windows, node)) for node in range(1, count)],
        depots=[pyvrp.Depot(0)],
        vehicle_types=[fleet],
        distance_matrices=[distances],
        duration_matrices=[durations],
    )
    if iterations is None:
        iterations = min(max(count**3 // CUBE_SHARE, FEWEST_ITERATIONS), MOST_ITERATIONS)
    stop, limit = (
        (MaxIterations(iterations), f"{iterations} iterations")
        if seconds is None
        else (MaxRuntime(seconds), f"{seconds:g} seconds")
    )
    first = None
    if begin is not None:
        # Clients are counted from 0, and node 0 is the depot.
        first = pyvrp.Solution(data, [(route - 1).tolist() for route in split_routes(begin) if len(route)])
    best = pyvrp.solve(data, stop, seed=0, collect_stats=False, initial_solution=first).best
    if not best.is_feasible():
        raise UserError(f"PyVRP found no solution of {name} within {limit}")
    return join_routes([[visit.idx + 1 for visit in route if visit.is_client()] for route in best.routes()])


def _window(windows: Windows | None, node: int) -> dict[str, Any]:
    """What PyVRP is told of the time of a node."""
    if windows is None:
        return {}
    ready, due, service = (int(part[node]) for part in (windows.ready, windows.due, windows.service))
    return {"tw_early": ready, "tw_late": due, "service_duration": service}


def reference_plan_lengths(
    coords: Float[np.ndarray, "I N 2"],
    demand: Int[np.ndarray, "I N"],
    capacity: Int[np.ndarray, " I"],
    *,
    cache_dir: str | os.PathLike | None = None,
) -> Float64[np.ndarray, " I"]:
    """Lengths of PyVRP's plans, computed once for the same instances; a progress bar shows when this takes long.

    Args:
        coords: positions, the depot first.
        demand: of each node.
        capacity: of each instance's vehicles.
        cache_dir: as for `routing.instances.reference_lengths`.
    """
    coords = coords.astype(np.float64)
    return _reference_plans(coords, demand, capacity, lambda nodes: distance_matrix(nodes, EXACT), cache_dir)


def reference_plan_costs(
    costs: Float64[np.ndarray, "I N N"],
    demand: Int[np.ndarray, "I N"],
    capacity: Int[np.ndarray, " I"],
    *,
    cache_dir: str | os.PathLike | None = None,
) -> Float64[np.ndarray, " I"]:
    """What PyVRP's plans cost, likewise, by the costs of moves from each node (row) to each (column)."""
    return _reference_plans(costs, demand, capacity, lambda matrix: matrix, cache_dir)


def _reference_plans(
    content: Float64[np.ndarray, "I N D"],
    demand: Int[np.ndarray, "I N"],
    capacity: Int[np.ndarray, " I"],
    costs_of: Callable[[Float64[np.ndarray, "N D"]], Float64[np.ndarray, "N N"]],
    cache_dir: str | os.PathLike | None,
) -> Float64[np.ndarray, " I"]:
    demand, capacity = demand.astype(np.int64), capacity.astype(np.int64)

    def compute() -> Float64[np.ndarray, " I"]:
        rows = zip(content, demand, capacity, strict=True)
        bar = tqdm(rows, total=len(content), desc="reference plans", delay=2, disable=None)
        # Added up again, since PyVRP knows rounded costs only.
        return np.array([_plan_cost(costs_of(each), amounts, int(most)) for each, amounts, most in bar], np.float64)

    return cached_lengths(content, demand, capacity, version=REFERENCE_VERSION, compute=compute, cache_dir=cache_dir)


def _plan_cost(costs: Float64[np.ndarray, "N N"], demand: Int64[np.ndarray, " N"], capacity: int) -> float:
    plan = cheapest_plan(costs, demand, capacity)
    return float(tour_costs(costs[None], plan[None])[0])
