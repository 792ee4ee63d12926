import copy
import itertools
import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env

import envs  # noqa: F401  (registers TSP-v0)
from envs.routing import TSPEnv, TSPInstance, TSPRules, move_ends, tour_length
from routing.costs import EUCLIDEAN

# A square with a roof: going round it takes three unit sides and two roof sides of sqrt(1/2).
HOUSE = np.array([[0, 0], [1, 0], [1, 1], [0.5, 1.5], [0, 1]], dtype=np.float32)
HOUSE_LENGTH = 3 + math.sqrt(2)
SQUARE = torch.tensor([[[0.0, 0], [1, 0], [1, 1], [0, 1]]])


def house_env(**keywords):
    env = TSPEnv(num_nodes=5, seed=0, **keywords)
    env.reset(options={"coords": HOUSE})
    return env


def random_instance(*batch, num_nodes=5):
    return TSPInstance(coords=torch.rand(*batch, num_nodes, 2, generator=torch.Generator().manual_seed(0)))


def every_state_of_an_episode(instance, first=None):
    """The states before each decision and after the last, each row taking its highest legal node."""
    states = [TSPRules.reset(instance, first)]
    while not TSPRules.finished(states[-1]).all():
        mask = TSPRules.action_mask(states[-1])
        states.append(TSPRules.step(states[-1], mask.shape[-1] - 1 - mask.flip(-1).int().argmax(-1))[0])
    return states


def test_tour_length_of_unit_square_is_four():
    assert tour_length(SQUARE, torch.tensor([[0, 1, 2, 3]])).item() == 4
    assert tour_length(SQUARE, torch.tensor([[0, 2, 1, 3]])).item() == pytest.approx(2 + 2 * math.sqrt(2))


@pytest.mark.parametrize("node", [-1, 4])
def test_tour_length_refuses_nodes_outside_the_instance(node):
    with pytest.raises(ValueError, match=r"outside 0\.\.3"):
        tour_length(SQUARE, torch.tensor([[0, 1, 2, node]]))


def test_euclidean_costs_are_the_distances_between_a_moves_ends():
    coords = torch.tensor([[0.0, 0], [3, 4], [3, 0]])
    origin, target = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 2])
    instance = TSPInstance(coords=coords.expand(3, 3, 2))
    assert EUCLIDEAN.between(instance, origin, target).tolist() == [5, 4, 0]


def test_rules_accept_every_permutation_and_no_other_tour_of_the_house():
    accepted = []
    for tour in itertools.product(range(5), repeat=5):
        state = TSPRules.reset(TSPInstance(coords=torch.from_numpy(HOUSE)))
        legal = True
        for node in tour:
            legal = legal and bool(TSPRules.action_mask(state)[node])
            state, _ = TSPRules.step(state, torch.tensor(node))
        if legal:
            assert TSPRules.finished(state)
            accepted.append(tour)
    assert accepted == [(*rest, 0) for rest in itertools.permutations(range(1, 5))]


def test_rules_cost_of_an_episode_is_the_tour_length():
    instance = random_instance(7)
    states = every_state_of_an_episode(instance)
    moves = [state.current for state in states[1:]]
    total = sum(TSPRules.cost(instance, state, move) for state, move in zip(states, moves, strict=False))
    assert len(moves) == TSPRules.episode_steps(5)
    torch.testing.assert_close(total, tour_length(instance.coords, torch.stack(moves, 1)))


def test_rules_begin_and_end_the_tour_at_the_given_first_node():
    states = every_state_of_an_episode(random_instance(5), first=torch.arange(5))
    assert states[0].current.tolist() == states[-1].current.tolist() == [0, 1, 2, 3, 4]
    assert not any(TSPRules.finished(state).any() for state in states[:-1])


def test_action_mask_has_a_legal_node_in_every_row_and_finished_rows_only_their_first():
    states = every_state_of_an_episode(random_instance(5), first=torch.arange(5))
    assert [TSPRules.action_mask(state).sum(-1).tolist() for state in states] == [[n] * 5 for n in (4, 3, 2, 1, 1, 1)]
    assert TSPRules.action_mask(states[-1]).equal(torch.eye(5, dtype=torch.bool))


def test_rules_keep_a_finished_row_finished_at_no_cost():
    instance = random_instance(3)
    state = every_state_of_an_episode(instance)[-1]
    assert TSPRules.cost(instance, state, state.first).tolist() == [0, 0, 0]
    assert TSPRules.step(state, state.first)[1].all()


def test_rules_do_not_modify_their_inputs():
    instance = random_instance(3)
    state = TSPRules.reset(instance)
    before = copy.deepcopy(state)
    TSPRules.step(state, torch.tensor([1, 2, 3]))
    assert all(a.equal(b) for a, b in zip(state, before, strict=True))


def test_rules_work_the_same_with_any_batch_dimensions():
    instance = random_instance(2, 3)
    flat = TSPInstance(coords=instance.coords.flatten(0, 1))
    for state, flat_state in zip(every_state_of_an_episode(instance), every_state_of_an_episode(flat), strict=True):
        assert TSPRules.action_mask(state).flatten(0, 1).equal(TSPRules.action_mask(flat_state))
        assert TSPRules.remaining_legs(state).flatten().equal(TSPRules.remaining_legs(flat_state))


def test_remaining_legs_counts_down_to_zero_with_the_closing_leg():
    states = every_state_of_an_episode(random_instance(1))
    assert [TSPRules.remaining_legs(state).item() for state in states] == [5, 4, 3, 2, 1, 0]


def test_longest_leg_bounds_every_cost_far_from_the_origin():
    # More than 25 nodes, where cdist would switch to the inexact form by itself.
    coords = random_instance(1, num_nodes=40).coords + 1000
    pairs = torch.cartesian_prod(torch.arange(40), torch.arange(40))
    legs = EUCLIDEAN.at(*move_ends(coords.expand(1600, 40, 2), pairs[:, 0], pairs[:, 1]))
    torch.testing.assert_close(TSPRules.longest_leg(TSPInstance(coords=coords))[0], legs.max(), rtol=1e-6, atol=0)


def test_restore_inverts_observe():
    instance = random_instance(4)
    for state in every_state_of_an_episode(instance):
        restored_instance, restored_state = TSPRules.restore(TSPRules.observe(instance, state))
        assert restored_instance.coords.equal(instance.coords)
        assert all(a.equal(b) for a, b in zip(restored_state, state, strict=True))


def test_augment_draws_all_eight_symmetries_and_keeps_every_distance():
    instance = TSPInstance(coords=torch.rand(5, 2, generator=torch.Generator().manual_seed(0)).expand(200, 5, 2))
    augmented = TSPRules.augment(instance, torch.Generator().manual_seed(0))
    assert len(augmented.coords.unique(dim=0)) == 8
    assert augmented.coords.min() >= 0
    assert augmented.coords.max() <= 1
    torch.testing.assert_close(
        torch.cdist(augmented.coords, augmented.coords), torch.cdist(instance.coords, instance.coords)
    )


@pytest.mark.parametrize("render_mode", [None, "rgb_array"])
def test_tsp_env_passes_the_gymnasium_checker_without_a_warning(render_mode):
    # Warnings are errors in the test run.
    check_env(gymnasium.make("TSP-v0", num_nodes=5, render_mode=render_mode).unwrapped)


def test_tsp_env_returns_minus_the_tour_length():
    env = house_env()
    steps = [env.step(node) for node in (1, 2, 3, 4, 0)]
    rewards = [reward for _, reward, *_ in steps]
    assert rewards == pytest.approx([-1, -1, -math.sqrt(0.5), -math.sqrt(0.5), -1])
    assert sum(rewards) == pytest.approx(-HOUSE_LENGTH)
    assert [terminated for _, _, terminated, _, _ in steps] == [False] * 4 + [True]
    assert not any(truncated for *_, truncated, _ in steps)


def test_tsp_env_shows_the_mask_in_observation_info_and_method():
    env = house_env()
    obs, _, _, _, info = env.step(3)
    assert obs["action_mask"].tolist() == [False, True, True, False, True]
    assert obs["visited"].tolist() == [True, False, False, True, False]
    assert obs["current_node"] == 3
    for mask in (obs["action_mask"], info["action_mask"], env.action_masks()):
        assert mask.dtype == np.bool_
        np.testing.assert_array_equal(mask, obs["action_mask"])


def test_tsp_env_actions_may_be_any_integer_type():
    env = house_env()
    for action in (1, np.int64(2), np.array(3), torch.tensor(4)):
        assert env.step(action)[0]["current_node"] == int(action)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (3, "node 3 is not legal now; legal nodes: \\[1, 2, 4\\]"),
        (0, "node 0 is not legal now"),
        (5, "node 5 is outside 0..4; legal nodes: \\[1, 2, 4\\]"),
        (-1, "node -1 is outside"),
        (1.0, "1.0 is not an integer"),
        ("1", "'1' is not an integer"),
        (None, "None is not an integer"),
        (np.array([1, 2]), "is not an integer"),
    ],
)
def test_tsp_env_refuses_an_impossible_action_and_stays_as_it_was(action, message):
    env, untouched = house_env(), house_env()
    for each in (env, untouched):
        each.step(3)
    with pytest.raises(ValueError, match=message):
        env.step(action)
    for node in (1, 2, 4, 0):
        step, expected = env.step(node), untouched.step(node)
        np.testing.assert_equal(step, expected)
    assert step[2]


def test_tsp_env_must_be_reset_before_the_first_step_and_after_the_last():
    env = TSPEnv(num_nodes=3)
    for call in (lambda: env.step(1), env.action_masks, env.action_space.sample):
        with pytest.raises(ResetNeeded, match="before the first episode"):
            call()
    env.reset()
    for node in (2, 1, 0):
        env.step(node)
    with pytest.raises(ResetNeeded, match="after the end"):
        env.step(0)


@pytest.mark.parametrize("num_nodes", [-1, 0, 2])
def test_tsp_env_refuses_fewer_than_three_nodes(num_nodes):
    with pytest.raises(ValueError, match="at least 3 nodes"):
        TSPEnv(num_nodes=num_nodes)


def test_tsp_env_refuses_an_unknown_render_mode():
    with pytest.raises(ValueError, match="rgb_array"):
        TSPEnv(render_mode="human")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coords": HOUSE[:4]}, r"shape \(4, 2\), and this environment takes \(5, 2\)"),
        ({"coords": HOUSE[:2]}, "at least 3"),
        ({"coords": HOUSE[None]}, r"shape \(1, 5, 2\)"),
        ({"coords": np.where(HOUSE == 1.5, np.nan, HOUSE)}, r"\[0.5, nan\] at node 3; coordinates must be finite"),
        ({"coords": np.where(HOUSE == 1.5, -np.inf, HOUSE)}, "-inf"),
        ({"coords": HOUSE.astype(np.float64) * 1e300}, "1e\\+300"),
        ({"coords": [["a", "b"]] * 5}, "not an array of numbers"),
        ({"coordinates": HOUSE}, "no options \\['coordinates'\\]; there is only 'coords'"),
    ],
)
def test_tsp_env_refuses_impossible_instances_and_goes_on_with_its_episode(options, message):
    env = house_env()
    env.step(2)
    with pytest.raises(ValueError, match=message):
        env.reset(options=options)
    assert env.step(4)[0]["visited"].tolist() == [True, False, True, False, True]


def test_tsp_env_takes_instances_outside_the_unit_square():
    env = TSPEnv(num_nodes=3)
    obs, _ = env.reset(options={"coords": [[0, 0], [-300, 0], [-300, 400]]})
    assert obs in env.observation_space
    assert sum(env.step(node)[1] for node in (1, 2, 0)) == -1200


def test_tsp_env_seed_decides_the_instances_of_all_episodes():
    envs_of_seed = [TSPEnv(seed=seed) for seed in (7, 7, 8)]
    first, same, other = [[env.reset()[0]["coords"] for _ in range(2)] for env in envs_of_seed]
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], other[0])
    np.testing.assert_array_equal(TSPEnv().reset(seed=7)[0]["coords"], first[0])


def test_action_space_samples_only_among_legal_nodes_and_reaches_all_of_them():
    env = house_env()
    env.step(3)
    assert {int(env.action_space.sample()) for _ in range(100)} == {1, 2, 4}
    assert env.action_space.sample(mask=np.array([0, 0, 0, 1, 0], dtype=np.int8)) == 3
    assert env.action_space.sample(probability=np.array([1.0, 0, 0, 0, 0])) == 0


def test_action_space_of_a_copied_env_follows_the_copy():
    env = house_env()
    copied = copy.deepcopy(env)
    for node in (1, 2, 3):
        copied.step(node)
    assert copied.action_space.sample() == 4
    assert {int(env.action_space.sample()) for _ in range(100)} == {1, 2, 3, 4}


def test_tsp_env_runs_in_gymnasiums_own_vector_environment():
    vector_env = gymnasium.make_vec("TSP-v0", num_envs=2, vectorization_mode="sync", num_nodes=5)
    obs, _ = vector_env.reset(seed=0)
    assert obs["coords"].shape == (2, 5, 2)
    obs, *_ = vector_env.step(np.array([1, 2]))
    assert obs["action_mask"].sum(-1).tolist() == [3, 3]


def test_tsp_env_render_changes_with_the_tour():
    env = house_env(render_mode="rgb_array")
    pictures = [env.render()]
    for node in (1, 2, 3, 4, 0):
        env.step(node)
        pictures.append(env.render())
    assert all(picture.dtype == np.uint8 and picture.shape == pictures[0].shape for picture in pictures)
    assert not any(np.array_equal(a, b) for a, b in itertools.pairwise(pictures))


def test_tsp_env_render_needs_a_render_mode_and_an_episode():
    with pytest.raises(ValueError, match="rgb_array"):
        house_env().render()
    with pytest.raises(ResetNeeded, match="nothing to draw"):
        TSPEnv(render_mode="rgb_array").render()
