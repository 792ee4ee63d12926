"""From what moves cost to tours and routes, by the solvers that references are made with, in processes side by side."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
from jaxtyping import Float64, Int64

from routing.instances import HELD_KARP_MAX_NODES, LKH_RUNS, MIN_REFERENCE_NODES, held_karp_tours, reference_tour
from routing.leftovers import Problem
from routing.pyvrp_reference import cheapest_plan
from system.processes import leave_interrupts

# Problems that a process is handed at a time: few, so that all processes end at about the same time.
PIECE = 32

Solution = Int64[np.ndarray, " L"]


class Solver:
    """Solves many problems, in this process or in several at once. The same problem has the same solution every time.

    Tours are optimal up to 9 nodes, and LKH's beyond; routes are PyVRP's.
    """

    def __init__(self, *, processes: int = 1) -> None:
        """Start no process yet.

        Args:
            processes: how many to solve in; 1 for this one alone.
        """
        self.processes = processes
        self._pool: ProcessPoolExecutor | None = None

    def solve(
        self,
        problems: Sequence[Problem],
        *,
        thorough: bool = True,
        progress: Callable[[int], object] = lambda solved: None,
    ) -> list[Solution]:
        """A solution of each problem, as `routing.solutions` writes it, from node 0.

        Args:
            problems: of any sizes.
            thorough: as references are found. Otherwise tours of more than 9 nodes are looked for once instead of ten
                times, in a quarter of the time: with 20 nodes, they cost 0.04 % more on average.
            progress: called with the number of problems just solved.

        Raises:
            UserError: a problem's vehicles are too few, as far as the solver can tell.
        """
        pieces = [problems[begin : begin + PIECE] for begin in range(0, len(problems), PIECE)]
        found: list[Solution] = []
        for solved in self._each(partial(solve_piece, thorough=thorough), pieces):
            found += solved
            progress(len(solved))
        return found

    def _each(
        self, solve: Callable[[Sequence[Problem]], list[Solution]], pieces: Sequence[Sequence[Problem]]
    ) -> Iterable[list[Solution]]:
        if self.processes == 1 or len(pieces) < 2:
            return map(solve, pieces)
        if self._pool is None:
            context = multiprocessing.get_context("forkserver")
            self._pool = ProcessPoolExecutor(self.processes, mp_context=context, initializer=leave_interrupts)
        return self._pool.map(solve, pieces)

    def close(self) -> None:
        """End the processes, if any were started."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def solve_piece(problems: Sequence[Problem], *, thorough: bool = True) -> list[Solution]:
    """A solution of each problem; small tours of one size are found together, in the time of a few."""
    found: dict[int, Solution] = {}
    small = [index for index, problem in enumerate(problems) if _is_small_tour(problem)]
    by_size = sorted(small, key=lambda index: len(problems[index].costs))
    for _, members in itertools.groupby(by_size, key=lambda index: len(problems[index].costs)):
        indices = list(members)
        tours = held_karp_tours(np.stack([problems[index].costs for index in indices]))
        found |= dict(zip(indices, tours, strict=True))
    for index, problem in enumerate(problems):
        if index not in found:
            found[index] = _solve_alone(problem, thorough=thorough)
    return [found[index] for index in range(len(problems))]


def _is_small_tour(problem: Problem) -> bool:
    return problem.demand is None and MIN_REFERENCE_NODES <= len(problem.costs) <= HELD_KARP_MAX_NODES


def _solve_alone(problem: Problem, *, thorough: bool) -> Solution:
    costs = not_below_zero(problem.costs, is_tour=problem.demand is None)
    if problem.demand is None:
        return reference_tour(costs, runs=LKH_RUNS if thorough else 1)
    return cheapest_plan(costs, problem.demand, problem.capacity, vehicles=problem.vehicles, name="a problem")


def not_below_zero(costs: Float64[np.ndarray, "N N"], *, is_tour: bool) -> Float64[np.ndarray, "N N"]:
    """Costs without any below 0, which solvers do not take; the best tour by these is the best by those."""
    if not is_tour:
        return costs.clip(min=0.0)
    # A tour has as many moves as nodes, so that it stays the best one where each costs as much more.
    least = costs.min(initial=0.0)
    return costs - least * ~np.eye(len(costs), dtype=bool) if least < 0 else costs
