"""Cost worlds: what moves cost in them, who sees what, and the tours to compare with."""

from __future__ import annotations

import itertools
import math
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from torch import Tensor

from envs.routing import TSPEnv, TSPInstance, TSPRules
from envs.vector import RoutingVectorEnv
from routing.cost_world import Costs
from routing.costs import COSTS, EUCLIDEAN, find_costs, hides
from routing.instances import reference_costs, tour_costs

WORLDS = sorted(COSTS)


def points(*positions: tuple[float, float]) -> Tensor:
    return torch.tensor(positions, dtype=torch.float64)


def instance_and_factors(costs: Costs, count: int = 5, num_nodes: int = 6) -> tuple[TSPInstance, Tensor | None]:
    draws = torch.Generator().manual_seed(3)
    coords = torch.rand(count, num_nodes, 2, generator=draws)
    return TSPInstance(coords), costs.draw(count, generator=draws, device="cpu")


def test_lanes_cost_by_hand():
    # Upwards in the right half, downwards there, upwards in the left half, upwards in the middle, across.
    origin = points((0.9, 0.1), (0.9, 0.6), (0.1, 0.1), (0.5, 0.1), (0.2, 0.3))
    target = points((0.9, 0.6), (0.9, 0.1), (0.1, 0.6), (0.5, 0.6), (0.8, 0.3))
    dearer = 0.6 * math.tanh(6 * 0.4)
    expected = [0.5 * (1 + dearer), 0.5 * (1 - dearer), 0.5 * (1 - dearer), 0.5, 0.6]
    assert COSTS["lanes"].at(origin, target).tolist() == pytest.approx(expected)


def test_river_charges_each_crossing():
    # At x = 0.25 the river lies at 0.65, at x = 0.75 at 0.35: a level move at 0.6 crosses it once, one at 0.5 once, and
    # one at 0.6 from 0 to 0.5 twice.
    origin = points((0.25, 0.5), (0.25, 0.5), (0.25, 0.6), (0.0, 0.6), (0.0, 0.9))
    target = points((0.25, 0.6), (0.25, 0.8), (0.75, 0.6), (0.5, 0.6), (1.0, 0.9))
    toll = COSTS["river"].at(origin, target) - COSTS["lanes"].at(origin, target)
    assert toll.tolist() == pytest.approx([0, 0.3, 0.3, 0.6, 0])


def test_stretch_is_dear_along_the_hidden_direction_only():
    origin, target = points((0.5, 0.5)).expand(4, 2), points((0.6, 0.5), (0.5, 0.6), (0.5, 0.6), (0.6, 0.6))
    factors = torch.tensor([[0.0], [0.0], [0.5], [0.25]], dtype=torch.float64)
    costs = COSTS["stretch"].at(origin, target, factors)
    assert costs.tolist() == pytest.approx([0.5, 0.1, 0.5, 0.5 * math.sqrt(2)])


@pytest.mark.parametrize("name", WORLDS)
def test_costs_are_positive_and_0_for_staying(name: str):
    instance, factors = instance_and_factors(COSTS[name])
    matrix = COSTS[name].matrix(instance, factors)
    moves = ~torch.eye(6, dtype=torch.bool)
    assert (matrix[:, moves] > 0).all()
    assert (matrix[:, ~moves] == 0).all()


@pytest.mark.parametrize("name", ["lanes", "river"])
def test_asymmetric_costs_do_not_cancel_over_a_closed_tour(name: str):
    instance, _ = instance_and_factors(COSTS[name], count=50)
    matrix = COSTS[name].matrix(instance).double().numpy()
    tours = np.tile(np.arange(6), (50, 1))
    forwards, backwards = tour_costs(matrix, tours), tour_costs(matrix, tours[:, ::-1])
    assert np.abs(forwards - backwards).mean() > 0.1 * forwards.mean()


@pytest.mark.parametrize("name", WORLDS)
def test_reference_costs_are_those_of_the_best_of_all_tours(name: str, tmp_path):
    instance, factors = instance_and_factors(COSTS[name])
    matrix = COSTS[name].matrix(instance, factors).double().numpy()
    every = [(0, *rest) for rest in itertools.permutations(range(1, 6))]
    best = np.min([tour_costs(matrix, np.tile(tour, (5, 1))) for tour in every], 0)
    np.testing.assert_allclose(reference_costs(matrix, cache_dir=tmp_path), best, rtol=1e-9)


def test_reference_costs_of_lkh_equal_the_exact_ones(monkeypatch, tmp_path):
    matrix = COSTS["river"].matrix(instance_and_factors(COSTS["river"], num_nodes=9)[0]).double().numpy()
    exact = reference_costs(matrix, cache_dir=tmp_path / "exact")
    monkeypatch.setattr("routing.instances.HELD_KARP_MAX_NODES", 3)
    np.testing.assert_allclose(reference_costs(matrix, cache_dir=tmp_path / "lkh"), exact, rtol=1e-5)


def test_reference_costs_are_kept_for_each_world(tmp_path):
    instance, _ = instance_and_factors(EUCLIDEAN)
    for name in ("lanes", "river", "lanes"):
        reference_costs(COSTS[name].matrix(instance).double().numpy(), cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_rules_under_a_world_ask_it_for_every_cost():
    instance = TSPInstance(coords=torch.rand(3, 5, 2))
    rules = TSPRules.under(COSTS["lanes"])
    state, action = rules.reset(instance), torch.tensor([1, 2, 3])
    matrix = COSTS["lanes"].matrix(instance)
    torch.testing.assert_close(rules.cost(instance, state, action), matrix[torch.arange(3), 0, action])
    torch.testing.assert_close(rules.longest_leg(instance), matrix.amax((1, 2)))
    assert TSPRules.costs is EUCLIDEAN


@pytest.mark.parametrize("name", [name for name in WORLDS if not COSTS[name].drift])
def test_vector_env_and_tsp_env_charge_and_show_the_same(name: str):
    costs = COSTS[name]
    env = TSPEnv(num_nodes=5, cost=name)
    obs, _ = env.reset(seed=0)
    factors = None if env._hidden is None else env._hidden.factors
    vector = RoutingVectorEnv(
        TSPRules.under(costs),
        num_envs=1,
        num_nodes=5,
        device="cpu",
        instances=torch.from_numpy(obs["coords"])[None],
        factors=factors,
    )
    vector_obs, _ = vector.reset()
    for node in (3, 1, 4, 2, 0):
        assert obs.keys() == vector_obs.keys()
        assert all(np.array_equal(obs[key], vector_obs[key][0].numpy()) for key in obs)
        obs, reward, *_ = env.step(node)
        vector_obs, vector_reward, *_ = vector.step(torch.tensor([node]))
        assert reward == vector_reward.item()


@pytest.mark.parametrize("name", ["stretch", "veering"])
def test_tsp_env_of_hidden_costs_passes_the_gymnasium_checker(name: str):
    check_env(gymnasium.make("TSP-v0", num_nodes=5, cost=name).unwrapped, skip_render_check=True)


def test_drifting_factors_take_a_step_around_the_circle_after_every_move():
    costs, rows = COSTS["veering"], 20_000
    env = RoutingVectorEnv(
        TSPRules.under(costs), num_envs=rows, num_nodes=5, device="cpu", generator=torch.Generator().manual_seed(0)
    )
    env.reset()
    assert env._hidden is not None
    before, matrix = env._hidden.factors, costs.matrix(env._instance, env._hidden.factors)
    _, reward, *_ = env.step(torch.full((rows,), 3))
    torch.testing.assert_close(-reward, matrix[:, 0, 3])
    after = env._hidden.factors
    assert ((after >= 0) & (after <= 1)).all()
    change = (after - before + 0.5) % 1 - 0.5
    assert change.mean().abs() < 0.002
    assert change.std().item() == pytest.approx(costs.drift, rel=0.03)


def test_episodes_that_are_given_drift_alike_each_time():
    instances, factors = torch.rand(3, 5, 2), torch.rand(3, 1)

    def drifted() -> Tensor:
        rules = TSPRules.under(COSTS["veering"])
        env = RoutingVectorEnv(rules, num_envs=3, num_nodes=5, device="cpu", instances=instances, factors=factors)
        env.reset()
        for node in (1, 2, 3):
            env.step(torch.full((3,), node))
        assert env._hidden is not None
        return env._hidden.factors

    assert drifted().equal(drifted()) and (drifted() != factors).all()


def test_tsp_env_drifts_and_repeats_under_its_seed():
    env = TSPEnv(num_nodes=5, cost="veering")

    def drifted() -> list[float]:
        env.reset(seed=3)
        found = []
        for node in (1, 2, 3, 4, 0):
            assert env._hidden is not None
            found.append(env._hidden.factors.item())
            env.step(node)
        return found

    first = drifted()
    assert drifted() == first and len(set(first)) == 5


@pytest.mark.parametrize("arguments", [{"count": 0}, {"count": 1, "drift": -0.1}, {"count": 1, "drift": math.nan}])
def test_impossible_hiding_is_refused(arguments: dict[str, Any]):
    with pytest.raises(ValueError, match="drifts by 0 or more"):
        hides(**arguments)


def hidden_env(shown: str = "paid") -> RoutingVectorEnv:
    rules = TSPRules.under(find_costs("stretch", shown=shown))
    return RoutingVectorEnv(rules, num_envs=4, num_nodes=5, device="cpu", generator=torch.Generator().manual_seed(0))


def test_hidden_factors_change_with_every_episode_and_stand_in_no_observation():
    env = hidden_env()
    obs, _ = env.reset()
    assert env._hidden is not None
    factors = env._hidden.factors
    assert obs.keys() == {"coords", "visited", "current_node", "action_mask", "last_node", "last_cost"}
    assert not any((value.double() == factors[0].double()).any() for value in obs.values())
    for node in (1, 2, 3, 4, 0, 0):
        obs, *_ = env.step(torch.full((4,), node))
    assert obs["current_node"].tolist() == [0] * 4
    assert env._hidden is not None and not (env._hidden.factors == factors).any()


def test_hidden_env_shows_the_last_move_and_what_it_cost():
    env = hidden_env()
    obs, _ = env.reset()
    assert obs["last_cost"].tolist() == [[0]] * 4 and obs["last_node"].equal(obs["current_node"])
    env.step(torch.tensor([1, 2, 3, 4]))
    obs, reward, *_ = env.step(torch.tensor([2, 3, 4, 1]))
    assert obs["last_node"].tolist() == [1, 2, 3, 4]
    torch.testing.assert_close(obs["last_cost"][:, 0], -reward)


def test_cost_shown_decides_what_a_hidden_env_shows():
    blank, oracle = hidden_env("nothing"), hidden_env("factors")
    for env in (blank, oracle):
        env.reset()
    obs, reward, *_ = blank.step(torch.tensor([1, 2, 3, 4]))
    assert (reward < 0).all() and (obs["last_cost"] == 0).all()
    obs, *_ = oracle.step(torch.tensor([1, 2, 3, 4]))
    assert oracle._hidden is not None and obs["factors"].equal(oracle._hidden.factors)
    for env in (blank, oracle):
        assert isinstance(env.single_observation_space, spaces.Dict)
        assert env.single_observation_space.keys() == env.observe().keys()


def test_hidden_env_goes_on_exactly_from_its_state_dict():
    env, other = hidden_env(), hidden_env()
    env.reset()
    env.step(torch.tensor([1, 2, 3, 4]))
    other.load_state_dict(env.state_dict())
    first, second = env.step(torch.tensor([2, 3, 4, 1])), other.step(torch.tensor([2, 3, 4, 1]))
    assert first[1].equal(second[1]) and all(first[0][key].equal(second[0][key]) for key in first[0])


def test_fixed_factors_are_the_first_of_more_and_not_the_coordinates():
    few, many = (COSTS["stretch"].fixed_factors(count, seed=1234) for count in (3, 10))
    assert few is not None and many is not None
    assert few.equal(many[:3])
    assert few[0].item() != np.random.RandomState(1234).uniform()


def test_users_world_is_one_function(tmp_path, monkeypatch):
    (tmp_path / "tolls.py").write_text(
        "def toll(origin, target, factors):\n    return 2 * (target - origin).norm(dim=-1)\n"
        "def by_numpy(origin, target, factors):\n    return (target - origin).double().norm(dim=-1)\n"
        "def negative(origin, target, factors):\n    return origin[..., 0] + 1\n"
        "def flat(origin, target, factors):\n    return origin.sum()\n"
        "def misspelt(origin, target, factors):\n    return origin.nrom()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    instance, _ = instance_and_factors(EUCLIDEAN)
    torch.testing.assert_close(find_costs("tolls:toll").matrix(instance), 2 * EUCLIDEAN.matrix(instance))
    assert find_costs("tolls:by_numpy").matrix(instance).dtype == torch.float32
    with pytest.raises(ValueError, match="tolls:negative is not 0 for staying"):
        find_costs("tolls:negative")
    with pytest.raises(ValueError, match="tolls:flat gives .* for 16 moves"):
        find_costs("tolls:flat")
    with pytest.raises(ValueError, match="tolls:misspelt cannot be called .*'nrom'.*tolls.py, line 10"):
        find_costs("tolls:misspelt")


@pytest.mark.parametrize(
    ("name", "shown", "message"),
    [
        ("wind", "paid", "cost is 'wind'; choose one of euclidean, lanes"),
        ("nowhere:toll", "paid", "cost names 'nowhere:toll', which cannot be loaded"),
        ("lanes", "factors", "lanes hides nothing"),
        ("stretch", "all", "cost_shown is 'all'"),
    ],
)
def test_unknown_worlds_are_refused(name: str, shown: str, message: str):
    with pytest.raises(ValueError, match=message):
        find_costs(name, shown=shown)


def test_vector_env_refuses_instances_without_the_factors_of_their_costs():
    with pytest.raises(ValueError, match="factors has shape None, not \\(2, 1\\), for costs of stretch"):
        RoutingVectorEnv(
            TSPRules.under(COSTS["stretch"]), num_envs=2, num_nodes=5, device="cpu", instances=torch.rand(2, 5, 2)
        )
