"""A stretch of replay's columns in a file of its own: written, found whole, and read again."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import checkpoint
from checkpoint import CheckpointError

# Of a file: its name, the columns that it holds, and its size. It is part of checkpoints.
Chunk = dict[str, Any]
FILES = "*-*-*.pt"


def write(folder: Path, ring: Mapping[str, Tensor], *, start: int, stop: int) -> Chunk:
    """Write columns that are stored.

    Args:
        folder: where to.
        ring: tensors `[E, L, ...]`, in which column c stands at position c % L.
        start: the first column.
        stop: the one behind the last.
    """
    # A name is never used twice: a run that went back to an older checkpoint would otherwise overwrite columns
    # that a newer one still names.
    name = f"{start:012d}-{stop:012d}-{uuid.uuid4().hex[:8]}.pt"
    columns = {
        key: value.index_select(1, torch.arange(start, stop, device=value.device) % value.shape[1]).cpu()
        for key, value in ring.items()
    }
    checkpoint.save(folder / name, columns)
    return {"name": name, "start": start, "stop": stop, "bytes": (folder / name).stat().st_size}


def is_whole(folder: Path, chunk: Chunk) -> bool:
    """Whether the file is there with the size that it was written with."""
    path = folder / chunk["name"]
    # Chunks of older runs do not say how large they are.
    return path.is_file() and path.stat().st_size == chunk.get("bytes", path.stat().st_size)


def read(folder: Path, chunk: Chunk, ring: Mapping[str, Tensor], *, oldest: int, verb: str = "stores") -> None:
    """Put the columns of a file, from `oldest` on, where they belong.

    Args:
        folder: where the file is.
        chunk: what there is to know of it.
        ring: as for `write`; it may have another length.
        oldest: columns before this one are passed over.
        verb: what the run does with such columns, for messages.

    Raises:
        CheckpointError: the file is missing or corrupt, or holds other keys, shapes or types than the ring.
    """
    path = folder / chunk["name"]
    try:
        columns = checkpoint.load(path, next(iter(ring.values())).device)
    except CheckpointError as error:
        raise CheckpointError(f"{error}, with --init and the weights of this one") from error
    if columns.keys() != ring.keys():
        raise CheckpointError(f"{path} holds {sorted(columns)}; this run {verb} {sorted(ring)}")
    for key, value in columns.items():
        num_envs, length, *shape = ring[key].shape
        expected = (num_envs, chunk["stop"] - chunk["start"], *shape)
        if not isinstance(value, Tensor) or value.shape != expected or value.dtype != ring[key].dtype:
            found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise CheckpointError(f"{path} has {found} for '{key}'; this run {verb} {ring[key].dtype} {expected}")
        begin = max(chunk["start"], oldest)
        if begin < chunk["stop"]:
            position = torch.arange(begin, chunk["stop"], device=value.device) % length
            ring[key].index_copy_(1, position, value[:, begin - chunk["start"] :])


def require_all_columns(chunks: Sequence[Chunk], oldest: int, total: int) -> None:
    """Check that chunks hold the columns from `oldest` to `total`, one after another.

    Raises:
        CheckpointError: they do not.
    """
    starts, stops = [chunk["start"] for chunk in chunks], [chunk["stop"] for chunk in chunks]
    begin = min([oldest, *starts[:1]])
    if [begin, *stops] != [*starts, total] or starts != sorted(starts):
        raise CheckpointError(
            f"columns {oldest} to {total} of replay are not those of its files; take the weights only, with --init"
        )


def delete(folder: Path, *, before: int, names: Sequence[str]) -> None:
    """Delete the files of columns before `before` alone, the named files, and what a kill has left of others."""
    for path in folder.glob(FILES):
        if int(path.name.split("-")[1]) <= before or path.name in names:
            path.unlink()
    # A kill may have left parts of chunks; none is being written now.
    for path in folder.glob(f"{FILES}.tmp"):
        path.unlink()
