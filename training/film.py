"""A film of an agent's episodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from PIL import Image

from config import UserError
from envs.gym_vector import GymVectorEnv
from routing.instances import TEST_SEED
from system.safe_files import replacing
from training.agent import Player
from training.episodes import play


def film(
    player: Player,
    make_env: Callable[[], gymnasium.Env],
    *,
    folder: Path,
    device: torch.device,
    episodes: int = 3,
    most_envs: int = 3,
    **reading: Any,
) -> Path:
    """Write a GIF of the first test episodes into `folder`.

    Args:
        player: plays.
        make_env: makes an environment that draws itself, in this process.
        folder: made if need be.
        device: where the agent lives.
        episodes: how many, one after another.
        most_envs: environments at once.
        reading: `wanted_keys`, `zero_keys` and `drop_keys`; see `GymVectorEnv`.

    Raises:
        UserError: the environment does not draw itself, or the film cannot be written.
    """
    films: list[list[Image.Image]] = [[] for _ in range(episodes)]
    made: list[gymnasium.Env] = []

    def make_and_keep() -> gymnasium.Env:
        made.append(make_env())
        return made[-1]

    def shoot(playing: dict[int, int]) -> None:
        for row, episode in playing.items():
            films[episode].append(_frame(made[row]))

    num_envs = min(episodes, most_envs)
    env = GymVectorEnv(make_and_keep, num_envs=num_envs, device=device, seed=TEST_SEED, evaluation=True, **reading)
    try:
        if made[0].render_mode != "rgb_array":
            raise UserError(f"{made[0].spec} has no render_mode rgb_array, so it cannot be filmed")
        with _writing_film(folder):
            folder.mkdir(parents=True, exist_ok=True)
        play(player, env, episodes=episodes, after_step=shoot)
        pace = made[0].metadata.get("render_fps", 30)
    finally:
        env.close()
    frames = [frame for film in films for frame in film]
    path = folder / "episodes.gif"
    with _writing_film(folder), replacing(path) as temporary:
        frames[0].save(temporary, save_all=True, append_images=frames[1:], duration=1000 / pace, loop=0)
    return path


def _frame(env: gymnasium.Env) -> Image.Image:
    """What an environment draws.

    Raises:
        UserError: it is no picture.
    """
    frame = np.asarray(env.render())
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3:
        raise UserError(
            f"{env.spec} draws {frame.dtype} {frame.shape}, so it cannot be filmed: let render() give uint8"
            " [height, width, 3]"
        )
    return Image.fromarray(frame)


@contextmanager
def _writing_film(folder: Path) -> Iterator[None]:
    """Say in one line that a folder cannot be written to."""
    try:
        yield
    except OSError as error:
        raise UserError(f"no film can be written to {folder} ({error.strerror}); give another folder") from error
