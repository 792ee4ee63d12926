"""Plans of the capacitated vehicle-routing problem to compare with: PyVRP's, near-optimal at the sizes trained on.

PyVRP (Wouda et al. 2024) is the field's open solver of vehicle-routing problems, and maintained.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pyvrp
from jaxtyping import Float, Float64, Int
from pyvrp.stop import MaxIterations
from tqdm import tqdm

from envs.instances import cached_lengths, euclidean_distances

# Part of the name of every cache file: to be raised when plans change.
REFERENCE_VERSION = "pyvrp-0.14-1"

# PyVRP works on integers, and its penalties for too much load reach no further than about this longest leg.
PYVRP_UNITS = 10_000

# Iterations, so that a plan depends on no clock.
ITERATIONS_PER_NODE = 8


def pyvrp_plan(
    distances: Int[np.ndarray, "N N"], demand: Int[np.ndarray, " N"], capacity: int, *, iterations: int
) -> list[list[int]]:
    """The routes of one instance, each a list of customers in visiting order; the same on every call.

    Args:
        distances: between all nodes, the depot first; tens of thousands at most.
        demand: of each node.
        capacity: of each vehicle, of which there are enough.
        iterations: of the local search.

    Raises:
        ValueError: no plan was found.
    """
    count = len(distances)
    matrix: Any = distances
    data = pyvrp.ProblemData(
        locations=[pyvrp.Location(0, 0)] * count,
        clients=[pyvrp.Client(node, delivery=[int(demand[node])]) for node in range(1, count)],
        depots=[pyvrp.Depot(0)],
        vehicle_types=[pyvrp.VehicleType(count - 1, capacity=[int(capacity)])],
        distance_matrices=[matrix],
        duration_matrices=[np.zeros_like(matrix)],
    )
    best = pyvrp.solve(data, MaxIterations(iterations), seed=0, collect_stats=False).best
    if not best.is_feasible():
        raise ValueError(f"PyVRP found no plan for {count - 1} customers within {iterations} iterations")
    return [[visit.idx + 1 for visit in route if visit.is_client()] for route in best.routes()]


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
        cache_dir: as for `envs.instances.reference_lengths`.
    """
    coords = coords.astype(np.float64)
    demand, capacity = demand.astype(np.int64), capacity.astype(np.int64)

    def compute() -> Float64[np.ndarray, " I"]:
        instances = zip(coords, demand, capacity, strict=True)
        bar = tqdm(instances, total=len(coords), desc="reference plans", delay=2)
        return np.array([_plan_length(*instance) for instance in bar], dtype=np.float64)

    return cached_lengths(coords, demand, capacity, version=REFERENCE_VERSION, compute=compute, cache_dir=cache_dir)


def _plan_length(coords: Float64[np.ndarray, "N 2"], demand: Int[np.ndarray, " N"], capacity: np.int64) -> float:
    distances = euclidean_distances(coords)
    longest = distances.max()
    units = np.rint(distances * (PYVRP_UNITS / longest if longest > 0 else 1.0)).astype(np.int64)
    routes = pyvrp_plan(units, demand, int(capacity), iterations=ITERATIONS_PER_NODE * len(coords))
    # Measured again, since PyVRP knows rounded distances only.
    stops = [0, *(node for route in routes for node in (*route, 0))]
    return float(distances[stops[:-1], stops[1:]].sum())
