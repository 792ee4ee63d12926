"""Cost worlds over places: what is looked up, which instances are drawn, and what agents see of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from envs.routing import RULES, CVRPRules, TSPEnv, TSPInstance, TSPRules
from envs.vector import RoutingVectorEnv
from routing.places import PlaceCosts
from routing.rules import Instance, Rules
from tests.scenes import CPU, NODES, generator, place_costs
from training.setup import make_evaluation

NUM_PLACES = 15
FIXED, HIDING = place_costs(), place_costs(tables=4)
# Those whose instances have no costs of their own.
PROBLEMS = {name: rules for name, rules in RULES.items() if not rules.shows_costs}


def drawn(rules: type[Rules], count: int = 50, num_nodes: int = NODES) -> Instance:
    return rules.random(count, num_nodes, generator=generator(1), device=CPU)


def by_hand(*tables: list[list[float]]) -> PlaceCosts:
    coords = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    return PlaceCosts("by hand", coords=coords, tables=torch.tensor(tables), hidden=int(len(tables) > 1))


ONE_WAY = [[0.0, 1.0, 2.0], [3.0, 0.0, 4.0], [5.0, 6.0, 0.0]]


def three_nodes(costs: PlaceCosts, *places: int) -> TSPInstance:
    place = torch.tensor([places], dtype=torch.int32)
    return TSPInstance(costs.coords[place.long()], place=place)


def test_place_costs_are_looked_up_from_row_to_column():
    costs = by_hand(ONE_WAY)
    instance = three_nodes(costs, 2, 0, 1)
    assert costs.between(instance, torch.tensor([0]), torch.tensor([1])).tolist() == [5]
    assert costs.between(instance, torch.tensor([1]), torch.tensor([0])).tolist() == [2]
    assert costs.matrix(instance).tolist() == [[[0, 5, 6], [2, 0, 1], [4, 3, 0]]]


@pytest.mark.parametrize(("factor", "times"), [(0.0, 1.0), (0.125, 1.5), (0.25, 2.0), (0.75, 4.0), (0.875, 2.5)])
def test_place_costs_lie_between_the_tables_beside_the_hidden_factor(factor: float, times: float):
    table = torch.tensor(ONE_WAY)
    costs = by_hand(*((scale * table).tolist() for scale in (1, 2, 3, 4)))
    instance, factors = three_nodes(costs, 0, 1, 2), torch.tensor([[factor]])
    torch.testing.assert_close(costs.matrix(instance, factors)[0], times * table)
    torch.testing.assert_close(
        costs.between(instance, torch.tensor([1]), torch.tensor([2]), factors), torch.tensor([times * 4])
    )


def test_place_costs_have_the_mean_of_many_draws():
    instance = drawn(TSPRules.under(HIDING), 1)
    factors = torch.linspace(0, 1, 1001)[:-1, None]
    many = TSPInstance(instance.coords.expand(1000, -1, -1), place=instance.place.expand(1000, -1))
    torch.testing.assert_close(HIDING.matrix(many, factors).mean(0), HIDING.mean_matrix(instance)[0])


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=list(PROBLEMS))
def test_random_instances_are_of_different_places_where_these_lie(problem: type[Rules]):
    instance = drawn(problem.under(FIXED))
    assert all(len(set(row)) == NODES for row in instance.place.tolist())
    assert instance.coords.equal(FIXED.coords[instance.place.long()])
    assert instance.place.dtype == torch.int32


def test_every_place_is_drawn_as_often_as_any_other():
    counts = drawn(TSPRules.under(FIXED), 30_000).place.flatten().bincount(minlength=NUM_PLACES) / 30_000
    torch.testing.assert_close(counts, torch.full((NUM_PLACES,), NODES / NUM_PLACES), rtol=0, atol=0.02)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=list(PROBLEMS))
def test_field_instances_of_places_are_the_first_of_more(problem: type[Rules], monkeypatch):
    rules = problem.under(FIXED)
    more = rules.field_instances(40, NODES, seed=3)
    # Drawn in several pieces.
    monkeypatch.setattr("routing.places.DRAWN_AT_ONCE", 4 * NUM_PLACES)
    few = rules.field_instances(9, NODES, seed=3)
    assert few.place.equal(more.place[:9]) and few.coords.equal(more.coords[:9])
    assert all(len(set(row)) == NODES for row in more.place.tolist())
    assert few.coords.dtype == torch.float64


def test_field_instances_of_places_draw_no_number_of_the_global_generator():
    before = np.random.get_state(legacy=False)  # noqa: NPY002
    TSPRules.under(FIXED).field_instances(5, NODES, seed=3)
    after = np.random.get_state(legacy=False)  # noqa: NPY002
    assert repr(after) == repr(before)


def test_agents_see_places_and_coordinates_and_no_cost():
    env = RoutingVectorEnv(TSPRules.under(FIXED), num_envs=3, num_nodes=NODES, device=CPU, generator=generator(0))
    obs, _ = env.reset()
    assert obs.keys() == {"coords", "place", "visited", "current_node", "action_mask"}
    assert isinstance(env.single_observation_space, spaces.Dict)
    for row in range(3):
        shown = {key: value[row].numpy()[()] for key, value in obs.items()}
        assert env.single_observation_space.contains(shown)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=list(PROBLEMS))
def test_restored_instances_keep_their_places(problem: type[Rules]):
    rules = problem.under(FIXED)
    instance = drawn(rules)
    restored, _ = rules.restore(rules.observe(instance, rules.reset(instance)))
    assert restored.place.equal(instance.place)


def test_curriculum_of_places_pads_with_the_first_node():
    env = RoutingVectorEnv(
        TSPRules.under(FIXED),
        num_envs=3,
        num_nodes=NODES,
        curriculum=[(4, None)],
        device=CPU,
        generator=generator(0),
    )
    obs, _ = env.reset()
    assert obs["place"][:, 4:].equal(obs["place"][:, :1].expand(-1, NODES - 4))


def test_vector_env_charges_what_the_table_says():
    rules = TSPRules.under(FIXED)
    instance = drawn(rules, 4)
    env = RoutingVectorEnv(rules, num_envs=4, num_nodes=NODES, device=CPU, instances=instance)
    obs, _ = env.reset()
    _, reward, *_ = env.step(torch.tensor([1, 2, 3, 4]))
    places = obs["place"].long()
    torch.testing.assert_close(-reward, FIXED.tables[0, places[:, 0], places[torch.arange(4), [1, 2, 3, 4]]])


def test_vector_env_goes_on_with_the_places_of_its_state_dict():
    def env(seed: int) -> RoutingVectorEnv:
        return RoutingVectorEnv(
            TSPRules.under(HIDING), num_envs=3, num_nodes=NODES, device=CPU, generator=generator(seed)
        )

    first, second = env(0), env(1)
    first.reset()
    second.load_state_dict(first.state_dict())
    action = torch.tensor([1, 2, 3])
    for one, other in zip(first.step(action)[:2], second.step(action)[:2], strict=True):
        torch.testing.assert_close(one, other)


def test_evaluation_compares_with_the_best_tours_by_the_table():
    evaluation = make_evaluation(4, 5, seed=1, rules=TSPRules.under(FIXED))
    matrix = FIXED.matrix(evaluation.instance)
    tours = torch.tensor([[0, 1, 2, 3], [0, 1, 3, 2], [0, 2, 1, 3], [0, 2, 3, 1], [0, 3, 1, 2], [0, 3, 2, 1]])
    each: Tensor = sum((matrix[:, a, b] for a, b in zip(tours.T, tours.roll(-1, 1).T, strict=True)), torch.zeros(()))
    np.testing.assert_allclose(evaluation.references, each.amin(1).numpy(), rtol=1e-5)


def test_tsp_env_of_places_draws_them(monkeypatch):
    monkeypatch.setattr("envs.tours.find_costs", lambda _name, **_: FIXED)
    env = TSPEnv(num_nodes=NODES, cost="places")
    obs, _ = env.reset(seed=0)
    assert len(set(obs["place"].tolist())) == NODES
    assert env.observation_space.contains(obs)
    with pytest.raises(ValueError, match="give instances with `place`"):
        env.reset(options={"coords": np.zeros((NODES, 2))})


@pytest.mark.parametrize(
    ("instance", "message"),
    [
        (TSPInstance(torch.rand(1, NODES, 2)), "costs of places are those of moves between places"),
        (TSPInstance(torch.rand(1, NODES, 2), place=torch.full((1, NODES), 15)), "place 15 lies outside 0..14"),
        (TSPInstance(torch.rand(1, NODES, 2), place=torch.full((1, NODES), -1)), "place -1 lies outside 0..14"),
    ],
)
def test_instances_without_costs_are_refused(instance: TSPInstance, message: str):
    with pytest.raises(ValueError, match=message):
        RoutingVectorEnv(TSPRules.under(FIXED), num_envs=1, num_nodes=NODES, device=CPU, instances=instance)


@pytest.mark.parametrize(
    "ask",
    [
        lambda rules: rules.random(2, 16, generator=generator(0), device=CPU),
        lambda rules: rules.field_instances(2, 16, seed=0),
        lambda rules: RoutingVectorEnv(rules, num_envs=2, num_nodes=16, device=CPU, generator=generator(0)),
    ],
)
def test_more_nodes_than_places_are_refused(ask: Any):
    with pytest.raises(ValueError, match="an instance has 16 nodes, and places has 15 places: choose fewer nodes"):
        ask(CVRPRules.under(FIXED))


def test_vector_env_does_not_go_on_with_places_that_are_not_there():
    smaller = PlaceCosts("smaller", coords=FIXED.coords[:8], tables=FIXED.tables[:, :8, :8])
    envs = [
        RoutingVectorEnv(TSPRules.under(costs), num_envs=3, num_nodes=NODES, device=CPU, generator=generator(0))
        for costs in (FIXED, smaller)
    ]
    envs[0].reset()
    with pytest.raises(ValueError, match=r"lies outside 0\.\.7, the places of smaller"):
        envs[1].load_state_dict(envs[0].state_dict())
