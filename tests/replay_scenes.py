"""A replay whose rows say where they come from."""

from __future__ import annotations

import torch
from torch import Tensor

from training.replay import Replay

CPU = torch.device("cpu")
SPACES = {"seen": ((2,), torch.float32), "action": ((), torch.int64)}
Memory = dict[str, tuple[tuple[int, ...], torch.dtype]]
MEMORY: Memory = {"deter": ((2,), torch.float16), "stoch": ((3,), torch.int16)}


class EchoEnv:
    """Episodes of given lengths whose reward names the action that caused it: action 7 gives reward 7.

    The observation is (environment, column), so that a sampled row tells where it comes from. Environment e takes
    action 100 * e + column.
    """

    def __init__(self, *, num_envs: int, episode_rows: list[int]) -> None:
        self.num_envs = num_envs
        self.column = 0
        self.is_first = [
            position == 0 for rows in episode_rows * (1000 // sum(episode_rows)) for position in range(rows)
        ]

    def row(self) -> dict[str, Tensor]:
        env = torch.arange(self.num_envs)
        first, last = self.is_first[self.column], self.is_first[self.column + 1]
        caused_by = torch.zeros(self.num_envs) if first else (100 * env + self.column - 1).float()
        row = {
            "seen": torch.stack((env, torch.full_like(env, self.column)), -1).float(),
            "action": 100 * env + self.column,
            "reward": caused_by,
            "is_first": torch.full((self.num_envs,), first),
            "is_last": torch.full((self.num_envs,), last),
            "is_terminal": torch.full((self.num_envs,), last),
        }
        self.column += 1
        return row


def filled(columns: int, *, length: int = 50, num_envs: int = 3, episode_rows: list[int] | None = None) -> Replay:
    replay = Replay(SPACES, num_envs=num_envs, capacity=num_envs * length, device=CPU)
    env = EchoEnv(num_envs=num_envs, episode_rows=episode_rows or [5])
    for _ in range(columns):
        replay.add(env.row())
    return replay


def remembering(columns: int, *, length: int = 50, memory: Memory = MEMORY) -> tuple[Replay, EchoEnv]:
    """A replay whose memory is where the row comes from."""
    replay = Replay(SPACES, num_envs=3, capacity=3 * length, device=CPU, memory=memory)
    env = EchoEnv(num_envs=3, episode_rows=[5])
    for _ in range(columns):
        replay.add(with_memory(env.row()))
    return replay, env


def with_memory(row: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**row, "deter": row["seen"].half(), "stoch": row["action"][:, None].short() + torch.arange(3).short()}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator(device=CPU).manual_seed(seed)


def reward_bounds(replay: Replay) -> tuple[float, float]:
    return replay.reward_min.item(), replay.reward_max.item()


def assert_equal_rows(left: Replay, right: Replay) -> None:
    assert (left.total, left.oldest) == (right.total, right.oldest)
    assert reward_bounds(left) == reward_bounds(right)
    position = torch.arange(left.oldest, left.total) % left.length
    for name, value in left.rows.items():
        torch.testing.assert_close(right.rows[name][:, position], value[:, position], rtol=0, atol=0)
    torch.testing.assert_close(right.episode_start[:, position], left.episode_start[:, position])
