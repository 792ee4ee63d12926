"""Reference solutions by PyVRP's iterated local search, of TSP and CVRP alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyvrp
from jaxtyping import Int64
from pyvrp.stop import MaxIterations

from envs.files import RoutingInstance
from envs.instances import whole_distances
from envs.metrics import distance_matrix
from envs.solutions import join_routes

# Near-optimal for a hundred nodes, in seconds.
ITERATIONS = 2000


def pyvrp_solution(instance: RoutingInstance, *, iterations: int = ITERATIONS) -> Int64[np.ndarray, " L"]:
    """A solution as `envs.solutions` writes it; the same on every call."""
    count = len(instance.coords)
    if count < 3:
        return join_routes([[node] for node in range(1, count)]) if instance.demand is not None else np.arange(count)
    distances: Any = whole_distances(distance_matrix(instance.coords, instance.metric))
    if instance.demand is None:
        loads: list[list[int]] = [[] for _ in range(count)]
        vehicles = pyvrp.VehicleType(1)
    else:
        loads = [[int(amount)] for amount in instance.demand]
        vehicles = pyvrp.VehicleType(count - 1, capacity=[int(instance.capacity or 0)])
    data = pyvrp.ProblemData(
        locations=[pyvrp.Location(float(x), float(y)) for x, y in instance.coords],
        clients=[pyvrp.Client(node, delivery=loads[node]) for node in range(1, count)],
        depots=[pyvrp.Depot(0)],
        vehicle_types=[vehicles],
        distance_matrices=[distances],
        duration_matrices=[np.zeros_like(distances)],
    )
    result = pyvrp.solve(data, MaxIterations(iterations), seed=0, collect_stats=False)
    # Clients are counted from 0, and node 0 is the depot.
    routes = [[stop.idx + 1 for stop in route.schedule() if stop.is_client()] for route in result.best.routes()]
    return join_routes(routes)
