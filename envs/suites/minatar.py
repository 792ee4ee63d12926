"""MinAtar: five Atari games as grids of 10 x 10 cells."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces
from jaxtyping import UInt8

from config import UserError
from envs.suites.suite import Suite

GAMES = ("asterix", "breakout", "freeway", "seaquest", "space_invaders")
# Pixels a side that a film shows of a cell.
CELL = 16
EMPTY = (20, 20, 24)


class MinAtarTask(gymnasium.Env):
    """Steps a game of MinAtar. What is seen is a grid of flags, one for each kind of thing."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, game: Any, *, actions: list[int], render_mode: str | None) -> None:
        self._game, self._actions, self.render_mode = game, actions, render_mode
        self.observation_space = spaces.Box(0, 1, tuple(game.state_shape()), np.float32)
        self.action_space = spaces.Discrete(len(actions))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        super().reset(seed=seed)
        if seed is not None:
            self._game.seed(seed)
            # The game keeps it from episode to episode.
            self._game.last_action = 0
        self._game.reset()
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take an action."""
        reward, ended = self._game.act(self._actions[int(action)])
        return self._observe(), float(reward), bool(ended), False, {}

    def render(self) -> UInt8[np.ndarray, "H W 3"]:
        """Every cell in the colour of the last kind of thing in it."""
        kinds = self._game.state().shape[-1]
        hues = np.linspace(0, 2 * np.pi, kinds, endpoint=False)[:, None] + np.array([0, 2, 4]) * np.pi / 3
        colours = np.vstack((EMPTY, 140 + 110 * np.cos(hues))).astype(np.uint8)
        last = (self._game.state() * np.arange(1, kinds + 1)).max(-1)
        return colours[last].repeat(CELL, 0).repeat(CELL, 1)

    def _observe(self) -> np.ndarray:
        return self._game.state().astype(np.float32)


class MinAtar(Suite):
    """Tasks are called by the game."""

    EXTRA: ClassVar = "minatar"
    PACKAGES: ClassVar = ("minatar",)

    def tasks(self) -> list[str]:
        """The five games."""
        return list(GAMES)

    def make(
        self,
        name: str,
        *,
        render_mode: str | None = None,
        sticky: float = 0.1,
        ramping: bool = True,
        all_actions: bool = True,
    ) -> gymnasium.Env:
        """The environment of a game, which without arguments is as its authors made it.

        Args:
            name: of the game.
            render_mode: None or "rgb_array".
            sticky: probability that a step takes the action of the step before.
            ramping: whether a game gets harder as it goes on.
            all_actions: all 6, or those that the game needs.

        Raises:
            UserError: an argument cannot be.
        """
        if not 0 <= sticky <= 1:
            raise UserError(f"env.kwargs has sticky {sticky}; {name} takes a probability from 0 to 1")
        from minatar import Environment

        game = Environment(name, sticky_action_prob=sticky, difficulty_ramping=ramping)
        chosen = list(range(game.num_actions())) if all_actions else list(game.minimal_action_set())
        return MinAtarTask(game, actions=chosen, render_mode=render_mode)
