"""Steps of many gymnasium environments: alignment, ends, resets, seeds, and the task that they make up."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.error import ResetNeeded

from envs.gym_tasks import make_gym
from envs.gym_vector import TRAINING, GymVectorEnv
from envs.spaces import observation_keys
from routing.instances import TEST_SEED
from tests.gym_scenes import MODES, Scripted, seeds, take, times


@MODES
def test_gym_vector_aligns_observation_reward_and_end_with_the_action(vector_env, processes):
    env = vector_env(num_envs=2, processes=processes)
    obs, info = env.reset()
    assert times(obs) == [0, 0] and obs["observation"].dtype == torch.float32
    assert info["is_first"].tolist() == [True, True] and info["any_first"] and info["decisions"] == 0
    rewards = []
    for now in range(3):
        time_now, reward, terminated, truncated, info = take(env, 1, 2)
        rewards.append(reward)
        assert time_now == [now + 1] * 2 and terminated == [now == 2] * 2 and truncated == [False] * 2
        assert info["is_first"].tolist() == [False, False] and not info["any_first"] and info["decisions"] == 2
    assert rewards == [[1, 2], [11, 12], [21, 22]]
    assert (info["returns"], info["lengths"]) == ([33, 36], [3, 3])
    assert env.all_ended
    # The actions of ended rows are ignored, even one that would crash.
    time_now, reward, terminated, _, info = take(env, 9, 9)
    assert time_now == [0, 0] and reward == [0, 0] and terminated == [False, False]
    assert info["is_first"].all() and info["any_first"] and info["decisions"] == 0 and info["returns"] == []
    assert not env.all_ended and env.restarts.used == 0


def test_gym_vector_resets_rows_that_end_at_different_times(vector_env):
    env = vector_env(num_envs=2)
    env.reset()
    assert take(env, 8, 0)[:4] == ([1, 1], [8, 0], [False, False], [True, False])
    time_now, reward, _, truncated, info = take(env, 5, 5)
    assert (time_now, reward, truncated) == ([0, 2], [0, 15], [False, False])
    assert info["is_first"].tolist() == [True, False] and info["any_first"] and info["decisions"] == 1
    assert take(env, 5, 5)[4]["returns"] == [0 + 15 + 25]


@pytest.mark.parametrize(
    ("length", "action", "flags"), [(3, 8, (False, True)), (1, 0, (True, False)), (1, 8, (True, False))]
)
def test_gym_vector_keeps_truncation_apart_and_termination_first(vector_env, length, action, flags):
    env = vector_env(lambda: Scripted(length=length))
    env.reset()
    _, _, terminated, truncated, _ = take(env, action)
    assert (terminated[0], truncated[0]) == flags


def test_gym_vector_time_limit_truncates(vector_env):
    env = vector_env(lambda: gymnasium.wrappers.TimeLimit(Scripted(length=9), 2))
    env.reset()
    assert take(env, 0)[2:4] == ([False], [False])
    assert take(env, 0)[2:4] == ([False], [True])


def test_gym_vector_returns_tensors_of_their_own(vector_env):
    env = vector_env()
    first, _ = env.reset()
    step = env.step(torch.tensor([1]))
    env.step(torch.tensor([2]))
    assert times(first) == [0] and times(step[0]) == [1] and step[1].tolist() == [1]


@MODES
def test_gym_vector_seeds_differ_by_environment_episode_and_seed_and_repeat(vector_env, processes):
    def episodes(seed):
        env = vector_env(lambda: Scripted(length=1), num_envs=2, seed=seed, processes=processes)
        found = [seeds(env.reset()[0])]
        for _ in range(2):
            env.step(torch.tensor([0, 0]))
            found.append(seeds(env.step(torch.tensor([0, 0]))[0]))
        return [seed for row in found for seed in row]

    first = episodes(0)
    assert len({*first, *episodes(1)}) == 12
    assert episodes(0) == first
    expected = np.random.SeedSequence(0, spawn_key=(TRAINING, 1, 1)).generate_state(1)[0]
    assert first[1] == np.float32(expected)


def test_gym_vector_begins_no_episode_of_an_evaluation_in_training_whatever_the_seed(vector_env):
    def episodes(evaluation):
        env = vector_env(lambda: Scripted(length=1), num_envs=3, seed=TEST_SEED, evaluation=evaluation)
        found = [*seeds(env.reset()[0])]
        for _ in range(5):
            env.step(torch.zeros(3, dtype=torch.long))
            found += seeds(env.step(torch.zeros(3, dtype=torch.long))[0])
        return found

    evaluated = episodes(True)
    assert len({*episodes(False), *evaluated}) == 36
    # The first test episode, as it has always been.
    assert evaluated[0] == np.float32(np.random.SeedSequence(1234, spawn_key=(0, 1)).generate_state(1)[0])


def test_gym_vector_gives_the_mask_and_all_observations(vector_env):
    env = vector_env(make_gym("gym_TSP-v0", imports=""), num_envs=3)
    obs, info = env.reset()
    assert env.observations == observation_keys(gymnasium.make("TSP-v0").observation_space)
    assert env.actions.masked and obs.keys() == {*env.observations, "action_mask"}
    for _ in range(20):
        assert info["action_mask"].equal(obs["action_mask"]) and obs["action_mask"].dtype == torch.bool
        obs, _, terminated, _, info = env.step(obs["action_mask"].int().argmax(-1))
    assert terminated.all() and env.restarts.used == 0


@MODES
def test_gym_vector_describes_the_task(vector_env, processes):
    env = vector_env(processes=processes)
    assert env.mask_rules == "rules"
    assert env.actions.sizes == (10,) and list(env.observations) == ["observation"]
    assert vector_env(make_gym("gym_CartPole-v1", imports=""), processes=processes).mask_rules is None


def test_gym_vector_scales_continuous_actions(vector_env):
    class Echo(Scripted):
        action_space = spaces.Box(-2, 6, (1,))

        def step(self, action):
            return self.observe(), action, False, False, {}

    env = vector_env(Echo, num_envs=3)
    env.reset()
    assert env.step(torch.tensor([[-1.0], [0.5], [7.0]]))[1].tolist() == [-2, 4, 6]


def test_gym_vector_names_an_observation_that_does_not_fit_its_space(vector_env):
    class Misfit(Scripted):
        def observe(self):
            return np.zeros(3)

    env = vector_env(Misfit)
    with pytest.raises(ValueError, match=r"'observation' has shape \(3,\), but its space is Box"):
        env.reset()


def test_gym_vector_must_be_reset_first(vector_env):
    env = vector_env()
    for call in (lambda: env.step(torch.tensor([0])), env.observe, env.state_dict):
        with pytest.raises(ResetNeeded, match="before the first episode"):
            call()


def test_gym_vector_refuses_impossible_arguments(vector_env):
    with pytest.raises(ValueError, match="num_envs is 0"):
        vector_env(num_envs=0)
    with pytest.raises(ValueError, match="timeout is -1.0"):
        vector_env(timeout=-1.0)


@pytest.mark.parametrize("name", ["zero_keys", "drop_keys"])
def test_gym_vector_refuses_what_is_no_regular_expression(vector_env, name):
    with pytest.raises(ValueError, match=r"^'a\(' is no regular expression: missing \)"):
        vector_env(**{name: "a("})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@MODES
def test_gym_vector_keeps_every_tensor_on_the_gpu(processes):
    env = GymVectorEnv(Scripted, num_envs=2, device="cuda", seed=0, processes=processes)
    obs, info = env.reset()
    step_obs, *tensors, step_info = env.step(torch.zeros(2, dtype=torch.long, device="cuda"))
    found = [*obs.values(), *step_obs.values(), *tensors, info["is_first"], step_info["is_first"]]
    assert {tensor.device.type for tensor in found} == {"cuda"}
    env.close()
