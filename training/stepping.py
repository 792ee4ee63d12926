"""An agent in its environments: what it does there, and the rows that replay is to keep of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from envs.gym_vector import GymVectorEnv
from envs.tasks import ACTION_MASK, RoutingTask, Task
from envs.vector import RoutingVectorEnv
from parts.acting import Sight, random_actions
from routing.rules import nearest_node
from settings.run import LoopSettings
from training.agent import Agent
from training.ring import REWARD_AND_ENDS


class Stepped(NamedTuple):
    """One step of every environment.

    Attributes:
        stored: the column that replay keeps, [E, ...]: what was seen, and what was done on seeing it.
        reward: what that has brought, not scaled.
        info: of the environments, after it.
    """

    stored: dict[str, Tensor]
    reward: Float[Tensor, " E"]
    info: dict[str, Any]


class Stepper:
    """Steps environments by what an agent decides.

    Attributes:
        row: what the environments show now, with the reward and the flags that came with it; empty before the first
            episode.
        any_first: whether an episode begins in it.
        acting: what the agent remembers.
    """

    def __init__(
        self,
        agent: Agent,
        task: Task,
        env: RoutingVectorEnv | GymVectorEnv,
        *,
        settings: LoopSettings,
        generators: dict[str, torch.Generator],
        device: torch.device,
    ) -> None:
        """Take the parts together; `meet` begins.

        Args:
            agent: acts.
            task: what is to be solved.
            env: where.
            settings: how it plays, and how it fills replay before it learns.
            generators: `acting` draws what it does.
            device: where it acts.
        """
        self.agent, self.task, self.env = agent, task, env
        self.settings, self.generators, self.device = settings, generators, device
        self.player = agent.players[settings.act]
        self.row: dict[str, Tensor] = {}
        self.any_first = True
        self.acting = self.player.initial_state(env.num_envs)

    def meet(self) -> None:
        """Begin the first episodes."""
        obs, info = self.env.reset()
        self.begin(obs, any_first=info["any_first"])

    def begin(self, obs: dict[str, Tensor], *, any_first: bool) -> None:
        """Go on from first observations."""
        yes = torch.ones(self.env.num_envs, dtype=torch.bool, device=self.device)
        self.row = {
            **obs,
            "reward": torch.zeros(self.env.num_envs, device=self.device),
            "is_first": yes,
            "is_last": ~yes,
            "is_terminal": ~yes,
        }
        self.any_first = any_first

    def step(self, *, prefill: bool) -> Stepped:
        """One step of every environment. Where an environment raises, nothing has moved on.

        Args:
            prefill: choose as `prefill_policy` does.
        """
        obs = {key: value for key, value in self.row.items() if key not in REWARD_AND_ENDS}
        # An agent acts from the first step on, so that it knows the episodes that it takes over from the prefill, and
        # replay holds what it remembered.
        sight = Sight(obs, self.row["is_first"], self.any_first)
        action, acting = self.player.act(sight, self.acting, generator=self.generators["acting"])
        if prefill:
            action = self._prefill_action(obs)
            if "action" in acting:
                acting = {**acting, "action": action}
        obs, reward, terminated, truncated, info = self.env.step(action)
        scaled = {"reward": self.settings.reward_scale * self.row["reward"], "action": action}
        stored = {**self.row, **scaled, **self.agent.memory(acting)}
        self.acting = acting
        self.row = {
            **obs,
            "reward": reward,
            "is_first": info["is_first"],
            "is_last": terminated | truncated,
            "is_terminal": terminated,
        }
        self.any_first = info["any_first"]
        return Stepped(stored, reward, info)

    def _prefill_action(self, obs: dict[str, Tensor]) -> Shaped[Tensor, "E *A"]:
        """Uniform among the legal actions, or in routing the nearest node."""
        if self.settings.prefill_policy == "nearest":
            assert isinstance(self.task, RoutingTask), "settings refuse it elsewhere"
            return nearest_node(*self.task.rules.restore(obs), obs[ACTION_MASK])
        count, generator = self.env.num_envs, self.generators["acting"]
        noise = torch.rand((count, *self.task.actions.shape), generator=generator, device=self.device)
        return random_actions(self.task.actions, noise, obs.get(ACTION_MASK))
