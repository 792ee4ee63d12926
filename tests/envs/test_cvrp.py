import itertools
import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import envs  # noqa: F401  (registers CVRP-v0)
from envs.routing import RULES, CVRPEnv, nearest_node, tour_length
from envs.vector import RoutingVectorEnv
from routing.costs import find_costs
from routing.cvrp import CVRPInstance, CVRPRules, CVRPState, cvrp_instance, random_capacity
from routing.drawing import draw_tour
from routing.pyvrp_reference import reference_plan_costs, reference_plan_lengths

CPU = torch.device("cpu")
# The depot in the middle of a cross with arms of 1, 2, 3 and 4.
CROSS = [[0, 0], [1, 0], [0, 2], [-3, 0], [0, -4]]
DEMAND = [0, 2, 1, 3, 2]


def cross_env(capacity=4, **keywords):
    env = CVRPEnv(num_nodes=5, seed=0, **keywords)
    env.reset(options={"coords": CROSS, "demand": DEMAND, "capacity": capacity})
    return env


def random_instances(count, num_nodes=6, seed=0):
    return CVRPRules.random(count, num_nodes, generator=torch.Generator().manual_seed(seed), device=CPU)


def random_states(count, seed=1, **keywords):
    """Instances, and their states before each decision of random episodes and after, to the longest one's end."""
    instance, draws = random_instances(count, **keywords), torch.Generator().manual_seed(seed)
    states, actions = [CVRPRules.reset(instance)], []
    while not CVRPRules.finished(states[-1]).all():
        actions.append(torch.multinomial(CVRPRules.action_mask(states[-1]).float(), 1, generator=draws)[:, 0])
        states.append(CVRPRules.step(states[-1], actions[-1])[0])
    return instance, states, actions


def plans_by_masks(instance):
    """Every sequence of actions that the rules let through, to the end of its episode."""
    plans: set[tuple[int, ...]] = set()
    open_ends: list[tuple[tuple[int, ...], CVRPState]] = [((), CVRPRules.reset(instance))]
    while open_ends:
        actions, state = open_ends.pop()
        for node in CVRPRules.action_mask(state)[0].nonzero()[:, 0].tolist():
            after, finished = CVRPRules.step(state, torch.tensor([node]))
            if finished:
                plans.add((*actions, node))
            else:
                open_ends.append(((*actions, node), after))
    return plans


def plans_by_hand(demand, capacity):
    """Every order of the customers, cut in every way into routes that a vehicle can carry."""
    plans, customers = set(), range(1, len(demand))
    for order in itertools.permutations(customers):
        for cuts in itertools.product((False, True), repeat=len(order) - 1):
            routes, plan = [[order[0]]], [order[0]]
            for node, cut in zip(order[1:], cuts, strict=True):
                if cut:
                    routes.append([])
                    plan.append(0)
                routes[-1].append(node)
                plan.append(node)
            if all(sum(demand[node] for node in route) <= capacity for route in routes):
                plans.add((*plan, 0))
    return plans


@pytest.mark.parametrize(("demand", "capacity"), [(DEMAND, 4), (DEMAND, 3), (DEMAND, 8), ([0, 1, 0, 1, 1], 2)])
def test_cvrp_rules_accept_every_plan_that_vehicles_can_carry_and_no_other(demand, capacity):
    assert plans_by_masks(cvrp_instance(CROSS, demand, capacity)) == plans_by_hand(demand, capacity)


def test_cvrp_rules_follow_the_load():
    state = CVRPRules.reset(cvrp_instance(CROSS, DEMAND, 4))
    loads, masks = [state.load.item()], [CVRPRules.action_mask(state)[0].int().tolist()]
    for node in (3, 2, 0, 1):
        state, _ = CVRPRules.step(state, torch.tensor([node]))
        loads.append(state.load.item())
        masks.append(CVRPRules.action_mask(state)[0].int().tolist())
    assert loads == [4, 1, 0, 4, 2]
    assert masks == [[0, 1, 1, 1, 1], [1, 0, 1, 0, 0], [1, 0, 0, 0, 0], [0, 1, 0, 0, 1], [1, 0, 0, 0, 1]]


def test_cvrp_env_returns_minus_the_length_of_its_routes():
    env = cross_env()
    steps = [env.step(node) for node in (1, 2, 0, 3, 0, 4, 0)]
    root = math.sqrt(5)
    assert [reward for _, reward, *_ in steps] == pytest.approx([-1, -root, -2, -3, -3, -4, -4])
    assert [terminated for _, _, terminated, *_ in steps] == [False] * 6 + [True]


def test_cvrp_rules_keep_the_depot_open_at_no_cost_when_finished():
    instance, states, _ = random_states(16)
    after, finished = CVRPRules.step(states[-1], torch.zeros(16, dtype=torch.long))
    assert CVRPRules.action_mask(states[-1]).nonzero().tolist() == [[row, 0] for row in range(16)]
    assert finished.all()
    assert CVRPRules.cost(instance, states[-1], after.current).tolist() == [0.0] * 16
    assert CVRPRules.remaining_legs(after).tolist() == [0] * 16


def test_cvrp_remaining_legs_bounds_what_comes_and_is_reached():
    _, states, actions = random_states(64)
    left = torch.stack([CVRPRules.remaining_legs(state) for state in states])
    moved = torch.stack([(state.current != action) for state, action in zip(states[:-1], actions, strict=True)])
    came = moved.flip(0).cumsum(0).flip(0)
    assert (left[:-1] >= came).all()
    alone, finished = CVRPRules.reset(random_instances(1)), torch.tensor([False])
    assert CVRPRules.remaining_legs(alone).item() == CVRPRules.episode_steps(6) == 10
    for count, node in enumerate((1, 0, 2, 0, 3, 0, 4, 0, 5, 0), 1):
        assert not finished
        alone, finished = CVRPRules.step(alone, torch.tensor([node]))
        assert CVRPRules.remaining_legs(alone).item() == 10 - count
    assert finished


def test_cvrp_random_episodes_carry_no_more_than_the_capacity_and_visit_each_customer_once():
    instance, states, actions = random_states(64, num_nodes=21)
    assert min(state.load.min().item() for state in states) >= 0
    visits = torch.stack([torch.nn.functional.one_hot(action, 21) for action in actions]).sum(0)
    assert (visits[:, 1:] == 1).all()
    assert all(CVRPRules.action_mask(state).any(-1).all() for state in states)
    assert len(actions) <= CVRPRules.episode_steps(21)
    assert instance.capacity.unique().tolist() == [30]


def test_cvrp_restore_inverts_observe():
    instance, states, _ = random_states(8)
    for state in states:
        restored_instance, restored_state = CVRPRules.restore(CVRPRules.observe(instance, state))
        assert all(a.equal(b) for a, b in zip(restored_instance[:3], instance[:3], strict=True))
        assert all(a.equal(b) for a, b in zip(restored_state, state, strict=True))


def test_cvrp_augment_keeps_demands_and_distances():
    instance = random_instances(50)
    augmented = CVRPRules.augment(instance, torch.Generator().manual_seed(0))
    assert augmented.demand.equal(instance.demand)
    assert not augmented.coords.equal(instance.coords)
    torch.testing.assert_close(
        torch.cdist(augmented.coords, augmented.coords), torch.cdist(instance.coords, instance.coords)
    )


def test_cvrp_node_features_show_demand_as_a_share_and_the_depot():
    features = CVRPRules.node_features(cvrp_instance(CROSS, DEMAND, 4))[0]
    assert features[:, 2].tolist() == [0, 0.5, 0.25, 0.75, 0.5]
    assert features[:, 3].tolist() == [1, 0, 0, 0, 0]
    assert features[2, :2].tolist() == [-1, 3]


def test_cvrp_reset_refuses_another_first_node():
    with pytest.raises(ValueError, match="begins at the depot"):
        CVRPRules.reset(random_instances(1), torch.tensor([2]))


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_rules_say_everything_that_a_problem_must(rules):
    assert not rules.__abstractmethods__


def test_cvrp_random_instances_have_the_fields_distribution():
    instance = random_instances(2000, num_nodes=21)
    assert instance.demand[:, 0].unique().tolist() == [0]
    assert instance.demand[:, 1:].unique().tolist() == list(range(1, 10))
    assert instance.demand[:, 1:].float().mean().item() == pytest.approx(5, abs=0.05)
    assert [random_capacity(customers + 1) for customers in (20, 50, 100)] == [30, 40, 50]


def test_cvrp_field_instances_are_the_first_rows_of_one_set():
    few, more = (CVRPRules.field_instances(count, 21, seed=1234) for count in (2, 5))
    assert all(a.equal(b[:2]) for a, b in zip(few[:3], more[:3], strict=True))
    draws = np.random.RandomState(1234)
    assert few.coords[1, 0].tolist() == draws.uniform(size=(10_000, 2))[1].tolist()
    assert few.coords.dtype == torch.float64


def test_reference_plans_send_a_vehicle_to_each_customer_that_fills_it(tmp_path):
    coords, demand = np.array([CROSS], dtype=np.float64), np.array([[0, 4, 4, 4, 4]])
    assert reference_plan_lengths(coords, demand, np.array([4]), cache_dir=tmp_path) == pytest.approx(20)
    assert len(list(tmp_path.iterdir())) == 1


def test_reference_plans_are_the_best_of_all_plans(tmp_path):
    instance = random_instances(3, num_nodes=6, seed=3)._replace(capacity=torch.full((3,), 12))
    lengths = reference_plan_lengths(*(part.numpy() for part in instance[:3]), cache_dir=tmp_path)
    for row, length in enumerate(lengths):
        plans = plans_by_hand(instance.demand[row].tolist(), 12)
        each = [tour_length(instance.coords[row][None], torch.tensor([plan])).item() for plan in plans]
        assert length == pytest.approx(min(each), abs=1e-5)


def test_reference_plans_go_by_the_costs_of_either_direction(tmp_path):
    instance = random_instances(3, num_nodes=6, seed=3)._replace(capacity=torch.full((3,), 12))
    costs = find_costs("river").matrix(instance._replace(coords=instance.coords.double()))
    demand, capacity = instance.demand.numpy(), instance.capacity.numpy()
    found = reference_plan_costs(costs.numpy(), demand, capacity, cache_dir=tmp_path)
    for row, cost in enumerate(found):
        plans = [torch.tensor(plan) for plan in plans_by_hand(instance.demand[row].tolist(), 12)]
        each = [costs[row][plan, plan.roll(-1)].sum().item() for plan in plans]
        # PyVRP rounds to a ten-thousandth of the largest.
        assert min(each) <= cost == pytest.approx(min(each), abs=1e-3)


@pytest.mark.parametrize("render_mode", [None, "rgb_array"])
def test_cvrp_env_passes_the_gymnasium_checker_without_a_warning(render_mode):
    check_env(gymnasium.make("CVRP-v0", num_nodes=6, render_mode=render_mode).unwrapped)


def test_cvrp_env_samples_the_depot_only_where_nothing_else_is_legal():
    env = cross_env()
    env.step(1)
    assert {int(env.action_space.sample()) for _ in range(50)} == {2, 4}
    env.step(4)
    assert {int(env.action_space.sample()) for _ in range(5)} == {0}


def test_cvrp_env_shows_load_and_mask():
    obs, _, _, _, info = cross_env().step(3)
    assert (obs["load"].tolist(), obs["capacity"].tolist(), obs["demand"].tolist()) == ([1], [4], DEMAND)
    assert obs["action_mask"].tolist() == info["action_mask"].tolist() == [True, False, True, False, False]


def test_cvrp_env_refuses_the_depot_twice_in_a_row():
    env = cross_env()
    for nodes in ((), (1,)):
        for node in (*nodes, 0)[:-1]:
            env.step(node)
        if nodes:
            env.step(0)
        with pytest.raises(ValueError, match="node 0 is not legal now"):
            env.step(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"demand": [0, 2, 5, 3, 2]}, "node 2 of instance 0 has demand 5 where the capacity is 4: no vehicle"),
        ({"demand": [1, 2, 1, 3, 2]}, "node 0 of instance 0 has demand 1 .* the depot demands nothing"),
        ({"demand": [0, 2, -1, 3, 2]}, "node 2 .* cannot be negative"),
        ({"demand": [0, 2, 0.5, 3, 2]}, "demand is 0.5 at node 2; whole numbers"),
        ({"demand": [0, 2, math.nan, 3, 2]}, "demand is nan at node 2"),
        ({"demand": [2, 1, 3, 2]}, r"shape \(4,\); give \(5,\)"),
        ({"demand": ["a"] * 5}, "must be numbers"),
        ({"capacity": 0}, "capacity must be at least 1"),
        ({"capacity": [4, 4]}, "give one number"),
        ({"coords": CROSS[:4], "demand": DEMAND[:4]}, "has 4 nodes, and this environment takes 5"),
        ({"coords": [[math.inf, 0], *CROSS[1:]]}, "at node 0; coordinates must be finite"),
        ({"coords": 3}, r"shape \(\)"),
        ({"load": 3}, r"no options \['load'\]; there are coords, demand, capacity"),
    ],
)
def test_cvrp_env_refuses_impossible_instances_and_goes_on_with_its_episode(changes, message):
    env = cross_env()
    env.step(3)
    with pytest.raises(ValueError, match=message):
        env.reset(options={"coords": CROSS, "demand": DEMAND, "capacity": 4} | changes)
    assert env.step(2)[0]["load"].tolist() == [0]


def test_cvrp_env_needs_coords_and_demand_together():
    with pytest.raises(ValueError, match="needs demand with it"):
        cross_env().reset(options={"coords": CROSS})


def test_cvrp_env_refuses_a_capacity_that_random_demands_exceed():
    with pytest.raises(ValueError, match="demand 9 where the capacity is 8"):
        CVRPEnv(capacity=8)


def test_cvrp_env_draws_routes_in_colours():
    env = cross_env(render_mode="rgb_array")
    pictures = []
    for node in (1, 0, 2, 0, 3, 0, 4, 0):
        env.step(node)
        pictures.append(env.render())
    colours = [len(np.unique(picture.reshape(-1, 3), axis=0)) for picture in (pictures[1], pictures[-1])]
    assert colours[1] > colours[0]


def test_draw_tour_draws_waiting_at_the_depot_as_nothing():
    coords = np.array(CROSS, dtype=np.float32)
    plan = np.array([0, 1, 2, 0, 3, 4])
    assert np.array_equal(draw_tour(coords, plan), draw_tour(coords, np.append(plan, [0, 0, 0])))


def test_nearest_node_of_a_loaded_vehicle_is_a_legal_one():
    instance = cvrp_instance(CROSS, DEMAND, 4)
    state, _ = CVRPRules.step(CVRPRules.reset(instance), torch.tensor([3]))
    assert nearest_node(instance, state, CVRPRules.action_mask(state)).item() == 0


def test_vector_env_equals_cvrp_env_step_by_step_while_rows_end_one_by_one():
    draws = torch.Generator().manual_seed(0)
    env = RoutingVectorEnv(
        CVRPRules, num_envs=4, num_nodes=6, device=CPU, generator=torch.Generator().manual_seed(3), check_actions=True
    )
    singles = [CVRPEnv(num_nodes=6) for _ in range(4)]
    obs, info = env.reset()
    decisions, ends = 0, 0.0
    for _ in range(40):
        for row in info["is_first"].nonzero()[:, 0].tolist():
            given = {key: obs[key][row].numpy() for key in ("coords", "demand", "capacity")}
            np.testing.assert_equal({k: v[row].numpy() for k, v in obs.items()}, singles[row].reset(options=given)[0])
        ended = [bool(CVRPRules.finished(single._state)) for single in singles]
        actions = torch.multinomial(obs["action_mask"].float(), 1, generator=draws)[:, 0]
        obs, reward, terminated, truncated, info = env.step(actions)
        assert info["is_first"].tolist() == ended
        assert info["decisions"] == 4 - sum(ended)
        decisions += info["decisions"]
        for row in np.flatnonzero(~np.array(ended)).tolist():
            single_obs, *expected, _ = singles[row].step(actions[row])
            np.testing.assert_equal({k: v[row].numpy() for k, v in obs.items()}, single_obs)
            assert [reward[row].item(), terminated[row].item(), truncated[row].item()] == expected
            ends += expected[1]
    assert ends > 8
    assert decisions < 160


def test_vector_env_refuses_a_demand_that_no_vehicle_can_carry():
    instance = random_instances(3)
    demand = instance.demand.clone()
    demand[1, 4] = 1000
    impossible = CVRPInstance(instance.coords, demand, instance.capacity)
    with pytest.raises(ValueError, match="node 4 of instance 1 has demand 1000"):
        RoutingVectorEnv(CVRPRules, num_envs=3, num_nodes=6, device=CPU, instances=impossible)
