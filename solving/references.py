"""Lengths to compare solutions with: those of the solvers that the field compares with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

from config import UserError
from envs.routing import MIN_NODES, RULES
from routing.files import RoutingInstance
from routing.metrics import EXACT
from routing.solutions import check_solution
from solving.answers import Solution
from solving.frames import as_instance
from solving.given_costs import SOLVERS, is_by, require_solver_room, solver_tour
from system.terminal import one_line, tell


def references(instances: Sequence[RoutingInstance], solver: str) -> list[int | float]:
    """The length of each instance's solution by another solver, `lkh` or `pyvrp`; all are of one problem.

    Raises:
        UserError: a solver finds none, or does not know the problem, or needs more memory than there is.
    """
    sizes = {len(instance.coords) for instance in instances}
    problem = instances[0].problem
    if solver == "lkh" and SOLVERS[problem] != "lkh":
        raise UserError(f"LKH solves no {problem} instances here; give --reference pyvrp")
    plain = all(instance.metric == EXACT for instance in instances)
    require_solver_room(solver, max(sizes), remedy="give --reference none")
    if solver == SOLVERS[problem] and plain and len(sizes) == 1 and min(sizes) >= MIN_NODES:
        # Those of a random set are kept from one call to the next.
        coords = torch.from_numpy(np.stack([instance.coords for instance in instances]))
        return list(map(float, RULES[problem].reference_lengths(as_instance(instances, coords))))
    bar = tqdm(instances, desc=solver, delay=1, disable=None, leave=False)
    return [_reference(instance, solver) for instance in bar]


def _reference(instance: RoutingInstance, solver: str) -> int | float:
    tour = solver_tour(instance, solver)
    check_solution(instance, tour)
    return instance.tour_length(tour)


def with_references(solutions: Sequence[Solution], solver: str) -> list[Solution]:
    """Solutions, in order, with references; one that there is no reference of is told of, and keeps its length."""
    lengths: dict[int, int | float] = {}
    groups: dict[str, list[int]] = {}
    for index, solution in enumerate(solutions):
        if is_by(solution, solver):
            assert solution.length is not None, "it was found by costs that are known"
            # It would find the same again.
            lengths[index] = solution.length
        else:
            groups.setdefault(solution.instance.problem, []).append(index)
    for members in groups.values():
        lengths |= _lengths(solutions, members, solver)
    return [
        solution._replace(reference=lengths[index]) if index in lengths else solution
        for index, solution in enumerate(solutions)
    ]


def _lengths(solutions: Sequence[Solution], members: list[int], solver: str) -> dict[int, int | float]:
    try:
        return dict(zip(members, references([solutions[index].instance for index in members], solver), strict=True))
    except (UserError, MemoryError) as error:
        if len(members) > 1:
            return {index: length for each in members for index, length in _lengths(solutions, [each], solver).items()}
        name = one_line(solutions[members[0]].instance.name)
        tell(f"solve.py: {name} has no reference: {str(error) or 'out of memory'}")
        return {}
