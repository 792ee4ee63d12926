"""Replay of the size that a run needs and memory can hold."""

from __future__ import annotations

import torch

from config import ConfigError
from envs.tasks import Task
from settings.run import RunSettings
from system.memory import free_memory, memory_at_hand, readable_bytes
from training.host_replay import HostReplay
from training.replay import Replay
from training.ring import Spaces, room, row_bytes
from training.setup import require_room

# The share of a device's free memory that rows may take under `replay_device: auto`; updates need the rest.
MOST_OF_DEVICE = 0.5


def make_replay(
    settings: RunSettings, spaces: Spaces, *, memory: Spaces, device: torch.device, recorded: int = 0
) -> Replay:
    """Replay with room for what the settings keep of what the run will live through, where `replay_device` says.

    Args:
        settings: of the run.
        spaces: as for `Replay`.
        memory: likewise.
        device: where the run learns.
        recorded: rows that others have lived through, and that come first.

    Raises:
        ConfigError: memory would not hold it, or it is to be on a GPU that the run does not learn on.
    """
    # Each decision is a row, and so is the end of each episode, which is of one decision at least.
    size = {
        "num_envs": settings.environments.envs,
        "capacity": settings.loop.replay_capacity,
        "rows_to_come": recorded + 2 * (settings.loop.steps + settings.environments.envs),
    }
    replay: Replay
    if on_host(settings.machine.replay_device, device, needed=room(**size) * row_bytes(spaces, memory)):
        replay = HostReplay(spaces, learns_on=device, memory=memory, **size)
    else:
        replay = Replay(spaces, device=device, memory=memory, **size)
    rows, free = rows_when_full(settings, recorded=recorded), memory_at_hand()
    # Any other device has allocated all of it already.
    if replay.device.type == "cpu" and free is not None and rows * replay.row_bytes > free:
        raise ConfigError(
            f"replay will hold {rows:,} rows of {readable_bytes(replay.row_bytes)}, which are"
            f" {readable_bytes(rows * replay.row_bytes)}, and {readable_bytes(free)} of memory are free; give"
            f" --replay_capacity {free // replay.row_bytes} at most"
        )
    return replay


def on_host(choice: str, device: torch.device, *, needed: int) -> bool:
    """Whether the host keeps the rows for another device.

    Args:
        choice: `replay_device`.
        device: where the run learns.
        needed: bytes of all rows. `auto` leaves them to the host where they are more than `MOST_OF_DEVICE` of what the
            device has free, once the agent is there.

    Raises:
        ConfigError: they are to be on a GPU, and the run learns on none.
    """
    if device.type == "cpu":
        if choice == "cuda":
            raise ConfigError("replay_device is cuda, and the run learns on the cpu; give --replay_device auto")
        return False
    if choice != "auto":
        return choice == "cpu"
    free = free_memory(device)
    return free is not None and needed > MOST_OF_DEVICE * free


def rows_when_full(settings: RunSettings, *, recorded: int = 0) -> int:
    """Rows that replay will hold in the end, but for the last rows of episodes that are lived through."""
    return min(settings.loop.replay_capacity, recorded + settings.loop.steps)


def require_sequences(settings: RunSettings, task: Task, rows: int) -> None:
    """Check that replay will hold sequences of so many rows, whole episodes or windows, at the first update and at all.

    Raises:
        ConfigError: prefill or capacity is too small.
    """
    if task.sequence(rows)[1]:
        require_episodes(settings, rows)
    else:
        require_windows(settings, rows)


def require_episodes(settings: RunSettings, rows: int) -> None:
    """Check that replay will hold whole episodes when the first update samples them, and at all.

    Raises:
        ConfigError: prefill or capacity is too small.
    """
    envs = settings.environments.envs
    least = {"prefill": envs * rows, "replay_capacity": envs * (2 * rows - 1)}
    require_room(settings, least, what=f"whole episodes of {rows} rows each")


def require_windows(settings: RunSettings, rows: int) -> None:
    """Check that replay will hold a window when the first update samples one, and at all.

    Raises:
        ConfigError: prefill or capacity is too small.
    """
    least = dict.fromkeys(("prefill", "replay_capacity"), settings.environments.envs * rows)
    require_room(settings, least, what=f"a window of {rows} rows each")
