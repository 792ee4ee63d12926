"""Episodes of any environment, played and written down as files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from config import UserError
from envs.gym_vector import GymVectorEnv
from envs.tasks import ACTION_MASK, ActionSpec
from envs.vector import RoutingVectorEnv
from parts.acting import Sight, random_actions
from system import safe_files
from training import episode_files
from training.agent import Player
from training.episode_files import SUFFIX


class RandomPlayer:
    """Does whatever is legal, each as likely."""

    def __init__(self, actions: ActionSpec) -> None:
        """Take what can be done."""
        self.actions = actions

    def initial_state(self, num_envs: int) -> dict[str, Any]:
        """Nothing is carried from step to step."""
        return {}

    def act(
        self, sight: Sight, state: dict[str, Any], *, generator: torch.Generator | None
    ) -> tuple[Shaped[Tensor, "E *A"], dict[str, Any]]:
        """Draw an action for every environment; `generator` has to be one."""
        assert generator is not None, "nothing is likeliest"
        shape = (len(sight.is_first), *self.actions.shape)
        noise = torch.rand(shape, generator=generator, device=sight.is_first.device)
        return random_actions(self.actions, noise, sight.obs.get(ACTION_MASK)), state


def make_empty(folder: Path) -> None:
    """Make a folder for episodes, where there is none yet.

    Raises:
        UserError: it cannot be made, or has episodes already.
    """
    try:
        safe_files.make_folder(folder)
        taken = any(folder.glob(f"*{SUFFIX}"))
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror or error}); give another --out") from error
    if taken:
        raise UserError(f"{folder} has episodes already; give another --out")


@torch.no_grad()
def record(
    player: Player,
    env: RoutingVectorEnv | GymVectorEnv,
    *,
    episodes: int,
    folder: Path,
    generator: torch.Generator,
    longest: int,
    written: Callable[[int], None],
) -> list[float]:
    """Let a player play, and write each of its episodes into a file; what each has earned.

    Every environment plays as many, up to one: were the first to end taken, short episodes would be too many.

    Args:
        player: plays; what it does is drawn.
        env: where, freshly made.
        episodes: how many.
        folder: an existing one.
        generator: draws what is done.
        longest: steps after which an episode that has not ended is written as one that a time limit has cut; another
            begins there.
        written: called with the number of episodes that are there.

    Raises:
        UserError: a file cannot be written.
    """
    returns: list[float] = []
    left = [episodes // env.num_envs + (row < episodes % env.num_envs) for row in range(env.num_envs)]
    running: list[list[dict[str, np.ndarray]]] = [[] for _ in left]
    obs, info = env.reset()
    no = torch.zeros(env.num_envs, dtype=torch.bool, device=env.device)
    reward, terminated, truncated = torch.zeros(env.num_envs, device=env.device), no, no
    state = player.initial_state(env.num_envs)
    while any(left):
        action, state = player.act(Sight.of(obs, info), state, generator=generator)
        flags = {"is_first": info["is_first"], "is_last": terminated | truncated, "is_terminal": terminated}
        columns = {**obs, **flags, "action": action, "reward": reward}
        rows = {name: value.cpu().numpy() for name, value in columns.items()}
        for place, episode in enumerate(running):
            if not left[place]:
                continue
            episode.append({name: value[place].copy() for name, value in rows.items()})
            if episode[-1]["is_last"] or len(episode) > longest:
                returns.append(_write(folder / f"episode_{len(returns):06d}{SUFFIX}", episode))
                left[place] -= 1
                running[place] = _begun_with(running[place][-1]) if not rows["is_last"][place] else []
                written(len(returns))
        obs, reward, terminated, truncated, info = env.step(action)
    return returns


def _begun_with(row: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The rest of an episode that was cut, as one of its own, which begins where the other was cut."""
    begin = {"is_first": np.True_, "is_last": np.False_, "is_terminal": np.False_, "reward": np.float32(0)}
    return [{**row, **{name: np.asarray(value) for name, value in begin.items()}}]


def _write(path: Path, rows: list[dict[str, np.ndarray]]) -> float:
    """Write an episode; what it has earned.

    Raises:
        UserError: it cannot be written.
    """
    episode = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    episode["is_last"][-1] = True
    # Nothing is done after the end.
    episode["action"][-1] = 0
    try:
        episode_files.write(path, episode)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}); {safe_files.remedy(error)}") from error
    return float(episode["reward"].sum(dtype=np.float64))
