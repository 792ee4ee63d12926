"""Solves instances by the costs that their own files give, with the solvers that references are made with: no model."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing

import numpy as np
import torch
from jaxtyping import Int64

from config import UserError
from routing.files import RoutingInstance
from routing.instances import HELD_KARP_MAX_NODES, LKH_UNITS, reference_tour, whole_already
from routing.pyvrp_reference import PYVRP_UNITS, pyvrp_solution
from routing.solutions import check_solution
from solving.answers import Solution
from system.memory import NotEnoughMemory, is_exhausted, require_memory
from system.processes import pool_of
from system.terminal import one_line

# The solver that the field compares with, by problem as in `envs.routing.RULES`.
SOLVERS = {"tsp": "lkh", "cvrp": "pyvrp", "vrptw": "pyvrp"}
# Names as they are shown.
LKH, PYVRP, EXACT_SEARCH = "LKH", "PyVRP", "exact search"
# Bytes of each leg while a solver looks, by measurement and rounded up.
LEG_BYTES = 150
# From so many nodes on solvers take seconds. A process then costs less than it brings: others beside it, and an end at
# once where somebody presses Ctrl-C, which LKH alone does not notice.
NODES_WORTH_A_PROCESS = 200
# Seconds that LKH takes for so many nodes, by measurement on one core; they grow with this power of the nodes. Where
# costs do not depend on the direction, it takes a fifth of that at times.
MEASURED_NODES, MEASURED_SECONDS, POWER = 600, 106, 2.6
# From so many seconds on it is said beforehand how long that takes.
SECONDS_WORTH_SAYING = 90


def is_by(solution: Solution, solver: str) -> bool:
    """Whether a solution is the one that `lkh` or `pyvrp` finds by the instance's own costs."""
    names = {"lkh": (LKH, EXACT_SEARCH), "pyvrp": (PYVRP,)}[solver]
    return not solution.by_model and solution.chosen_by in names


def require_solver_room(solver: str, num_nodes: int, *, remedy: str) -> None:
    """Check that memory can hold what a solver needs for so many nodes.

    Raises:
        NotEnoughMemory: it cannot.
    """
    work = f"{solver} for {num_nodes:,} nodes needs"
    require_memory(LEG_BYTES * num_nodes**2, device=torch.device("cpu"), work=work, remedy=remedy)


def solver_tour(instance: RoutingInstance, solver: str) -> Int64[np.ndarray, " L"]:
    """The best solution that `lkh` (of a TSP) or `pyvrp` finds by the instance's own costs; the same on every call.

    Raises:
        UserError: it finds none.
    """
    costs = instance.cost_matrix()
    units = LKH_UNITS if instance.demand is None else PYVRP_UNITS
    exact = solver == "lkh" and len(costs) <= HELD_KARP_MAX_NODES
    best, shortest = None, np.inf
    while True:
        tour = reference_tour(costs) if solver == "lkh" else pyvrp_solution(instance, costs=costs)
        if best is None or instance.tour_length(tour) < shortest:
            best, shortest = tour, instance.tour_length(tour)
        # Solvers count in so many units of the longest leg. Where one stands for `no way`, the others are too few units
        # long to be told apart. No better solution has a leg as long as this one is in all, so longer legs are cut
        # there, and what is left is looked at more closely.
        cut = np.minimum(costs, float(shortest))
        if exact or whole_already(costs, units=units) or cut.max() > costs.max() / 2:
            return best
        costs = cut


def long_work(instances: Sequence[RoutingInstance]) -> list[str]:
    """A line on each instance for which LKH may take minutes."""
    lines = []
    for instance in instances:
        count = len(instance.coords)
        seconds = MEASURED_SECONDS * (count / MEASURED_NODES) ** POWER
        if instance.demand is None and seconds >= SECONDS_WORTH_SAYING:
            name = one_line(instance.name)
            lines.append(f"{name} has {count:,} nodes: LKH may take some {seconds / 60:.0f} minutes")
    return lines


def solve_given(
    instances: Sequence[RoutingInstance],
    *,
    processes: int | None = None,
    progress: Callable[[int], object] = lambda nodes: None,
) -> list[Solution | UserError]:
    """A checked solution of each instance, in order, by the solver of its problem and by its own costs, or why none.

    Args:
        instances: of any problems and sizes.
        processes: in which they are solved beside each other; where not given, as many as there are cores if one
            instance is large, and otherwise none.
        progress: called with the nodes of the instance just solved.

    Raises:
        IllegalSolution: a solver's solution breaks the rules, which is a defect.
    """
    if processes is None and any(len(instance.coords) >= NODES_WORTH_A_PROCESS for instance in instances):
        processes = os.cpu_count() or 1
    outcomes = []
    # Closed at once where somebody interrupts, so that nothing goes on behind.
    with closing(_beside_each_other(instances, processes) if processes else _one_by_one(instances)) as found:
        for instance, outcome in zip(instances, found, strict=True):
            outcomes.append(outcome)
            progress(len(instance.coords))
    return outcomes


def _one_by_one(instances: Sequence[RoutingInstance]) -> Generator[Solution | UserError, None, None]:
    yield from map(_solve, instances)


def _solve(instance: RoutingInstance) -> Solution | UserError:
    solver, count = SOLVERS[instance.problem], len(instance.coords)
    begin = time.perf_counter()
    try:
        require_solver_room(f"cannot be solved: {solver}", count, remedy="solve it where there is more")
        tour = solver_tour(instance, solver)
    except UserError as error:
        return error
    except (MemoryError, RuntimeError) as error:
        if not is_exhausted(error):
            raise
        return _too_large()
    check_solution(instance, tour)
    exact = solver == "lkh" and count <= HELD_KARP_MAX_NODES
    name = EXACT_SEARCH if exact else {"lkh": LKH, "pyvrp": PYVRP}[solver]
    seconds = time.perf_counter() - begin
    return Solution(instance, tour, instance.tour_length(tour), seconds, chosen_by=name, by_model=False)


def _too_large() -> UserError:
    return NotEnoughMemory("ran out of memory; solve it alone, or where there is more")


def _beside_each_other(
    instances: Sequence[RoutingInstance], processes: int
) -> Generator[Solution | UserError, None, None]:
    with pool_of(min(len(instances), processes)) as pool:
        for future in [pool.submit(_solve, instance) for instance in instances]:
            try:
                yield future.result()
            except BrokenProcessPool:
                # The system ends a process that takes the last of its memory, and the pool is gone with it.
                yield _too_large()
