"""The deep sea: a small grid whose treasure random actions hardly ever reach (Osband et al. 2019, bsuite)."""

from __future__ import annotations

import numpy as np
from gymnasium import spaces
from jaxtyping import Float, UInt8

from envs.examples import AGENT, FLOOR, GOAL, DeepSeaEpisode, ExampleEnv


class DeepSeaEnv(ExampleEnv[DeepSeaEpisode]):
    """To be learnt: to explore. Registered as `DeepSea-v0`.

    A diver begins in the upper left corner of a square of `size` cells, and sinks by a row with each move: to the left
    or to the right, as far as the walls allow. Which of the two actions leads to the right is another in each cell, and
    the same in every episode. A move to the right costs 0.01 / `size`; one in the last column, which only a diver can
    make who has gone to the right all the way, gives 1 for the treasure. So random actions find it in one of 2^size
    episodes, and what is learnt meanwhile speaks against looking for it. The best return is 0.99.

    Observation: the cells, 1 where the diver is; all 0 below the last row, where the episode ends.
    Actions: 0 and 1.

    Args:
        size: cells of a side.
        mapping_seed: decides which action leads to the right in which cell, as in bsuite, whose tasks have 42.
        render_mode: None, or "rgb_array".
    """

    MOVE_COST = 0.01
    CELL_PIXELS = 8
    episode_type = DeepSeaEpisode

    def __init__(self, *, size: int = 10, mapping_seed: int = 42, render_mode: str | None = None):
        if size < 2:
            raise ValueError(f"size is {size}; a deep sea has 2 rows at least")
        super().__init__(render_mode=render_mode)
        self.size = size
        # The published tasks are defined by numpy's legacy generator.
        self.right = np.random.RandomState(mapping_seed).binomial(1, 0.5, (size, size))
        self.observation_space = spaces.Box(0, 1, (size, size), np.float32)
        self.action_space = spaces.Discrete(2)

    def _begin(self) -> DeepSeaEpisode:
        return DeepSeaEpisode()

    def _move(self, episode: DeepSeaEpisode, action: int) -> tuple[DeepSeaEpisode, float, bool, bool]:
        row, column = episode
        to_right = action == self.right[row, column]
        reward = float(to_right and column == self.size - 1) - to_right * self.MOVE_COST / self.size
        column = min(max(column + (1 if to_right else -1), 0), self.size - 1)
        return DeepSeaEpisode(row + 1, column), reward, row + 1 == self.size, False

    def _observe(self) -> Float[np.ndarray, "N N"]:
        cells = np.zeros((self.size, self.size), np.float32)
        if self.episode.row < self.size:
            cells[self.episode] = 1.0
        return cells

    def _draw(self) -> UInt8[np.ndarray, "H W 3"]:
        cells = np.tile(FLOOR, (self.size, self.size, 1))
        cells[-1, -1] = GOAL
        if self.episode.row < self.size:
            cells[self.episode] = AGENT
        return cells.repeat(self.CELL_PIXELS, axis=0).repeat(self.CELL_PIXELS, axis=1)
