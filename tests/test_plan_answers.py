"""Answers by plans in a run's model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import solve
from config import UserError
from routing.cvrp import CVRPRules
from routing.files import RoutingInstance
from routing.metrics import EXACT
from routing.tsp import TSPInstance
from solving import forecasts
from solving.answers import Solution
from solving.forecasts import Forecaster
from solving.plans import planned
from tests.answer_scenes import (
    NODES,
    PLAN,
    cases,
    cheapest,
    expected_matrix,
    forecaster,
    make_agent,
    solved,
)


def test_plan_is_the_best_tour_by_what_the_model_expects():
    agent, instances = make_agent(), cases(3)
    for instance, solution in zip(instances, solved(agent, instances), strict=True):
        costs = expected_matrix(agent, instance)
        paid = costs[solution.tour, np.roll(solution.tour, -1)].sum()
        assert paid == pytest.approx(cheapest(costs), rel=1e-6)
        assert solution.length == pytest.approx(instance.tour_length(solution.tour))


def test_plan_says_that_a_solver_and_the_models_costs_chose():
    (solution,) = solved(make_agent(), cases(1))
    assert solution.chooser == "exact search by the model's costs" and solution.forecast is None


def test_plan_takes_any_size_where_the_actor_takes_one():
    agent = make_agent(**{"actor.type": "masked"})
    assert [len(each.tour) for each in solved(agent, [*cases(1, 9), *cases(1, 2), *cases(1, 1)])] == [9, 2, 1]


def test_plan_is_the_same_in_processes():
    agent, instances = make_agent(), cases(6, 11)
    alone, beside = (solved(agent, instances, processes=count) for count in (None, 2))
    assert [each.tour.tolist() for each in alone] == [each.tour.tolist() for each in beside]


def test_plan_moves_no_more_vehicles_than_there_are():
    agent = make_agent(task="cvrp", nodes=5)
    drawn = CVRPRules.field_instances(1, 5, seed=0)
    instance = RoutingInstance("own", "cvrp", drawn.coords[0].numpy(), EXACT, np.array([0, 2, 2, 2, 2]), 4, vehicles=2)
    (solution,) = solved(agent, [instance])
    assert (solution.tour == 0).sum() == 2
    (refused,) = solve.solve(agent, [instance._replace(vehicles=1)], PLAN)
    assert isinstance(refused, UserError) and "PyVRP found no solution" in str(refused)


def test_plan_is_refused_where_the_model_knows_costs_by_latents_alone():
    (refused,) = solve.solve(make_agent(**{"model.reward_latent": True}), cases(1), PLAN)
    assert "cannot be planned: the run's model does not tell what moves cost" in str(refused)


def test_plan_of_another_problem_is_refused():
    (refused,) = solve.solve(make_agent(task="cvrp"), cases(1), PLAN)
    assert "is a tsp instance, and the run was trained on cvrp" in str(refused)


def test_plans_go_on_where_one_needs_more_memory_than_there_is(monkeypatch):
    monkeypatch.setattr("system.memory.memory_at_hand", lambda: 10_000)
    large, small = planned(forecaster(), [*cases(1, 9), *cases(1)])
    assert "has 9 nodes, and planning so many takes" in str(large) and isinstance(small, Solution)


def test_forecaster_gives_the_same_matrix_in_pieces(monkeypatch):
    asked, instance = forecaster(**{"model.move_heads": 3}), TSPInstance(torch.rand(4, 7, 2))
    whole = asked.matrices(instance)
    monkeypatch.setattr(forecasts, "WORKING_NUMBERS", 1)
    np.testing.assert_allclose(asked.matrices(instance), whole, atol=1e-6)


def test_forecaster_counts_rewards_as_they_were_before_they_were_scaled():
    one = forecaster()
    other = Forecaster(make_agent().imagination, one.settings, reward_scale=0.1)  # type: ignore[arg-type]
    instance = TSPInstance(torch.rand(1, NODES, 2))
    np.testing.assert_allclose(other.matrices(instance), 10 * one.matrices(instance), rtol=1e-6)


def test_forecaster_takes_moves_to_be_dearer_by_the_spread_of_the_ensemble():
    plain, wary = (forecaster(**{"model.move_heads": 3, "plan.pessimism": by}) for by in (0.0, 2.0))
    instance = TSPInstance(torch.rand(1, NODES, 2))
    each = -plain.model.predict_moves_each(instance, None).double()
    added = 2 * each.std(0, correction=0)[0].numpy() * ~np.eye(NODES, dtype=bool)
    np.testing.assert_allclose(wary.matrices(instance)[0] - plain.matrices(instance)[0], added, atol=1e-6)


def test_forecaster_expects_of_tours_what_their_moves_cost():
    asked = forecaster(**{"model.move_heads": 3})
    instance, tours = TSPInstance(torch.rand(2, 4, 2)), np.array([[0, 2, 1, 3, 0], [3, 1, 1, 0, 2]])
    matrices = asked.matrices(instance)
    paid = matrices[np.arange(2)[:, None], tours, np.roll(tours, -1, 1)].sum(1)
    np.testing.assert_allclose(asked.tours(instance, tours).mean(0), paid, rtol=1e-5)
