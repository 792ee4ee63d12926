"""What the tests of `GymVectorEnv` share: environments that do as they are told, and short words for what they give."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

import checkpoint
from envs.crashes import Restarts
from envs.gym_vector import GymVectorEnv

MODES = pytest.mark.parametrize("processes", [False, True], ids=["local", "processes"])


class Scripted(gymnasium.Env):
    """Shows (seed, time); the reward for action a at time t is 10 t + a. Action 9 crashes it, 8 ends it by time."""

    mask_rules: Any = "rules"
    observation_space: spaces.Space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space: spaces.Space = spaces.Discrete(10)

    def __init__(self, *, length=3):
        self.length = length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.time = seed, 0
        return self.observe(), {"not picklable": lambda: None}

    def step(self, action):
        if action == 9:
            raise RuntimeError("the simulator\nis gone")
        reward = 10.0 * self.time + action
        self.time += 1
        return self.observe(), reward, self.time == self.length, bool(action == 8), {}

    def observe(self):
        return np.array([self.seed, self.time], np.float64)


class Resumable(Scripted):
    """A `Scripted` with noise in its reward, whose state can be taken."""

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward + self.np_random.random(), terminated, truncated, info

    def state_dict(self):
        numbers = {"array": np.arange(3)[::-1], "scalar": np.float32(0.5), "flags": (True, [None, "text"])}
        state = {"seed": self.seed, "time": self.time, "random": self.np_random.bit_generator.state}
        return state | numbers | {"tensor": torch.ones(2)}

    def load_state_dict(self, state):
        np.testing.assert_array_equal(state["array"], np.array([2, 1, 0]), strict=True)
        assert type(state["scalar"]) is np.float32 and state["scalar"] == 0.5
        assert state["flags"] == (True, [None, "text"]) and state["tensor"].equal(torch.ones(2))
        self.seed, self.time = state["seed"], state["time"]
        self.np_random.bit_generator.state = state["random"]


class Faulty(gymnasium.Env):
    """Action a shows (time, a-th value, time) and rewards as much; action 0 is a good step, 9 one with a bad reward.

    `bad_starts` is how many episodes in a row begin with NaN.
    """

    observation_space = spaces.Dict(
        calm=spaces.Box(-np.inf, np.inf, (1,)), wild=spaces.Box(-np.inf, np.inf, (3,), np.float64)
    )
    action_space = spaces.Discrete(10)
    values = (1.0, np.nan, np.inf, -np.inf, 1e39, -3e38)

    def __init__(self, *, bad_starts=0, length=9):
        self.bad_starts, self.length = bad_starts, length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.time = seed, 0
        self.bad_starts -= 1
        return self.observe(np.nan if self.bad_starts >= 0 else 0.0), {}

    def step(self, action):
        self.time += 1
        reward = np.nan if action == 9 else 2.0
        return self.observe(self.values[action % 9]), reward, self.time == self.length, False, {}

    def observe(self, value):
        return {"calm": np.array([self.seed], np.float32), "wild": np.array([self.time, value, self.time])}


@contextmanager
def vector_envs() -> Iterator[Callable[..., GymVectorEnv]]:
    """What makes environments, of which many may crash, and closes them in the end."""
    made = []

    def make(make_env=Scripted, *, num_envs=1, seed=0, **keywords):
        keywords = {"restarts": Restarts(allowed=99), **keywords}
        made.append(GymVectorEnv(make_env, num_envs=num_envs, device="cpu", seed=seed, **keywords))
        return made[-1]

    yield make
    for env in made:
        env.close()


def times(obs):
    return obs["observation"][:, 1].tolist()


def seeds(obs):
    return obs["observation"][:, 0].tolist()


def wild(obs):
    return obs["wild"].tolist()


def take(env, *actions):
    """One step; returns what it gave as plain numbers, and its info."""
    obs, reward, terminated, truncated, info = env.step(torch.tensor(actions))
    return times(obs), reward.tolist(), terminated.tolist(), truncated.tolist(), info


def through_file(state, folder):
    checkpoint.save(folder / "saved.pt", {"env": state})
    return checkpoint.load(folder / "saved.pt", torch.device("cpu"))["env"]
