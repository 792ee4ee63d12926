"""An agent and an environment that do what a script says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from envs.crashes import Restarts
from envs.gym_vector import GymVectorEnv
from parts.acting import Sight
from training.agent import Agent
from training.episodes import GymEvaluator
from training.evaluation import Report

THREE = ({"length": 4, "reward": 1.0}, {"length": 2, "reward": 10.0}, {"length": 7, "reward": 0.5, "by_time": True})


CPU = torch.device("cpu")


class ScriptedAgent:
    """Action 10 t + row at its t-th decision; likes no noise."""

    rows_per_update, batch_length = 1, 1
    memory_spaces: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}

    @property
    def players(self) -> dict[str, Any]:
        return {"policy": self}

    def initial_state(self, num_envs: int) -> dict[str, Any]:
        return {"time": 0, "num_envs": num_envs}

    def act(
        self, sight: Sight, state: dict[str, Any], *, generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Any]]:
        assert generator is None, "an evaluation draws nothing"
        assert bool(sight.is_first.any()) == sight.any_first
        action = 10 * state["time"] + torch.arange(state["num_envs"])
        return action, {**state, "time": state["time"] + 1}

    def memory(self, state: dict[str, Any]) -> dict[str, Tensor]:
        return {}

    def update(self, replay: Any, *, progress: float) -> dict[str, Tensor]:
        raise AssertionError("an evaluation learns nothing")

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def load_weights(self, state: dict[str, Any]) -> None: ...


class Scripted(gymnasium.Env):
    """Shows (time, last action); every step is worth `reward`, and `length` of them make an episode."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 25}
    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(1000)

    def __init__(
        self, *, length: int = 3, reward: float = 1.0, by_time: bool = False, render_mode: str | None = "rgb_array"
    ) -> None:
        self.length, self.reward, self.by_time, self.render_mode = length, reward, by_time, render_mode
        self.seeds: list[int | None] = []
        self.closed = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.time, self.last_action = 0, -1
        return self.observe(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.time, self.last_action = self.time + 1, int(action)
        ended = self.time == self.length
        return self.observe(), self.reward, ended and not self.by_time, ended and self.by_time, {}

    def observe(self) -> np.ndarray:
        return np.array([self.time, self.last_action], np.float32)

    def render(self) -> np.ndarray:
        # Another colour each time: a GIF stores equal frames in a row as one.
        image = np.zeros((8, 8, 3), np.uint8)
        image[:] = (40 * self.time, 20 * len(self.seeds), (self.seeds[-1] or 0) % 200)
        return image

    def close(self) -> None:
        self.closed = True


def factory(*arguments: dict[str, Any]) -> tuple[Callable[[], Scripted], list[Scripted]]:
    """Makes a `Scripted` with each of the arguments in turn, and the list of those made."""
    made: list[Scripted] = []

    def make() -> Scripted:
        made.append(Scripted(**arguments[len(made) % len(arguments)]))
        return made[-1]

    return make, made


def vector_env(make: Callable[[], gymnasium.Env], num_envs: int = 3) -> GymVectorEnv:
    return GymVectorEnv(make, num_envs=num_envs, device=CPU, seed=0, evaluation=True)


def gym_evaluator(make: Callable[[], gymnasium.Env], **changes: Any) -> GymEvaluator:
    settings = {"valid_episodes": 3, "eval_episodes": 6, "most_envs": 6, "restarts": Restarts(allowed=99), **changes}
    return GymEvaluator(make, device=CPU, **settings)


def report_of(evaluator: GymEvaluator, agent: Agent | None = None) -> Report:
    report = evaluator.test(ScriptedAgent() if agent is None else agent)
    assert report is not None
    return report
