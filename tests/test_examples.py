import itertools

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env

import checkpoint
import envs  # noqa: F401  (registers the environments)
from envs.examples import PixelGridEnv, SwitchesEnv, SwitchesRules, SwitchesState, TMazeEnv

IDS = ("TMaze-v0", "PixelGrid-v0", "Switches-v0", "SwitchesNoRules-v0")
CLASSES = (TMazeEnv, PixelGridEnv, SwitchesEnv)
LEFT, RIGHT, FORWARD = range(3)


def set_episode(env, **fields):
    """Put the environment into a certain episode, which runs."""
    env.reset(seed=0)
    env.load_state_dict({**env.state_dict(), "episode": {**env.episode._asdict(), **fields}})


def random_action(env, rng):
    mask = env.action_masks() if isinstance(env, SwitchesEnv) else np.ones(int(env.action_space.n), dtype=bool)
    return int(rng.choice(np.flatnonzero(mask)))


def walk(env, rng, num_steps):
    """What `num_steps` random steps return, with a reset (of no seed) after each end."""
    transitions = []
    for _ in range(num_steps):
        transitions.append(env.step(random_action(env, rng)))
        if transitions[-1][2] or transitions[-1][3]:
            transitions.append(env.reset())
    return transitions


def t_maze_return(env, cue, policy):
    """The return of an episode in which `policy` sees nothing but the observation."""
    set_episode(env, cue=cue, cell=0, turn=None, moves=0)
    obs, over, total = env._observe(), False, 0.0
    while not over:
        obs, reward, terminated, truncated, _ = env.step(policy(tuple(obs)))
        total, over = total + reward, terminated or truncated
    return total


@pytest.mark.parametrize("render_mode", [None, "rgb_array"])
@pytest.mark.parametrize("name", IDS)
def test_examples_pass_the_gymnasium_checker_without_a_warning(name, render_mode):
    # Warnings are errors in the test run.
    check_env(gymnasium.make(name, render_mode=render_mode).unwrapped)


@pytest.mark.parametrize("env_class", CLASSES)
def test_examples_resume_exactly_from_a_checkpoint(env_class, tmp_path):
    env, resumed = env_class(), env_class()
    env.reset(seed=3)
    walk(env, np.random.default_rng(0), 17)
    checkpoint.save(tmp_path / "env.pt", env.state_dict())
    # Over several episodes, so that the generator's state counts.
    expected = walk(env, np.random.default_rng(1), 200)
    resumed.load_state_dict(checkpoint.load(tmp_path / "env.pt", torch.device("cpu")))
    np.testing.assert_equal(walk(resumed, np.random.default_rng(1), 200), expected)


@pytest.mark.parametrize("env_class", CLASSES)
def test_examples_resume_before_the_first_and_after_the_last_step(env_class):
    env, resumed = env_class(), env_class()
    resumed.load_state_dict(env.state_dict())
    with pytest.raises(ResetNeeded, match="no episode has begun"):
        resumed.step(0)
    env.reset(seed=0)
    rng, over = np.random.default_rng(0), False
    while not over:
        _, _, terminated, truncated, _ = env.step(random_action(env, rng))
        over = terminated or truncated
    resumed.load_state_dict(env.state_dict())
    with pytest.raises(ResetNeeded, match="after the end"):
        resumed.step(0)


@pytest.mark.parametrize("env_class", CLASSES)
@pytest.mark.parametrize("action", [-1, 99, 0.0, None])
def test_examples_refuse_what_is_no_action_and_stay_as_they_are(env_class, action):
    env = env_class()
    env.reset(seed=0)
    before = env.state_dict()
    with pytest.raises(ValueError, match=r"is not legal now; legal actions: \[0, 1, 2"):
        env.step(action)
    assert env.state_dict() == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TMazeEnv(length=0), "at least 1 cell"),
        (lambda: SwitchesEnv(num_switches=1), "at least 2"),
        (lambda: PixelGridEnv(render_mode="human"), "None or 'rgb_array'"),
        (lambda: PixelGridEnv().reset(options={"goal": 3}), r"no options, got \['goal'\]"),
        (lambda: PixelGridEnv().render(), "render_mode"),
    ],
)
def test_examples_refuse_impossible_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_t_maze_shows_the_cue_in_the_first_observation_only():
    rng = np.random.default_rng(0)
    for _ in range(50):
        left, right = TMazeEnv(length=3), TMazeEnv(length=3)
        set_episode(left, cue=LEFT)
        set_episode(right, cue=RIGHT)
        assert left._observe().tolist() == [1, 0, 0]
        assert right._observe().tolist() == [0, 1, 0]
        over = False
        while not over:
            action = int(rng.integers(3))
            (obs, _, *ends, info), (other_obs, _, *other_ends, other_info) = left.step(action), right.step(action)
            np.testing.assert_array_equal(obs, other_obs)
            assert ends == other_ends and info == other_info
            over = any(ends)


def test_t_maze_draws_both_cues_equally_often():
    env = TMazeEnv()
    env.reset(seed=0)
    cues = [env.reset()[0][:2].argmax() for _ in range(1000)]
    assert np.mean(cues) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("cue", [LEFT, RIGHT])
def test_t_maze_rewards_the_cued_turn_at_the_junction(cue):
    for turn in (LEFT, RIGHT):
        env = TMazeEnv()
        set_episode(env, cue=cue)
        for _ in range(6):
            obs, reward, terminated, truncated, _ = env.step(FORWARD)
            assert (reward, terminated, truncated) == (0, False, False)
        assert obs.tolist() == [0, 0, 1]
        assert env.step(turn)[1:4] == (float(turn == cue), True, False)


def test_t_maze_best_return_is_1_and_half_of_it_without_memory():
    env = TMazeEnv()
    seen = ((1, 0, 0), (0, 1, 0), (0, 0, 0), (0, 0, 1))
    means = []
    for actions in itertools.product((LEFT, RIGHT, FORWARD), repeat=len(seen)):
        policy = dict(zip(seen, actions, strict=True)).__getitem__
        means.append((t_maze_return(env, LEFT, policy) + t_maze_return(env, RIGHT, policy)) / 2)
    assert max(means) == 0.5
    for cue in (LEFT, RIGHT):
        assert t_maze_return(env, cue, lambda obs, cue=cue: cue if obs[2] else FORWARD) == 1


@pytest.mark.parametrize("action", [LEFT, FORWARD])
def test_t_maze_truncates_who_never_turns_at_the_junction(action):
    env = TMazeEnv(length=2)
    set_episode(env, cue=RIGHT)
    assert [env.step(action)[2:4] for _ in range(8)] == [(False, False)] * 7 + [(False, True)]


def test_pixel_grid_reaches_the_goal_along_the_shortest_path():
    env = PixelGridEnv()
    set_episode(env, agent=[2, 2], goal=[0, 3])
    steps = [env.step(action)[1:4] for action in (0, 1, 0)]
    assert steps == [(-0.01, False, False)] * 2 + [(0.99, True, False)]


def test_pixel_grid_truncates_after_fifty_moves_but_not_at_the_goal():
    env = PixelGridEnv()
    set_episode(env, agent=[0, 0], goal=[4, 4])
    assert [env.step(0)[2:4] for _ in range(50)] == [(False, False)] * 49 + [(False, True)]
    set_episode(env, agent=[0, 0], goal=[0, 1], moves=49)
    assert env.step(1)[2:4] == (True, False)


def test_pixel_grid_begins_on_every_pair_of_different_cells():
    env = PixelGridEnv()
    env.reset(seed=0)
    pairs = set()
    for _ in range(6000):
        env.reset()
        pairs.add((*env.episode.agent, *env.episode.goal))
    assert len(pairs) == 25 * 24
    assert all(pair[:2] != pair[2:] for pair in pairs)


def test_pixel_grid_draws_agent_goal_and_border_where_they_are():
    env = PixelGridEnv()
    set_episode(env, agent=[1, 2], goal=[4, 0])
    image = env._observe()
    blue, green = (image == (40, 100, 220)).all(-1), (image == (50, 170, 80)).all(-1)
    assert image.shape == (64, 64, 3)
    assert blue.sum() == green.sum() == 12 * 12
    assert blue[14:26, 26:38].all() and green[50:62, 2:14].all()
    assert len(np.unique(np.concatenate((image[:2], image[-2:])).reshape(-1, 3), axis=0)) == 1


def test_pixel_grid_mean_returns_are_the_documented_ones():
    # Exact, by dynamic programming over all pairs of cells, with moves as the environment makes them.
    env = PixelGridEnv()
    cells = list(itertools.product(range(5), repeat=2))
    pairs = [pair for pair in itertools.product(cells, cells) if pair[0] != pair[1]]
    reward, target = np.zeros((len(pairs), 4)), np.full((len(pairs), 4), len(pairs))
    for index, (agent, goal) in enumerate(pairs):
        for action in range(4):
            set_episode(env, agent=list(agent), goal=list(goal))
            _, reward[index, action], terminated, _, _ = env.step(action)
            if not terminated:
                target[index, action] = pairs.index((tuple(env.episode.agent), goal))
    # The last entry stands for the end.
    best, uniform = np.zeros(len(pairs) + 1), np.zeros(len(pairs) + 1)
    for _ in range(50):
        best = np.append((reward + best[target]).max(1), 0)
        uniform = np.append((reward + uniform[target]).mean(1), 0)
    assert best[:-1].mean() == pytest.approx(1 - 0.01 * 10 / 3)
    assert uniform[:-1].mean() == pytest.approx(0.299, abs=5e-4)


def switches_return(env, values, order):
    set_episode(env, values=list(values), pressed=[False] * len(values))
    steps = [env.step(switch) for switch in order]
    assert [terminated for _, _, terminated, _, _ in steps] == [False] * (len(values) - 1) + [True]
    return sum(reward for _, reward, *_ in steps)


@pytest.mark.parametrize("num_switches", [2, 5, 6])
def test_switches_mean_return_is_1_at_best_and_minus_1_at_worst(num_switches):
    # For a fixed order by rank the return is linear in the sorted values, whose means are evenly spaced in [-1, 1].
    env = SwitchesEnv(num_switches=num_switches)
    values = 1 - 2 * np.arange(1, num_switches + 1) / (num_switches + 1)
    assert switches_return(env, values, range(num_switches)) == pytest.approx(1)
    assert switches_return(env, values, reversed(range(num_switches))) == pytest.approx(-1)


def test_switches_best_order_is_by_falling_value_and_a_random_order_earns_the_mean_value():
    values = (0.3, -0.9, 0.5, 0.1)
    env = SwitchesEnv(num_switches=4)
    returns = {order: switches_return(env, values, order) for order in itertools.permutations(range(4))}
    assert max(returns, key=returns.__getitem__) == (2, 0, 3, 1)
    # No value at all on average: values are drawn around 0. The weights of 4 switches add up to 5.
    assert np.mean(list(returns.values())) == pytest.approx(np.mean(values) * 5)


def test_switches_draws_values_uniformly_between_minus_one_and_one():
    env = SwitchesEnv()
    env.reset(seed=0)
    values = np.concatenate([env.reset()[0]["values"] for _ in range(1000)])
    assert values.mean() == pytest.approx(0, abs=0.03)
    assert values.var() == pytest.approx(1 / 3, abs=0.02)


def test_switches_refuses_a_pressed_switch_and_stays_as_it_is():
    env = SwitchesEnv(num_switches=3)
    env.reset(seed=0)
    env.step(1)
    before = env.state_dict()
    with pytest.raises(ValueError, match=r"action 1 is not legal now; legal actions: \[0, 2\]"):
        env.step(1)
    assert env.state_dict() == before


def test_switches_shows_one_mask_in_three_places_and_never_an_empty_one():
    env = SwitchesEnv(num_switches=3)
    obs, info = env.reset(seed=0)
    masks = [(obs, info, env.action_masks())]
    for switch in (1, 2, 0):
        obs, _, _, _, info = env.step(switch)
        masks.append((obs, info, env.action_masks()))
    expected = [[True, True, True], [True, False, True], [True, False, False], [True, True, True]]
    for (obs, info, mask), legal in zip(masks, expected, strict=True):
        assert obs["action_mask"].tolist() == info["action_mask"].tolist() == mask.tolist() == legal
        assert obs["action_mask"].dtype == bool


def test_switches_rules_agree_with_the_environment_along_random_episodes():
    env, rng = SwitchesEnv(), np.random.default_rng(0)
    rules = env.mask_rules
    assert rules is not None
    for seed in range(20):
        obs, _ = env.reset(seed=seed)
        state, over = rules.restore({"pressed": torch.from_numpy(obs["pressed"])}), False
        while not over:
            action = random_action(env, rng)
            obs, _, over, _, _ = env.step(action)
            state = rules.step(state, torch.tensor(action))
            assert state.pressed.tolist() == obs["pressed"].astype(bool).tolist()
            assert rules.action_mask(state).tolist() == obs["action_mask"].tolist()


def test_switches_rules_take_any_leading_dimensions_and_leave_their_input_alone():
    pressed = torch.rand(2, 3, 4) < 0.5
    state, action = SwitchesState(pressed=pressed.clone()), torch.randint(4, (2, 3))
    following = SwitchesRules().step(state, action)
    assert state.pressed.equal(pressed)
    for index in itertools.product(range(2), range(3)):
        alone = SwitchesRules().step(SwitchesState(pressed=pressed[index]), action[index])
        assert following.pressed[index].equal(alone.pressed)
        assert SwitchesRules().action_mask(following)[index].equal(SwitchesRules().action_mask(alone))


def test_switches_no_rules_hides_the_rules_and_nothing_else():
    with_rules, without = gymnasium.make("Switches-v0").unwrapped, gymnasium.make("SwitchesNoRules-v0").unwrapped
    assert isinstance(with_rules, SwitchesEnv) and isinstance(with_rules.mask_rules, SwitchesRules)
    assert isinstance(without, SwitchesEnv) and without.mask_rules is None
    with_rules.reset(seed=0)
    without.reset(seed=0)
    rngs = np.random.default_rng(0), np.random.default_rng(0)
    np.testing.assert_equal(walk(with_rules, rngs[0], 30), walk(without, rngs[1], 30))


@pytest.mark.parametrize(
    ("env_class", "fields", "size"),
    [
        (TMazeEnv, {}, (48, 112, 3)),
        (PixelGridEnv, {"agent": [0, 0], "goal": [4, 4]}, (64, 64, 3)),
        (SwitchesEnv, {}, (32, 96, 3)),
    ],
)
def test_examples_draw_another_picture_after_a_step(env_class, fields, size):
    env = env_class(render_mode="rgb_array")
    set_episode(env, **fields)
    before = env.render()
    env.step(2)
    after = env.render()
    assert before.shape == after.shape == size and before.dtype == np.uint8
    assert (before != after).any()
