"""Atari games, preprocessed as DreamerV3's release does: four frames a decision, the brighter of the last two shown."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium
from gymnasium.wrappers import MaxAndSkipObservation

from config import UserError
from envs.suites.suite import Suite

# Half an hour of play at 60 frames a second.
MOST_FRAMES = 108_000


class IdleStart(gymnasium.Wrapper):
    """Episodes begin after a random number of frames in which nothing is done."""

    def __init__(self, env: gymnasium.Env, most: int) -> None:
        super().__init__(env)
        self._most = most

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        obs, info = self.env.reset(seed=seed, options=options)
        for _ in range(self.unwrapped.np_random.integers(self._most + 1)):
            obs, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                obs, info = self.env.reset(options=options)
        return obs, info


class Atari(Suite):
    """Tasks are called by the game: pong, ms_pacman."""

    EXTRA: ClassVar = "atari"
    PACKAGES: ClassVar = ("ale_py",)

    def tasks(self) -> list[str]:
        """Every game of which there is a file."""
        from ale_py import roms

        return sorted(roms.get_all_rom_ids())

    def make(
        self,
        name: str,
        *,
        render_mode: str | None = None,
        sticky: float = 0.25,
        frames: int = 4,
        idle: int = 30,
        all_actions: bool = True,
    ) -> gymnasium.Env:
        """The environment of a game.

        Args:
            name: of the game.
            render_mode: None or "rgb_array".
            sticky: probability that a frame takes the action of the frame before.
            frames: of a decision, 2 or more; the brighter pixels of the last two are shown.
            idle: the most frames in which nothing is done at the beginning.
            all_actions: all 18, or those that the game needs.

        Raises:
            UserError: an argument cannot be.
        """
        if frames < 2 or not 0 <= sticky < 1 or idle < 0:
            raise UserError(
                f"env.kwargs has sticky {sticky}, frames {frames}, idle {idle}; {name} takes sticky from 0 to below 1,"
                " frames from 2 and idle from 0"
            )
        import ale_py

        # Its greeting would stand in the middle of a run's own lines.
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        env = ale_py.AtariEnv(
            game=name,
            frameskip=1,
            repeat_action_probability=sticky,
            full_action_space=all_actions,
            max_num_frames_per_episode=MOST_FRAMES,
            render_mode=render_mode,
        )
        return MaxAndSkipObservation(IdleStart(env, idle), frames)
