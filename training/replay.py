"""Replay: a ring of rows that is saved as it grows, each row once, and taken up again.

A ring that a device has no room for is kept by the host: `training.host_replay`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint import CheckpointError
from system import safe_files
from training import chunks
from training.chunks import Chunk
from training.ring import REWARD_AND_ENDS, Ring, Spaces

# The most bytes of memory in a file, but for its frame: what a save needs beside the ring, and writes for a change.
MEMORY_FILE_BYTES = 2**25


class Replay(Ring):
    """Rows of experience that are written to files of a run's folder.

    Attributes:
        notices: lines that the user should read. Whoever prints them empties the list.
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
        """Make room for the ring; nothing is written yet. Arguments and errors are those of `Ring`."""
        super().__init__(
            spaces, num_envs=num_envs, capacity=capacity, device=device, memory=memory, rows_to_come=rows_to_come
        )
        self.notices: list[str] = []
        self._chunks: list[Chunk] = []
        self._memory_chunks: list[Chunk] = []
        self._written: list[Chunk] = []
        self._chunk_folder: Path | None = None
        self._saved_totals = [0, 0]
        self._saved_oldest = [0, 0]
        # Names of files of memory that other ones have replaced: by the save before the last, and by the last.
        self._replaced: list[list[str]] = [[], []]

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
            "fresh_column": self.fresh.column,
            "fresh_env": self.fresh.env,
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
        # Of what older runs have lived through nothing is fresh.
        self.fresh.column, self.fresh.env = manifest.get("fresh_column", total), manifest.get("fresh_env", 0)
        self.reward_min = manifest["reward_min"].to(self.device)
        self.reward_max = manifest["reward_max"].to(self.device)
        self._chunks = [dict(chunk) for chunk in manifest["chunks"]]
        self._memory_chunks = [dict(chunk) for chunk in manifest.get("memory_chunks", [])]
        self._chunk_folder = folder
        self._saved_totals = list(manifest["saved_totals"])
        self._saved_oldest = list(saved_oldest)
        self._replaced = [list(names) for names in manifest.get("replaced", [[], []])]

    def load_shares(self, shares: Sequence[tuple[Path, Mapping[str, Any]]], *, first: int) -> None:
        """Take in what other ranks have stored, of which each had some environments.

        Args:
            shares: the folder and the manifest of each, in the order of their environments.
            first: which of all these environments is the first of this ring's.

        Raises:
            CheckpointError: as `load_chunks`, or the shares do not go together.
        """
        have = sum(manifest["num_envs"] for _, manifest in shares)
        totals = {manifest["saved_totals"][1] for _, manifest in shares}
        if first + self.num_envs > have or len(totals) > 1:
            raise CheckpointError(f"replay was saved with {have} environments; give as many, or take the weights only")
        begin = 0
        for folder, manifest in shares:
            end = begin + manifest["num_envs"]
            low, high = max(begin, first), min(end, first + self.num_envs)
            if low < high:
                share = self._like(manifest)
                share.load_chunks(folder, manifest)
                self._take_rows(share, slice(low - begin, high - begin), slice(low - first, high - first))
            begin = end

    def _like(self, manifest: Mapping[str, Any]) -> Replay:
        """An empty replay of as many environments and columns as a manifest's."""
        observations = {name: space for name, space in self._spaces[0].items() if name not in REWARD_AND_ENDS}
        envs, columns = manifest["num_envs"], self._capacity // self.num_envs
        return Replay(observations, num_envs=envs, capacity=envs * columns, device=self.device, memory=self._spaces[1])

    def _take_rows(self, share: Replay, theirs: slice, ours: slice) -> None:
        """Take over all columns of some environments."""
        if (stored := share.total - share.oldest) > self.length:
            self._make_room(stored * self.num_envs)
        column = torch.arange(max(share.oldest, share.total - self.length), share.total, device=self.device)
        for mine, other in ((self._stored(), share._stored()), (self.memory, share.memory)):
            for name, value in other.items():
                mine[name][ours, column % self.length] = value[theirs, column % share.length]
        self.total, self.oldest = share.total, int(column[0]) if len(column) else share.oldest
        self.fresh.column, self.fresh.env = share.total, 0
        self.reward_min = torch.minimum(self.reward_min, share.reward_min)
        self.reward_max = torch.maximum(self.reward_max, share.reward_max)

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
