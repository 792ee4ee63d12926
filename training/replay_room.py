"""Replay of the size that a run needs and memory can hold."""

from __future__ import annotations

import torch

from config import ConfigError
from settings.run import RunSettings
from system.memory import memory_at_hand, readable_bytes
from training.replay import Replay, Spaces
from training.setup import require_room


def make_replay(settings: RunSettings, spaces: Spaces, *, memory: Spaces, device: torch.device) -> Replay:
    """Replay with room for what the settings keep of what the run will live through.

    Raises:
        ConfigError: memory would not hold it.
    """
    # Each decision is a row, and so is the end of each episode, which is of one decision at least.
    rows_to_come = 2 * (settings.loop.steps + settings.environments.envs)
    replay = Replay(
        spaces,
        num_envs=settings.environments.envs,
        capacity=settings.loop.replay_capacity,
        device=device,
        memory=memory,
        rows_to_come=rows_to_come,
    )
    rows, free = rows_when_full(settings), memory_at_hand()
    # Any other device has allocated all of it already.
    if device.type == "cpu" and free is not None and rows * replay.row_bytes > free:
        raise ConfigError(
            f"replay will hold {rows:,} rows of {readable_bytes(replay.row_bytes)}, which are"
            f" {readable_bytes(rows * replay.row_bytes)}, and {readable_bytes(free)} of memory are free; give"
            f" --replay_capacity {free // replay.row_bytes} at most"
        )
    return replay


def rows_when_full(settings: RunSettings) -> int:
    """Rows that replay will hold in the end, but for the last rows of episodes."""
    return min(settings.loop.replay_capacity, settings.loop.steps)


def require_windows(settings: RunSettings, rows: int) -> None:
    """Check that replay will hold a window when the first update samples one, and at all.

    Raises:
        ConfigError: prefill or capacity is too small.
    """
    least = dict.fromkeys(("prefill", "replay_capacity"), settings.environments.envs * rows)
    require_room(settings, least, what=f"a window of {rows} rows each")
