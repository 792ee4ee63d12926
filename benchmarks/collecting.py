"""An agent in any number of environments: how fast they are, how fast it acts, and the replay that it fills."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.timing import now
from config import Config
from envs.gym_vector import GymVectorEnv
from envs.routing import RULES
from envs.tasks import ACTION_MASK, ActionSpec
from envs.vector import RoutingVectorEnv
from parts.acting import Sight
from settings.run import RunSettings
from training.replay import Replay
from training.replay_room import make_replay
from training.setup import make_setup

# Routing is stepped as tensors, gymnasium's environments one by one.
TENSOR_COUNTS, GYM_COUNTS = (1, 8, 64, 512, 4096), (1, 8, 64)
# How long each number of environments is watched, at least, and the most that one episode of all of them may take.
ENV_SECONDS, MOST_SECONDS = 1.0, 5.0
# Sequences of each environment in replay.
SEQUENCES = 3


class EnvFigures(NamedTuple):
    """Env steps per second of so many environments: alone, and with the agent acting and storing."""

    environments: int
    alone: float
    acting: float


def make_env(config: Config, agent: Any, num_envs: int) -> RoutingVectorEnv | GymVectorEnv:
    """The environments of a run, any number of them."""
    return make_setup(resized(config, agent, num_envs), agent.device).make_env(agent.generators)


def resized(config: Config, agent: Any, num_envs: int) -> Config:
    """The same config for another number of environments, with room in replay for what is asked of it here."""
    rows = num_envs * 2 * SEQUENCES * steps_at_once(agent)
    return config.replace(envs=num_envs, steps=rows, prefill=rows, replay_capacity=rows)


def steps_at_once(agent: Any) -> int:
    """Steps of every environment that are made at a time: an episode of routing, or a few."""
    return max(16, agent.batch_length)


def any_action(spec: ActionSpec, obs: dict[str, Tensor]) -> Tensor:
    """An action for every environment, and a legal one: the first or the middle."""
    if ACTION_MASK in obs:
        return obs[ACTION_MASK].int().argmax(-1)
    some = next(iter(obs.values()))
    return torch.zeros((some.shape[0], *spec.shape), dtype=spec.dtype, device=some.device)


class Collector:
    """An agent that plays in environments, by policy or plans, and stores what it lives through, as a run does."""

    def __init__(self, agent: Any, env: RoutingVectorEnv | GymVectorEnv, config: Config) -> None:
        self.agent, self.env, self.scale = agent, env, config.reward_scale
        self.player = agent.players[config.act]
        self.obs, self.info = env.reset()
        spec = agent.task.actions
        spaces = {key: (tuple(value.shape[1:]), value.dtype) for key, value in self.obs.items()}
        spaces["action"] = (spec.shape, spec.dtype)
        settings = RunSettings.of(resized(config, agent, env.num_envs))
        self.replay: Replay = make_replay(settings, spaces, memory=agent.memory_spaces, device=agent.device)
        self.state = self.player.initial_state(env.num_envs)
        self.reward = torch.zeros(env.num_envs, device=agent.device)
        self.is_last = self.is_terminal = torch.zeros(env.num_envs, dtype=torch.bool, device=agent.device)

    def step(self) -> int:
        """One step of every environment; how many of them decided anything."""
        first = self.info["is_first"]
        sight = Sight.of(self.obs, self.info)
        action, self.state = self.player.act(sight, self.state, generator=self.agent.generators["acting"])
        ends = {"is_first": first, "is_last": self.is_last, "is_terminal": self.is_terminal}
        row = {**self.obs, **ends, "reward": self.scale * self.reward, "action": action}
        self.replay.add({**row, **self.agent.memory(self.state)})
        self.obs, self.reward, self.is_terminal, truncated, self.info = self.env.step(action)
        self.is_last = self.is_terminal | truncated
        return self.info["decisions"]


def act_and_store(
    agent: Any,
    env: RoutingVectorEnv | GymVectorEnv,
    config: Config,
    *,
    sequences: int = SEQUENCES,
    seconds: float = 0.0,
) -> tuple[float, Replay]:
    """Env steps per second of the agent acting and storing, and the replay that it filled.

    Args:
        agent: acts.
        env: in these.
        config: of the agent's run. Replay has room for twice `SEQUENCES` sequences of each environment.
        sequences: how many of each environment to store, at least.
        seconds: how long to act, at least.
    """
    collector = Collector(agent, env, config)
    begin, steps, rounds = now(agent.device), 0, 0
    while rounds < sequences or (now(agent.device) - begin).wall < seconds:
        steps += sum(collector.step() for _ in range(steps_at_once(agent)))
        rounds += 1
    return steps / (now(agent.device) - begin).wall, collector.replay


def env_speed(env: RoutingVectorEnv | GymVectorEnv, agent: Any) -> float:
    """Env steps per second without an agent."""
    obs, _ = env.reset()
    begin, steps = now(env.device), 0
    while (seconds := (now(env.device) - begin).wall) < ENV_SECONDS:
        for _ in range(steps_at_once(agent)):
            obs, _, _, _, info = env.step(any_action(agent.task.actions, obs))
            steps += info["decisions"]
    return steps / seconds


def environments(config: Config, agent: Any) -> Iterator[EnvFigures]:
    """The figures of each number of environments, until acting for an episode in all of them would take too long."""
    counts = TENSOR_COUNTS if config.task in RULES else GYM_COUNTS
    acting = math.inf
    for count in counts:
        # That many more environments take that many times as long, at most.
        if count * steps_at_once(agent) / acting > MOST_SECONDS:
            return
        with closing(make_env(config, agent, count)) as env:
            alone = env_speed(env, agent)
            acting, _ = act_and_store(agent, env, config, sequences=1, seconds=ENV_SECONDS)
        yield EnvFigures(count, alone, acting)
