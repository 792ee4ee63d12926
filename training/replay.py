"""Replay: whole sequences in one ring of tensors on one device; store, sample, save.

A ring that a device has no room for is kept by the host: `training.host_replay`.

All environments are appended in lockstep: one call of `add` writes one column, a row for each environment. Columns
are counted from the start of the run and live in a ring, so that column c lies at position c % length. The counters
are host integers; neither `add` nor the samplers wait for the device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from checkpoint import CheckpointError
from config import UserError
from system import safe_files
from tools import Bounds
from training import chunks
from training.chunks import Chunk

# Shape and dtype of what is stored of each row, by its name.
Spaces = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
# The most bytes of memory in a file, but for its frame: what a save needs beside the ring, and writes for a change.
MEMORY_FILE_BYTES = 2**25
REWARD_AND_ENDS = {
    "reward": ((), torch.float32),
    "is_first": ((), torch.bool),
    "is_last": ((), torch.bool),
    "is_terminal": ((), torch.bool),
}


class Replay:
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
        notices: lines that the user should read. Whoever prints them empties the list.
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
            ValueError: `spaces` lacks `action` or has a name of Replay's own, or the capacity is below two columns or
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
        self._capacity = capacity
        self._spaces = _all_spaces(spaces, memory or {})
        self.row_bytes = row_bytes(spaces, memory or {})
        self._make_room(room(num_envs=num_envs, capacity=capacity, rows_to_come=rows_to_come))
        self.reward_min = torch.full((), torch.inf, device=device)
        self.reward_max = torch.full((), -torch.inf, device=device)
        self.notices: list[str] = []
        self._chunks: list[Chunk] = []
        self._memory_chunks: list[Chunk] = []
        self._written: list[Chunk] = []
        self._chunk_folder: Path | None = None
        self._saved_totals = [0, 0]
        self._saved_oldest = [0, 0]
        # Names of files of memory that other ones have replaced: by the save before the last, and by the last.
        self._replaced: list[list[str]] = [[], []]

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

    def sample(self, batch: int, length: int, *, whole_episodes: bool, generator: torch.Generator) -> dict[str, Tensor]:
        """As `sample_episodes` or else `sample_windows`."""
        draw = self.sample_episodes if whole_episodes else self.sample_windows
        return draw(batch, length, generator=generator)

    def sample_windows(self, batch: int, length: int, *, generator: torch.Generator) -> dict[str, Tensor]:
        """Windows drawn uniformly among all that are stored; they may cross the ends of episodes.

        Args:
            batch: windows to draw, B.
            length: rows in a window, T.
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
        return self._windows(env, start, length)

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

    def save_chunks(self, folder: Path, *, emergency: bool = False, numbered: bool = False) -> dict[str, Any]:
        """Write the rows added since the last save to a file of their own, and memory where it was rewritten since.

        Files that neither this manifest nor the two before it need are deleted: while the checkpoint that will hold
        this manifest is being written, those two are what latest.pt and previous.pt name.

        Args:
            folder: where the chunks are kept; created if need be, in a folder that exists.
            emergency: the last checkpoint but one may stay, so that what it needs stays, too.
            numbered: checkpoints are kept for good, and so is memory as it was at each of them.

        Returns:
            The manifest, to be saved in a checkpoint and handed to `load_chunks`.

        Raises:
            OSError: something cannot be written; what was written for this save is deleted again.
        """
        # A run's folder that is gone is not made again, since its other files would be missing.
        safe_files.make_folder(folder, parents=False)
        if folder != self._chunk_folder:
            self._chunks, self._memory_chunks, self._chunk_folder = [], [], folder
            self._saved_totals, self._saved_oldest, self._replaced = [0, 0], [0, 0], [[], []]
        self._written = []
        try:
            self._chunks = [chunk for chunk in self._chunks if chunk["stop"] > self.oldest]
            self._write_lost_chunks(folder)
            saved = self._chunks[-1]["stop"] if self._chunks else 0
            start = max(saved, self.oldest)
            if start < self.total:
                self._chunks.append(self._write_chunk(folder, self._stored(), start, self.total))
            replaced = self._write_changed_memory(folder)
        except OSError:
            self.discard_save()
            raise
        unneeded, until_next = self._replaced
        chunks.delete(folder, before=self._saved_oldest[0], names=[] if emergency else unneeded)
        self._replaced = [[*(unneeded if emergency else []), *until_next], [] if numbered else replaced]
        self._saved_totals = [self._saved_totals[1], self.total]
        self._saved_oldest = [self._saved_oldest[1], self.oldest]
        return {
            "num_envs": self.num_envs,
            "length": self.length,
            "saved_totals": list(self._saved_totals),
            "saved_oldest": list(self._saved_oldest),
            "chunks": [dict(chunk) for chunk in self._chunks],
            "memory_chunks": [dict(chunk) for chunk in self._memory_chunks],
            "replaced": [list(names) for names in self._replaced],
            "reward_min": self.reward_min.cpu(),
            "reward_max": self.reward_max.cpu(),
        }

    @property
    def bytes_written(self) -> int:
        """Size of the files that the last save has written."""
        return sum(chunk["bytes"] for chunk in self._written)

    def discard_save(self) -> None:
        """Delete what the last save has written, as no checkpoint will name it: a full disk needs the room."""
        names = {chunk["name"] for chunk in self._written}
        if self._chunk_folder is not None:
            for name in names:
                (self._chunk_folder / name).unlink(missing_ok=True)
        self._chunks = [chunk for chunk in self._chunks if chunk["name"] not in names]
        self._memory_chunks = [chunk for chunk in self._memory_chunks if chunk["name"] not in names]

    def _write_chunk(self, folder: Path, ring: Mapping[str, Tensor], start: int, stop: int) -> Chunk:
        chunk = chunks.write(folder, ring, start=start, stop=stop)
        self._written.append(chunk)
        return chunk

    def _write_lost_chunks(self, folder: Path) -> None:
        """Write the chunks anew that somebody else has deleted or cut; all their columns are still in memory."""
        lost = [chunk for chunk in (*self._chunks, *self._memory_chunks) if not chunks.is_whole(folder, chunk)]
        if not lost:
            return
        self.notices.append(
            f"warning: {len(lost)} of {len(self._chunks) + len(self._memory_chunks)} files in {folder} were deleted or"
            " cut by somebody else: they are written anew from memory; checkpoints before this one cannot be gone on"
            " from"
        )
        # Those of memory are written with what has changed.
        self._memory_chunks = [chunk for chunk in self._memory_chunks if chunk not in lost]
        for index, chunk in enumerate(self._chunks):
            if chunk in lost:
                start = max(chunk["start"], self.oldest)
                self._chunks[index] = self._write_chunk(folder, self._stored(), start, chunk["stop"])

    def _write_changed_memory(self, folder: Path) -> list[str]:
        """Write the stretches of memory that were rewritten; the names of the files that had them before."""
        if not self.memory:
            return []
        changed = self._rewritten.cpu()
        written = {chunk["stop"]: chunk for chunk in self._memory_chunks}
        current: list[Chunk] = []
        for begin, stop in self._memory_stretches():
            start, chunk = max(begin, self.oldest), written.get(stop)
            column = torch.arange(start, stop, device=changed.device)
            # A file from before the ring went on may begin earlier than the stretch now does.
            fits = chunk is not None and begin <= chunk["start"] <= start
            if chunk is None or not fits or bool(changed[column % self.length].any()):
                chunk = self._write_chunk(folder, self.memory, start, stop)
            current.append(chunk)
        kept = {chunk["name"] for chunk in current}
        replaced = [chunk["name"] for chunk in self._memory_chunks if chunk["name"] not in kept]
        self._memory_chunks = current
        self._rewritten.zero_()
        return replaced

    def _memory_stretches(self) -> list[tuple[int, int]]:
        """Where each file of memory begins, and what column it ends before: a file of rows, or a part of one."""
        column_bytes = sum(value[:, 0].numel() * value.element_size() for value in self.memory.values())
        columns = max(1, MEMORY_FILE_BYTES // column_bytes)
        stretches: list[tuple[int, int]] = []
        for rows in self._chunks:
            inner = range((rows["start"] // columns + 1) * columns, rows["stop"], columns)
            stretches += itertools.pairwise([rows["start"], *inner, rows["stop"]])
        return [(begin, stop) for begin, stop in stretches if stop > self.oldest]

    def load_chunks(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        """Restore exactly what was stored when `manifest` was made, or of it the latest rows that the capacity allows.

        Raises:
            CheckpointError: a chunk is missing or corrupt, the manifest is of another replay (number of environments,
                keys, shapes) or contradicts itself.
        """
        if self.num_envs != manifest["num_envs"]:
            raise CheckpointError(
                f"replay was saved with {manifest['num_envs']} environments, this run has {self.num_envs}; give the"
                " same envs, or take the weights only, with --init"
            )
        total, length = manifest["saved_totals"][1], manifest["length"]
        # Older manifests are of rings that have always had one length.
        saved_oldest = manifest.get("saved_oldest", [max(0, saved - length) for saved in manifest["saved_totals"]])
        oldest = saved_oldest[1]
        chunks.require_all_columns(manifest["chunks"], oldest, total)
        kept = min(total - oldest, self._capacity // self.num_envs)
        if kept > self.length:
            # A run that has come further than it is now to go keeps what it has lived through.
            self._make_room(kept * self.num_envs)
        self.total, self.oldest = total, max(oldest, total - self.length)
        # The oldest chunk comes first: where the ring has wrapped, newer columns overwrite those of the first chunk.
        for chunk in manifest["chunks"]:
            chunks.read(folder, chunk, self._stored(), oldest=self.oldest)
        if "memory" in manifest:
            # Older runs saved memory whole.
            self._load_memory(manifest["memory"], length)
        else:
            self._load_memory_chunks(folder, manifest["memory_chunks"], oldest)
        self.reward_min = manifest["reward_min"].to(self.device)
        self.reward_max = manifest["reward_max"].to(self.device)
        self._chunks = [dict(chunk) for chunk in manifest["chunks"]]
        self._memory_chunks = [dict(chunk) for chunk in manifest.get("memory_chunks", [])]
        self._chunk_folder = folder
        self._saved_totals = list(manifest["saved_totals"])
        self._saved_oldest = list(saved_oldest)
        self._replaced = [list(names) for names in manifest.get("replaced", [[], []])]

    def _load_memory_chunks(self, folder: Path, saved: Sequence[Chunk], oldest: int) -> None:
        """Take in the memory of the stored columns from files."""
        if bool(saved) != bool(self.memory and oldest < self.total):
            raise CheckpointError(
                f"replay was saved with{'' if saved else 'out'} memory; this run keeps {sorted(self.memory) or 'none'}"
            )
        if saved:
            chunks.require_all_columns(saved, oldest, self.total)
        for chunk in saved:
            chunks.read(folder, chunk, self.memory, oldest=self.oldest, verb="keeps")

    def _load_memory(self, saved: Mapping[str, Tensor], length: int) -> None:
        """Take in the memory of the stored columns, which stands in `saved` as in a ring of another length."""
        width = min(self.total, length)
        ours = {name: ((self.num_envs, width, *value.shape[2:]), value.dtype) for name, value in self.memory.items()}
        theirs = {name: (tuple(value.shape), value.dtype) for name, value in saved.items()}
        if ours != theirs:
            raise CheckpointError(f"replay was saved with the memory {theirs}; this run keeps {ours}")
        column = torch.arange(self.oldest, self.total, device=self.device)
        for name, value in saved.items():
            self.memory[name].index_copy_(1, column % self.length, value.to(self.device)[:, column % length])

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
