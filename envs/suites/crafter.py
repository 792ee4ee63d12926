"""Crafter: survival in a small open world, seen from above."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces
from jaxtyping import UInt8

from envs.suites.suite import Suite

FILM_SIZE = (256, 256)


class CrafterTask(gymnasium.Env):
    """Steps crafter's own class, which follows the first version of gym."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, *, size: tuple[int, int], length: int, reward: bool, render_mode: str | None) -> None:
        import crafter

        # A seed, so that nothing is drawn from the program's own random numbers.
        self._env = crafter.Env(size=size, length=length, reward=reward, seed=0)
        self.render_mode = render_mode
        self.observation_space = spaces.Box(0, 255, (*size, 3), np.uint8)
        self.action_space = spaces.Discrete(self._env.action_space.n)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode in a world of its own."""
        super().reset(seed=seed)
        if seed is not None:
            # Worlds follow from these two.
            self._env._seed, self._env._episode = seed, 0
        return self._env.reset(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take an action; death terminates, and the end of time truncates."""
        obs, reward, ended, info = self._env.step(int(action))
        dead = info["discount"] == 0
        return obs, float(reward), dead, bool(ended and not dead), {"achievements": info["achievements"]}

    def render(self) -> UInt8[np.ndarray, "H W 3"]:
        """What a person sees."""
        return self._env.render(np.array(FILM_SIZE))


class Crafter(Suite):
    """Tasks are `reward` and `noreward`."""

    EXTRA: ClassVar = "crafter"
    PACKAGES: ClassVar = ("crafter",)

    def tasks(self) -> list[str]:
        """With rewards for achievements, and without any."""
        return ["reward", "noreward"]

    def make(
        self, name: str, *, render_mode: str | None = None, size: Sequence[int] = (64, 64), length: int = 10_000
    ) -> gymnasium.Env:
        """The environment of a task.

        Args:
            name: of the task.
            render_mode: None or "rgb_array".
            size: height and width of the images.
            length: steps after which an episode is truncated.
        """
        height, width = size
        return CrafterTask(size=(height, width), length=length, reward=name == "reward", render_mode=render_mode)
