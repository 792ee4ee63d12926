"""Plans in the learnt model: what is left of an episode, solvers, and the player that follows plans."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from config import UserError
from routing.cvrp import CVRPRules, cvrp_instance
from routing.leftovers import Problem
from routing.pickup import PickupRules
from routing.solvers import Solver, solve_piece
from routing.tsp import TSPInstance, TSPRules


def random_costs(count: int, seed: int = 0) -> np.ndarray:
    costs = np.random.RandomState(seed).uniform(0.1, 1.0, size=(count, count))
    np.fill_diagonal(costs, 0.0)
    return costs


def path_cost(costs: np.ndarray, nodes: list[int]) -> float:
    return float(sum(costs[one, other] for one, other in itertools.pairwise(nodes)))


def after(rules, instance, moves: list[int]):
    state = rules.reset(instance)
    for move in moves:
        state, _ = rules.step(state, torch.tensor([move]))
    return state


def planned(rules, instance, state, costs: np.ndarray) -> list[int]:
    (leftover,) = rules.leftovers(instance, state, costs[None])
    (solution,) = solve_piece([leftover.problem])
    return leftover.moves(solution).tolist()


@pytest.mark.parametrize("walked", [[], [3], [3, 1, 5]])
def test_leftovers_of_a_tour_are_the_cheapest_path_home(walked: list[int]):
    costs, instance = random_costs(7), TSPInstance(torch.rand(1, 7, 2))
    moves = planned(TSPRules, instance, after(TSPRules, instance, walked), costs)
    here, still_open = [0, *walked][-1], sorted(set(range(1, 7)) - set(walked))
    best = min(path_cost(costs, [here, *order, 0]) for order in itertools.permutations(still_open))
    assert sorted(moves[:-1]) == still_open and moves[-1] == 0
    assert path_cost(costs, [here, *moves]) == pytest.approx(best)


def test_leftovers_of_a_closed_tour_are_to_stay():
    instance = TSPInstance(torch.rand(1, 3, 2))
    assert planned(TSPRules, instance, after(TSPRules, instance, [1, 2, 0]), random_costs(3)) == [0]


def test_leftovers_leave_padding_out():
    instance = TSPRules.pad(TSPInstance(torch.rand(1, 4, 2)), 6)
    assert sorted(planned(TSPRules, instance, TSPRules.reset(instance), random_costs(6))) == [0, 1, 2, 3]


@pytest.mark.parametrize("walked", [[], [2], [2, 4], [2, 0]])
def test_leftovers_of_a_plan_keep_load_and_begun_route(walked: list[int]):
    instance = cvrp_instance(np.random.RandomState(0).uniform(size=(6, 2)), [0, 2, 3, 2, 3, 1], 6)
    costs = random_costs(6, seed=3)
    state = after(CVRPRules, instance, walked)
    moves = planned(CVRPRules, instance, state, costs)
    for move in moves:
        assert bool(CVRPRules.action_mask(state)[0, move]), f"{move} is illegal after {walked} on the way of {moves}"
        state, finished = CVRPRules.step(state, torch.tensor([move]))
    assert bool(finished)
    assert path_cost(costs, [[0, *walked][-1], *moves]) == pytest.approx(cheapest_rest(instance, costs, walked))


def cheapest_rest(instance, costs: np.ndarray, walked: list[int]) -> float:
    """The cheapest way home by trying all legal ones."""

    def search(state, here: int, paid: float) -> float:
        if bool(CVRPRules.finished(state)):
            return paid
        best = np.inf
        for move in CVRPRules.action_mask(state)[0].nonzero()[:, 0].tolist():
            following, _ = CVRPRules.step(state, torch.tensor([move]))
            best = min(best, search(following, move, paid + costs[here, move]))
        return best

    return search(after(CVRPRules, instance, walked), [0, *walked][-1], 0.0)


def test_a_problem_without_a_solver_says_so():
    instance = TSPInstance(torch.rand(1, 5, 2))
    with pytest.raises(UserError, match="pickup has no solver to plan with"):
        PickupRules.leftovers(instance, PickupRules.reset(instance), random_costs(5)[None])


def test_solver_solves_small_and_large_tours_in_the_order_given():
    problems = [Problem(random_costs(size, seed=size)) for size in (12, 4, 1, 2, 5, 4)]
    solutions = Solver().solve(problems)
    assert [sorted(solution) for solution in solutions] == [list(range(len(each.costs))) for each in problems]
    for problem, solution in zip(problems, solutions, strict=True):
        if 3 <= len(problem.costs) <= 5:
            orders = itertools.permutations(range(1, len(problem.costs)))
            best = min(path_cost(problem.costs, [0, *order, 0]) for order in orders)
            assert path_cost(problem.costs, [*solution, solution[0]]) == pytest.approx(best)


def test_solver_takes_costs_below_0():
    costs = random_costs(12) - 5.0
    shifted = [Problem(costs), Problem(costs + 6.0)]
    one, other = (path_cost(costs, [*tour, tour[0]]) for tour in solve_piece(shifted))
    assert one == pytest.approx(other)


def test_solver_in_processes_gives_the_same_as_in_this_one():
    problems = [Problem(random_costs(10, seed=seed)) for seed in range(70)]
    counted: list[int] = []
    alone, solver = Solver().solve(problems), Solver(processes=2)
    try:
        together = solver.solve(problems, progress=counted.append)
    finally:
        solver.close()
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))
    assert sum(counted) == 70
