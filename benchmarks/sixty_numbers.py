"""A task to time a general agent on: 60 numbers to see, 6 actions, and next to nothing to compute.

Module of `--import`: it registers `SixtyNumbers-v0` with gymnasium.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

EPISODE = 200


class SixtyNumbersEnv(gymnasium.Env[np.ndarray, np.int64]):
    """Numbers that drift at random; an action earns one of them. An episode is cut after `EPISODE` steps."""

    observation_space = spaces.Box(-np.inf, np.inf, (60,), np.float32)
    action_space = spaces.Discrete(6)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin at 0."""
        super().reset(seed=seed)
        self.numbers, self.steps = np.zeros(60, np.float32), 0
        return self.numbers, {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Drift; the reward is the number that the action has chosen."""
        noise = self.np_random.standard_normal(60, np.float32)
        self.numbers, self.steps = 0.9 * self.numbers + 0.1 * noise, self.steps + 1
        return self.numbers, float(self.numbers[action]), False, self.steps == EPISODE, {}


gymnasium.register(id="SixtyNumbers-v0", entry_point="benchmarks.sixty_numbers:SixtyNumbersEnv")
