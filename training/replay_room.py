"""Replay of the size that a run needs and memory can hold."""

from __future__ import annotations

import torch

from config import Config, ConfigError
from system.memory import memory_at_hand, readable_bytes
from training.replay import Replay, Spaces
from training.setup import require_room


def make_replay(config: Config, spaces: Spaces, *, memory: Spaces, device: torch.device) -> Replay:
    """Replay with room for what the config keeps of what the run will live through.

    Raises:
        ConfigError: memory would not hold it.
    """
    # Each decision is a row, and so is the end of each episode, which is of one decision at least.
    rows_to_come = 2 * (config.steps + config.envs)
    replay = Replay(
        spaces,
        num_envs=config.envs,
        capacity=config.replay_capacity,
        device=device,
        memory=memory,
        rows_to_come=rows_to_come,
    )
    rows, free = rows_when_full(config), memory_at_hand()
    # Any other device has allocated all of it already.
    if device.type == "cpu" and free is not None and rows * replay.row_bytes > free:
        raise ConfigError(
            f"replay will hold {rows:,} rows of {readable_bytes(replay.row_bytes)}, which are"
            f" {readable_bytes(rows * replay.row_bytes)}, and {readable_bytes(free)} of memory are free; give"
            f" --replay_capacity {free // replay.row_bytes} at most"
        )
    return replay


def rows_when_full(config: Config) -> int:
    """Rows that replay will hold in the end, but for the last rows of episodes."""
    return min(config.replay_capacity, config.steps)


def require_windows(config: Config, rows: int) -> None:
    """Check that replay will hold a window when the first update samples one, and at all.

    Raises:
        ConfigError: prefill or capacity is too small.
    """
    least = dict.fromkeys(("prefill", "replay_capacity"), config.envs * rows)
    require_room(config, least, what=f"a window of {rows} rows each")
