"""MiniGrid and BabyAI: rooms seen in part, with a mission in words."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces
from jaxtyping import Int

from envs.suites.suite import Suite

FAMILIES = ("MiniGrid-", "BabyAI-")
# So many colours and things of a mission are told, in its order; "put the red ball next to the green box" has four.
MISSION_WORDS = 6


class MissionInNumbers(gymnasium.ObservationWrapper):
    """Tells of a mission the colours and things that it names, in its order; or leaves it out.

    What varies from one episode of a task to the next is which of them; the words between them hardly do.
    """

    def __init__(self, env: gymnasium.Env, *, mission: bool) -> None:
        super().__init__(env)
        from minigrid.core.constants import COLOR_NAMES, OBJECT_TO_IDX

        # Class 0 is no word.
        words = [*sorted(COLOR_NAMES), *sorted(OBJECT_TO_IDX)]
        self._numbers = {word: number for number, word in enumerate(words, start=1)}
        assert isinstance(env.observation_space, spaces.Dict)
        parts = {key: part for key, part in env.observation_space.items() if key != "mission"}
        if mission:
            parts["mission"] = spaces.MultiDiscrete([len(words) + 1] * MISSION_WORDS)
        self._told = mission
        self.observation_space = spaces.Dict(parts)

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        """The observation with the mission in numbers."""
        obs = {key: part for key, part in observation.items() if key != "mission"}
        return {**obs, "mission": self._of(observation["mission"])} if self._told else obs

    def _of(self, mission: str) -> Int[np.ndarray, " M"]:
        words = mission.lower().replace(",", " ").split()
        numbers = [self._numbers[word] for word in words if word in self._numbers][:MISSION_WORDS]
        return np.array(numbers + [0] * (MISSION_WORDS - len(numbers)))


class MiniGrid(Suite):
    """Tasks are called by their ids: MiniGrid-MemoryS7-v0, BabyAI-GoToRedBall-v0."""

    EXTRA: ClassVar = "minigrid"
    PACKAGES: ClassVar = ("minigrid",)

    def tasks(self) -> list[str]:
        """Every id that the package registers."""
        import minigrid  # noqa: F401

        return sorted(name for name in gymnasium.registry if name.startswith(FAMILIES))

    def make(
        self, name: str, *, render_mode: str | None = None, mission: bool = True, **arguments: Any
    ) -> gymnasium.Env:
        """The environment of a task: a view of 7 x 7 cells, the direction, and the mission in numbers.

        Args:
            name: of the task.
            render_mode: None or "rgb_array".
            mission: whether the mission is told.
            arguments: of the environment, such as agent_view_size.
        """
        import minigrid  # noqa: F401

        return MissionInNumbers(gymnasium.make(name, render_mode=render_mode, **arguments), mission=mission)
