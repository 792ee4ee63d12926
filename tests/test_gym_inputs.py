"""Numbers of environments that are not finite: refused, set to 0 or dropped."""

import numpy as np
import pytest
import torch

from envs.bad_inputs import BadInput
from envs.gym_vector import TRAINING
from tests.gym_scenes import MODES, Faulty, Scripted, take, through_file, wild


@pytest.mark.parametrize(("action", "key"), [(1, "wild"), (2, "wild"), (3, "wild"), (4, "wild"), (9, "reward")])
@MODES
def test_gym_vector_refuses_numbers_that_are_not_finite(vector_env, processes, action, key):
    env = vector_env(Faulty, num_envs=2, processes=processes)
    env.reset()
    env.step(torch.tensor([5, 0]))
    with pytest.raises(BadInput) as refusal:
        env.step(torch.tensor([0, action]))
    size = 1 if key == "reward" else 3
    assert str(refusal.value) == (
        f"environment 1 of Faulty, step 2 of its episode: '{key}' has 1 of {size} entries that are NaN, infinite or "
        f"beyond float32; mend the environment, or let such entries be set to 0 with --guard.zero_keys {key}, or such "
        f"episodes be dropped with --guard.drop_keys {key}"
    )


def test_gym_vector_refuses_a_reward_beyond_float32(vector_env):
    class Rich(Scripted):
        def step(self, action):
            return self.observe(), 1e39 if action else 3e38, False, False, {}

    env = vector_env(Rich)
    env.reset()
    assert take(env, 0)[1] == [np.float32(3e38)]
    with pytest.raises(BadInput, match="step 2 of its episode: 'reward' has 1 of 1"):
        take(env, 1)


def test_gym_vector_refuses_a_first_observation_that_is_not_finite(vector_env):
    with pytest.raises(BadInput, match="^environment 0 of Faulty, step 0 of its episode: 'wild' has 1 of 3 entries"):
        vector_env(lambda: Faulty(bad_starts=1)).reset()


@MODES
def test_gym_vector_sets_bad_numbers_to_zero_by_key(vector_env, processes):
    env = vector_env(Faulty, num_envs=2, processes=processes, zero_keys="wild|reward", drop_keys="calm")
    env.reset()
    obs, reward, terminated, truncated, _ = env.step(torch.tensor([1, 5]))
    assert wild(obs) == [[1, 0, 1], [1, np.float32(-3e38), 1]] and reward.tolist() == [2, 2]
    obs, reward, *_ = env.step(torch.tensor([2, 9]))
    assert wild(obs) == [[2, 0, 2], [2, 1, 2]] and reward.tolist() == [2, 0]
    assert not (terminated | truncated).any() and env.bad_inputs == {"wild": 2, "reward": 1} and env.restarts.used == 0
    assert env.notices == [
        "environment 0 of Faulty, step 1 of its episode: 'wild' has 1 of 3 entries that are NaN, infinite or beyond "
        "float32; they are set to 0, now and whenever it happens again",
        "environment 1 of Faulty, step 2 of its episode: 'reward' has 1 of 1 entries that are NaN, infinite or beyond "
        "float32; they are set to 0, now and whenever it happens again",
    ]
    for _ in range(7):
        *_, info = env.step(torch.tensor([0, 0]))
    assert info["returns"] == [18, 16]


@pytest.mark.parametrize(("action", "key"), [(1, "wild"), (9, "reward")])
@MODES
def test_gym_vector_drops_the_rest_of_an_episode_by_key(vector_env, processes, action, key):
    # The bad step would also have ended the episode.
    env = vector_env(lambda: Faulty(length=2), num_envs=2, processes=processes, drop_keys=".*")
    env.reset()
    before = env.step(torch.tensor([0, 0]))[0]
    obs, reward, terminated, truncated, info = env.step(torch.tensor([action, 0]))
    assert obs["wild"][0].equal(before["wild"][0]) and wild(obs)[1] == [2, 1, 2]
    assert reward.tolist() == [0, 2] and terminated.tolist() == [False, True] and truncated.tolist() == [True, False]
    assert info["returns"] == [2, 4] and info["lengths"] == [2, 2]
    assert env.bad_inputs == {key: 1} and env.restarts.used == 0
    assert env.notices == [
        f"environment 0 of Faulty, step 2 of its episode: '{key}' has 1 of {1 if key == 'reward' else 3} entries that "
        "are NaN, infinite or beyond float32; the rest of the episode is dropped, now and whenever it happens again"
    ]
    obs, _, _, truncated, info = env.step(torch.tensor([0, 0]))
    assert wild(obs) == [[0, 0, 0]] * 2 and info["is_first"].all() and not truncated.any()
    assert obs["calm"][0] == np.float32(np.random.SeedSequence(0, spawn_key=(TRAINING, 0, 2)).generate_state(1)[0])


def test_gym_vector_drops_what_is_both_to_be_dropped_and_to_be_set_to_zero(vector_env):
    env = vector_env(Faulty, zero_keys=".*", drop_keys="wild")
    env.reset()
    _, reward, _, truncated, _ = env.step(torch.tensor([9]))
    assert reward.tolist() == [0] and not truncated.any()
    assert env.step(torch.tensor([1]))[3].all()
    # Where every episode begins with a bad value, the run goes on.
    obs, _ = (begun := vector_env(lambda: Faulty(bad_starts=6), zero_keys=".*", drop_keys="wild")).reset()
    assert obs["wild"].isfinite().all() and begun.bad_inputs == {"wild": 6}


def test_gym_vector_advises_an_expression_that_keeps_what_is_let_pass_already(vector_env):
    env = vector_env(Faulty, zero_keys="wi(ld)", drop_keys="calm")
    env.reset()
    with pytest.raises(BadInput, match=r"--guard.zero_keys 'wi\(ld\)\|reward', .* --guard.drop_keys 'calm\|reward'$"):
        env.step(torch.tensor([9]))


@pytest.mark.parametrize("key", ["wil", "eward", ""])
def test_gym_vector_takes_only_keys_that_match_as_a_whole(vector_env, key):
    env = vector_env(Faulty, zero_keys=key, drop_keys=key)
    env.reset()
    with pytest.raises(BadInput):
        env.step(torch.tensor([1]))


@pytest.mark.parametrize("begun", [False, True])
def test_gym_vector_begins_another_episode_where_the_first_observation_is_dropped(vector_env, begun):
    def make(bad_starts):
        return vector_env(lambda: Faulty(bad_starts=bad_starts, length=1), drop_keys="wild")

    def begin(env):
        if not begun:
            return env.reset()
        env.load_state_dict({**saved, "bad_inputs": {"wild": 10}})
        obs, _, _, _, info = env.step(torch.tensor([0]))
        return obs, info

    good = make(0)
    good.reset()
    saved = good.state_dict()
    env = make(5)
    obs, info = begin(env)
    # The environment went through five seeds more.
    expected = np.random.SeedSequence(0, spawn_key=(TRAINING, 0, 6 + begun)).generate_state(1)[0]
    assert obs["calm"].item() == np.float32(expected) and wild(obs) == [[0, 0, 0]] and info["is_first"].all()
    assert env.bad_inputs == {"wild": 5 + 10 * begun} and len([line for line in env.notices if "wild" in line]) == 1
    assert env.step(torch.tensor([0]))[1].tolist() == [2]
    with pytest.raises(BadInput, match="^environment 0 of Faulty, step 0 .* and so began 6 episodes in a row; mend"):
        begin(make(6))


def test_gym_vector_keeps_the_count_of_bad_inputs(vector_env, tmp_path):
    env = vector_env(Faulty, zero_keys="wild")
    env.reset()
    env.step(torch.tensor([1]))
    restored = vector_env(Faulty)
    restored.load_state_dict(through_file(env.state_dict(), tmp_path))
    assert restored.bad_inputs == {"wild": 1}
