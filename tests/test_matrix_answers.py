"""Matrices of costs answered by a policy that reads them, and all else that such a run is asked."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

import dreamer
import solve
from config import UserError
from routing.files import RoutingInstance
from routing.matrices import as_costs, without_positions
from routing.metrics import EXACT, GIVEN
from routing.solutions import check_solution
from solving.answers import NETWORK
from solving.decoding import Decoding
from solving.frames import pose
from solving.nearest import nearest_neighbour_tours
from tests.answer_scenes import CPU, make_agent, solved

# The cheapest way round is 0 3 1 2: 9 + 2 + 5 + 1; the other way round it costs 6 + 4 + 3 + 6.
ONE_WAY = [[0, 8, 6, 9], [7, 0, 5, 3], [1, 4, 0, 8], [6, 2, 9, 0]]
GREEDY, SAMPLE = Decoding("greedy"), Decoding("sample", samples=64)


@pytest.fixture(scope="module")
def agent() -> dreamer.Dreamer:
    # Untrained, and so no surer of a node than it should be.
    pointer = {"actor.pointer.cost_units": 8, "actor.pointer.latent": 0, "actor.pointer.clip": 1.0}
    return make_agent(task="atsp", **pointer)


def instance_of(costs: object, name: str = "own") -> RoutingInstance:
    costs = np.asarray(costs, dtype=float)
    return RoutingInstance(name, "tsp", without_positions(len(costs)), GIVEN, costs=as_costs(costs))


def random_matrix(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 1000, (count, count))


def test_policy_answers_matrices_of_any_size_and_says_so(agent):
    for count in (2, 3, 7, 11):
        (solution,) = solved(agent, [instance_of(random_matrix(count))], GREEDY)
        check_solution(solution.instance, solution.tour)
        costs = as_costs(random_matrix(count).astype(float))
        assert solution.length == costs[solution.tour, np.roll(solution.tour, -1)].sum()
        assert solution.chooser == NETWORK and solution.by_model and solution.forecast is None


def test_policy_finds_the_best_of_many_samples_by_the_matrix(agent):
    costs = np.array(ONE_WAY)
    orders = [(0, *order, 0) for order in itertools.permutations((1, 2, 3))]
    best = min(sum(costs[a, b] for a, b in itertools.pairwise(order)) for order in orders)
    (solution,) = solved(agent, [instance_of(costs)], SAMPLE)
    assert solution.length == best == 17


@pytest.mark.parametrize("factor", [0.001, 7, 10**6])
def test_policy_answers_a_multiplied_matrix_by_the_same_tour(agent, factor):
    costs = random_matrix(9)
    for decoding in (GREEDY, SAMPLE):
        (plain,), (scaled,) = (solved(agent, [instance_of(each)], decoding) for each in (costs, factor * costs))
        assert plain.tour.tolist() == scaled.tour.tolist()
        assert scaled.length == pytest.approx(factor * plain.length)


def test_policy_looks_at_costs_beside_a_number_that_stands_for_no_way(agent):
    blocked, dear = random_matrix(9), random_matrix(9)
    blocked[2, 5], dear[2, 5] = 10**11, 10**5
    posed = [pose([instance_of(each)], CPU).instance.costs for each in (blocked, dear)]
    assert posed[0].equal(posed[1]) and posed[0].max() == 1
    assert (posed[0] > 0.01).sum() > 1


def test_policy_answers_positions_by_their_distances(agent):
    coords = np.random.default_rng(1).uniform(size=(8, 2))
    (solution,) = solved(agent, [RoutingInstance("own", "tsp", coords, EXACT)], SAMPLE)
    stops = coords[solution.tour]
    assert solution.length == pytest.approx(np.linalg.norm(stops - np.roll(stops, -1, 0), axis=1).sum())
    assert solution.chooser == NETWORK


def test_policy_of_matrices_does_not_answer_vehicles(agent):
    problem = instance_of(ONE_WAY)._replace(problem="cvrp", demand=np.array([0, 1, 1, 1]), capacity=2)
    (outcome,) = solve.solve(agent, [problem], GREEDY)
    assert isinstance(outcome, UserError) and "is a cvrp instance, and the run was trained on atsp" in str(outcome)


def test_policy_of_matrices_has_no_symmetries_to_turn_to(agent):
    (outcome,) = solve.solve(agent, [instance_of(ONE_WAY)], Decoding("augment"))
    assert isinstance(outcome, UserError) and "no symmetries" in str(outcome)


def test_solver_answers_beside_a_run_that_reads_matrices(agent):
    (solution,) = solved(agent, [instance_of(ONE_WAY)])
    assert solution.length == 17 and solution.chooser == "exact search, no model"


@pytest.mark.parametrize("method", ["beam", "active"])
def test_searches_go_by_the_matrix(agent, method):
    (solution,) = solved(agent, [instance_of(ONE_WAY)], Decoding(method, seconds=0.1))
    assert solution.length == 17 and solution.chooser == NETWORK


def test_nearest_nodes_are_those_that_cost_least_to_go_to(agent):
    # From 0 to 2 for 6, on to 1 for 4, and then to 3.
    (tour,) = nearest_neighbour_tours(solve.rules_of(agent), [instance_of(ONE_WAY)])
    assert tour.tolist() == [0, 2, 1, 3]


def test_random_instances_of_such_a_run_are_matrices(agent):
    few = solve.random_instances(agent, 2, 5, seed=3)
    assert [each.metric for each in few] == [GIVEN, GIVEN]
    for each in few:
        costs = each.cost_matrix()
        assert costs == pytest.approx((costs[:, :, None] + costs[None]).min(1))


def test_solve_prints_and_draws_what_the_network_chose(agent, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(solve, "load_agent", lambda *_, **__: agent)
    path = tmp_path / "own.csv"
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in ONE_WAY))
    arguments = ["run", str(path), "--decode", "sample", "--reference", "lkh", "--imagine", "--device", "cpu"]
    solve.main([*arguments, "--out", str(tmp_path / "out")])
    row = capsys.readouterr().out.splitlines()[1].split()
    assert row[:5] == ["own", "4", "17", "17", "0.00"] and row[-1] == "network"
    assert len(row) == 9 and float(row[7]) in (17, 19, 21, 23, 27)
    assert {each.name for each in (tmp_path / "out").iterdir()} == {"own.tour", "own.png"}


def test_pose_keeps_matrices_in_proportion():
    costs = torch.tensor(ONE_WAY, dtype=torch.float32)
    posed, units = pose([instance_of(ONE_WAY)], CPU)
    assert units.tolist() == [9]
    torch.testing.assert_close(posed.costs[0], costs / 9)


def test_large_matrices_are_solved_as_a_whole(agent):
    large = instance_of(random_matrix(4 * agent.task.num_actions))
    (solution,) = solved(agent, [large], GREEDY, by_size=True)
    assert solution.chooser == NETWORK
    (outcome,) = solve.solve(agent, [large], Decoding("reconstruct", seconds=0.1))
    assert isinstance(outcome, UserError) and "has no regions that could be cut out" in str(outcome)
