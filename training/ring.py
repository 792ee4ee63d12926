"""The latest rows of experience, whole sequences in one ring of tensors on one device: store and sample.

All environments are appended in lockstep: one call of `add` writes one column, a row for each environment. Columns
are counted from the start of the run and live in a ring, so that column c lies at position c % length. The counters
are host integers; neither `add` nor the samplers wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from config import UserError
from tools import Bounds
from training.fresh_windows import FreshWindows

# Shape and dtype of what is stored of each row, by its name.
Spaces = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
REWARD_AND_ENDS = {
    "reward": ((), torch.float32),
    "is_first": ((), torch.bool),
    "is_last": ((), torch.bool),
    "is_terminal": ((), torch.bool),
}


class Ring:
    """The latest `capacity` rows of experience.

    A row holds an observation, the reward and `is_terminal` that arrived with it (0 and False at `is_first`), and the
    action chosen on seeing it. The samplers alone shift actions: `prev_action` is the action of the row before.

    Attributes:
        length: columns the ring has room for, for each environment.
        total: columns added since the start of the run.
        oldest: the oldest column that is still stored.
        row_bytes: memory that one row takes.
        episode_start: the column in which each stored row's episode began.
        memory: what an agent keeps of each row beside it, and may rewrite: its latent state, say.
        fresh: which rows no window that was drawn `online` has held yet.
        reward_min, reward_max: 0-d, over every finite reward ever added but those at `is_first`; +inf and -inf before.
    """

    def __init__(
        self,
        spaces: Spaces,
        *,
        num_envs: int,
        capacity: int,
        device: torch.device,
        memory: Spaces | None = None,
        rows_to_come: int | None = None,
    ) -> None:
        """Make room for the ring. A CPU takes memory as the ring fills; any other device takes all of it now.

        Args:
            spaces: shape and dtype of every observation key and of `action`, for one environment.
            num_envs: rows in a column.
            capacity: rows that are kept at most, over all environments.
            device: where the rows are kept; generators handed to the samplers live there too.
            memory: likewise, of what an agent keeps of each row.
            rows_to_come: rows that will be added, at most: there is no room made for more. None where that is unknown.

        Raises:
            ValueError: `spaces` lacks `action` or has a name of the ring's own, or the capacity is below two columns or
                above what memory holds.
        """
        reserved = {*REWARD_AND_ENDS, "prev_action", "episode_start", "env", "column", *(memory or {})}
        if "action" not in spaces or reserved & spaces.keys():
            raise ValueError(f"spaces must have 'action' and none of {sorted(reserved)}; got {sorted(spaces)}")
        if capacity < 2 * num_envs:
            raise UserError(f"replay capacity is {capacity} rows; {num_envs} environments need {2 * num_envs} at least")
        self.num_envs = num_envs
        self.device = device
        self.total = self.oldest = 0
        self.fresh = FreshWindows(num_envs=num_envs)
        self._capacity = capacity
        self._spaces = _all_spaces(spaces, memory or {})
        self.row_bytes = row_bytes(spaces, memory or {})
        self._make_room(room(num_envs=num_envs, capacity=capacity, rows_to_come=rows_to_come))
        self.reward_min = torch.full((), torch.inf, device=device)
        self.reward_max = torch.full((), -torch.inf, device=device)

    def _make_room(self, rows: int) -> None:
        """Begin with an empty ring of so many rows.

        Raises:
            ValueError: memory does not hold them.
        """
        self.length = rows // self.num_envs
        try:
            self.rows, self.memory, starts = map(self._allocate, self._spaces)
        # NumPy raises a ValueError for a size that no address reaches.
        except (RuntimeError, MemoryError, ValueError) as error:
            cause = str(error).splitlines()[0]
            remedy = "lower replay_capacity" if self.device.type == "cpu" else "give --replay_device cpu"
            raise UserError(f"{rows} rows of replay do not fit into memory; {remedy} ({cause})") from error
        self.episode_start: Int[Tensor, "E L"] = starts["episode_start"]
        self._rewritten: Bool[Tensor, " L"] = torch.zeros(self.length, dtype=torch.bool, device=self.device)

    def _allocate(self, spaces: Spaces) -> dict[str, Tensor]:
        return {
            name: _zeros((self.num_envs, self.length, *shape), dtype, self.device)
            for name, (shape, dtype) in spaces.items()
        }

    def __len__(self) -> int:
        """Rows stored, over all environments."""
        return (self.total - self.oldest) * self.num_envs

    def add(self, row: Mapping[str, Tensor]) -> None:
        """Append one column, overwriting the oldest once the ring is full. The very first is `is_first` throughout.

        Args:
            row: every observation key, `action`, `reward`, `is_first`, `is_last`, `is_terminal` and everything in
                `memory`, each `[E, ...]`.

        Raises:
            ValueError: a key is missing or unknown, or has another shape or dtype than its space.
        """
        stored = {**self.rows, **self.memory}
        if row.keys() != stored.keys():
            raise ValueError(f"row has keys {sorted(row)}; replay stores {sorted(stored)}")
        position = self.total % self.length
        for name, value in row.items():
            column = stored[name][:, position]
            if value.shape != column.shape or value.dtype != column.dtype:
                raise ValueError(
                    f"row['{name}'] is {value.dtype} {tuple(value.shape)}; "
                    f"replay stores {column.dtype} {tuple(column.shape)}"
                )
            column.copy_(value)
        is_first = self.rows["is_first"][:, position]
        reward = self.rows["reward"][:, position]
        running_start = self.episode_start[:, (self.total - 1) % self.length]
        self.episode_start[:, position] = torch.where(is_first, self.total, running_start)
        # A reward that answers no action, or is not finite, says nothing of the range.
        ignored = is_first | ~reward.isfinite()
        self.reward_min = torch.minimum(self.reward_min, reward.masked_fill(ignored, torch.inf).amin())
        self.reward_max = torch.maximum(self.reward_max, reward.masked_fill(ignored, -torch.inf).amax())
        self.total += 1
        self.oldest = max(self.oldest, self.total - self.length)

    @property
    def rewards(self) -> Bounds:
        """The smallest and the largest reward, 0-d, over every finite one ever added but those at `is_first`."""
        return Bounds(self.reward_min, self.reward_max)

    def sample(
        self, batch: int, length: int, *, whole_episodes: bool, online: bool = False, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """As `sample_episodes` or else `sample_windows`."""
        if whole_episodes:
            return self.sample_episodes(batch, length, generator=generator)
        return self.sample_windows(batch, length, online=online, generator=generator)

    def sample_windows(
        self, batch: int, length: int, *, online: bool = False, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Windows drawn uniformly among all that are stored; they may cross the ends of episodes.

        Args:
            batch: windows to draw, B.
            length: rows in a window, T.
            online: begin with the windows that are `fresh`, each of which comes once, and draw the rest.
            generator: on replay's device.

        Returns:
            Every stored key and `prev_action`, each `[B, T, ...]`. `prev_action` is 0 at `is_first`, and in a
            window's first row where the row before is no longer stored. Also `env` and `column`, where each row
            stands; and each key of `memory` as it stands in the row before the window, `[B, ...]`, 0 where that is no
            longer stored.

        Raises:
            ValueError: fewer than `length` columns are stored.
        """
        self._require_columns(length)
        start = self._draw(self.oldest, self.total - length + 1, batch, generator)
        env = self._draw(0, self.num_envs, batch, generator)
        if online:
            env, start = self._fresh_first(env, start, length)
        else:
            self.fresh.skip(self.total)
        return self._windows(env, start, length)

    def _fresh_first(
        self, env: Int[Tensor, " B"], start: Int[Tensor, " B"], length: int
    ) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"]]:
        """Environment and start of each window, the first ones fresh; the work is the same however many these are."""
        count, column, first = self.fresh.take(len(env), length, oldest=self.oldest, total=self.total)
        index = torch.arange(len(env), device=self.device)
        number, is_fresh = index + first, index < count
        starts = column + number // self.num_envs * length
        return torch.where(is_fresh, number % self.num_envs, env), torch.where(is_fresh, starts, start)

    def sample_episodes(self, batch: int, length: int, *, generator: torch.Generator) -> dict[str, Tensor]:
        """Windows that start at an episode's first row: the episodes of rows drawn uniformly.

        A drawn row whose episode lacks its last rows gives its environment's newest start that has `length` rows.

        Args:
            batch: windows to draw, B.
            length: rows of the longest episode (its steps and the final observation), T. A shorter episode's window
                goes on into the episode after it.
            generator: on replay's device.

        Returns:
            As `sample_windows`; `is_first` is True in every window's first row.

        Raises:
            ValueError: fewer than `length` columns are stored, or the ring is too small to hold a whole episode of
                every environment at all times: 2 * length - 1 columns.
        """
        self._require_columns(length)
        wrapped, stored = self.oldest > 0, self.total - self.oldest
        if wrapped and stored < 2 * length - 1:
            raise UserError(
                f"replay holds {stored} columns; sampling whole episodes of {length} rows needs "
                f"{2 * length - 1}: a capacity of {self.num_envs * (2 * length - 1)} rows or more"
            )
        # Past the first length - 1 columns of a wrapped ring, every row's episode began in a column still stored.
        row = self._draw(self.oldest + (length - 1 if wrapped else 0), self.total, batch, generator)
        env = self._draw(0, self.num_envs, batch, generator)
        newest = self.total - length
        start = self.episode_start[env, row % self.length]
        start = torch.where(start > newest, self.episode_start[env, newest % self.length], start)
        return self._windows(env, start, length)

    def rewrite(self, batch: Mapping[str, Tensor], memory: Mapping[str, Tensor]) -> None:
        """Replace what is kept of the rows of a batch from `sample_windows`, as long as nothing was added since.

        Args:
            batch: what was sampled.
            memory: each key of `memory`, `[B, T, ...]`.
        """
        for name, value in memory.items():
            self.memory[name][batch["env"], batch["column"] % self.length] = value
        self._rewritten[batch["column"] % self.length] = True

    def _stored(self) -> dict[str, Tensor]:
        return {**self.rows, "episode_start": self.episode_start}

    def _require_columns(self, length: int) -> None:
        stored = self.total - self.oldest
        if stored < length:
            raise UserError(f"replay holds {stored} columns; a window of {length} rows needs {length}: prefill more")

    def _draw(self, low: int, high: int, batch: int, generator: torch.Generator) -> Int[Tensor, " B"]:
        return torch.randint(low, high, (batch,), generator=generator, device=self.device)

    def _windows(self, env: Int[Tensor, " B"], start: Int[Tensor, " B"], length: int) -> dict[str, Tensor]:
        envs = env[:, None]
        column = start[:, None] + torch.arange(length, device=self.device)  # [B, T]
        position = column % self.length
        windows = {name: self._gathered(value, envs, position) for name, value in self.rows.items()}
        shifted = self._gathered(self.rows["action"], envs, (column - 1) % self.length)
        windows["prev_action"] = _zero_where(windows["is_first"] | (column <= self.oldest), shifted)
        first = self._memory_at(env, (start - 1) % self.length)
        gone = start <= self.oldest
        before = {name: value.masked_fill(gone.view(-1, *[1] * (value.dim() - 1)), 0) for name, value in first.items()}
        return windows | before | {"env": envs.expand_as(column), "column": column}

    def _memory_at(self, env: Int[Tensor, " B"], position: Int[Tensor, " B"]) -> dict[str, Shaped[Tensor, "B *S"]]:
        return {name: self._gathered(value, env, position) for name, value in self.memory.items()}

    def _gathered(
        self, stored: Shaped[Tensor, "E L *S"], env: Int[Tensor, "*#B"], position: Int[Tensor, "*B"]
    ) -> Shaped[Tensor, "*B *S"]:
        """Rows of environments at positions in the ring."""
        return stored[env, position]


def room(*, num_envs: int, capacity: int, rows_to_come: int | None) -> int:
    """Rows that a replay makes room for."""
    return capacity if rows_to_come is None else min(capacity, max(rows_to_come, 2 * num_envs))


def row_bytes(spaces: Spaces, memory: Spaces) -> int:
    """Memory that a row of these takes, with what replay itself keeps of it."""
    parts = _all_spaces(spaces, memory)
    return sum(math.prod(shape) * dtype.itemsize for part in parts for shape, dtype in part.values())


def _all_spaces(spaces: Spaces, memory: Spaces) -> tuple[Spaces, Spaces, Spaces]:
    return {**spaces, **REWARD_AND_ENDS}, memory, {"episode_start": ((), torch.int64)}


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, for which a CPU takes no memory before they are written to: PyTorch's own are all written to at once."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(shape, dtype=torch.empty(0, dtype=dtype, device=device).numpy().dtype))


def _zero_where(condition: Bool[Tensor, "B T"], value: Tensor) -> Tensor:
    return value.masked_fill(condition.reshape(*condition.shape, *[1] * (value.dim() - 2)), 0)
