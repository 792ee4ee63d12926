"""Environments saved and taken up again, with a state of their own and without."""

import gymnasium
import numpy as np
import pytest
import torch

from envs.bad_inputs import BadInput
from envs.crashes import EnvironmentCrashed
from envs.gym_vector import TRAINING
from tests.gym_scenes import MODES, Faulty, Resumable, seeds, take, through_file


class Unsavable(Resumable):
    def state_dict(self):
        return {"socket": {"open": object()}}


@MODES
@pytest.mark.parametrize(("make_env", "steps_before"), [(Faulty, 0), (Resumable, 8)])
def test_gym_vector_after_a_step_that_raised_has_the_state_before_it(
    vector_env, tmp_path, make_env, steps_before, processes
):
    env = vector_env(make_env, num_envs=2, processes=processes)
    env.reset()
    for _ in range(steps_before):
        env.step(torch.tensor([9, 0]))
    before = env.observe()
    with pytest.raises((BadInput, EnvironmentCrashed)):
        env.step(torch.tensor([9, 0]))
    restored = vector_env(make_env, num_envs=2, processes=processes)
    # The environments themselves went on, so that their episodes are lost.
    assert restored.load_state_dict(through_file(env.state_dict(), tmp_path)).tolist() == [True, True]
    assert all(value.equal(before[key]) for key, value in restored.observe().items())
    assert restored.step(torch.tensor([0, 0]))[4]["is_first"].all()


def limited(env_type):
    # The order of wrappers in gymnasium.make.
    return lambda: gymnasium.wrappers.TimeLimit(gymnasium.wrappers.OrderEnforcing(env_type(length=6)), 4)


@MODES
@pytest.mark.parametrize("steps_before", [0, 2, 4, 5])
def test_gym_vector_goes_on_exactly_where_environments_have_a_state(vector_env, tmp_path, steps_before, processes):
    env = vector_env(limited(Resumable), num_envs=2, processes=processes)
    env.reset()
    for _ in range(steps_before):
        env.step(torch.tensor([1, 2]))
    restored = vector_env(limited(Resumable), num_envs=2, processes=processes)
    lost = restored.load_state_dict(through_file(env.state_dict(), tmp_path))
    assert lost.tolist() == [False, False] and restored.notices == []
    assert restored.observe()["observation"].equal(env.observe()["observation"])
    for _ in range(7):
        expected, found = env.step(torch.tensor([3, 4])), restored.step(torch.tensor([3, 4]))
        assert found[0]["observation"].equal(expected[0]["observation"])
        assert [tensor.tolist() for tensor in found[1:4]] == [tensor.tolist() for tensor in expected[1:4]]
        for name in ("returns", "lengths", "decisions", "any_first"):
            assert found[4][name] == expected[4][name]


class Seeded(Resumable):
    """What follows from the seed alone is no part of its state."""

    def load_state_dict(self, state):
        super().load_state_dict({**state, "seed": self.seed})


@pytest.mark.parametrize("older", [False, True])
def test_gym_vector_takes_an_episode_up_with_the_seed_that_it_began_with(vector_env, older):
    # Older versions began their training with the seeds of evaluations, and did not save them.
    env = vector_env(Seeded, num_envs=2, evaluation=older)
    env.reset()
    state = env.state_dict()
    expected = env.step(torch.tensor([3, 4]))
    if older:
        del state["seeds"]
    for _ in range(2):
        restored = vector_env(Seeded, num_envs=2, seed=0 if older else 7)
        assert not restored.load_state_dict(state).any()
        state = restored.state_dict()
    assert restored.step(torch.tensor([3, 4]))[0]["observation"].equal(expected[0]["observation"])


@MODES
def test_gym_vector_loses_only_running_episodes_without_a_state(vector_env, tmp_path, processes):
    env = vector_env(num_envs=2, processes=processes)
    env.reset()
    take(env, 8, 1)
    env.restarts.used = 7
    restored = vector_env(num_envs=2, processes=processes)
    assert restored.load_state_dict(through_file(env.state_dict(), tmp_path)).tolist() == [False, True]
    assert restored.notices == ["running episodes of environments 1 could not be resumed and end as truncated"]
    assert restored.all_ended and restored.restarts.used == 7
    assert restored.observe()["observation"].equal(env.observe()["observation"])
    # Both rows begin their second episode, with the seeds that it would have had.
    obs, *_, info = restored.step(torch.tensor([0, 0]))
    expected = [np.random.SeedSequence(0, spawn_key=(TRAINING, row, 2)).generate_state(1)[0] for row in range(2)]
    assert seeds(obs) == [np.float32(seed) for seed in expected] and info["decisions"] == 0
    for _ in range(3):
        *_, info = take(restored, 1, 1)
    assert info["returns"] == [33, 33]


def test_gym_vector_says_once_that_a_state_cannot_be_saved(vector_env, tmp_path):
    env = vector_env(Unsavable, num_envs=2)
    env.reset()
    state = env.state_dict()
    env.state_dict()
    assert env.notices == [
        "environment 0 of Unsavable counts as one without state_dict(): TypeError: state_dict()['socket']['open'] is a "
        "object, and only arrays, tensors and plain values can be saved"
    ]
    assert vector_env(Unsavable, num_envs=2).load_state_dict(through_file(state, tmp_path)).all()


def test_gym_vector_refuses_a_state_of_another_size(vector_env):
    env = vector_env(num_envs=2)
    env.reset()
    with pytest.raises(ValueError, match="saved state has 2 environments, not 3"):
        vector_env(num_envs=3).load_state_dict(env.state_dict())
