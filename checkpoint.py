"""Checkpoints: atomic save, safe load, and the random generators' part of what a run needs to go on.

A checkpoint is a nested dict of tensors and plain values. It is written to a temporary file, forced to the disk and
renamed, so that a reader meets the old file or the new one and never a part of either.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from system import archives, safe_files, terminal

FORMAT = 1
LATEST = "latest.pt"
PREVIOUS = "previous.pt"
UNREADABLE = "unreadable.pt"
# The most entries and levels of a state; that of a long run has some ten thousand entries in 10 levels.
MOST_ENTRIES = 2**20
DEEPEST = 64
# Bytes that the tensors may claim beyond those of the file: a tensor may repeat its numbers, and then a few bytes claim
# terabytes. Tensors of ours repeat none, and numbers of their own are in the file.
MOST_REPEATED = 2**24


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used. The message is one line: which file, the cause, and what would do."""


def save(path: Path, state: Mapping[str, Any], *, keep_before: bool = True) -> None:
    """Write `state` to `path` atomically; where `path` is latest.pt, the one before is kept as previous.pt.

    A kill at any point leaves a whole latest.pt, or (between the two renames) a whole previous.pt.

    Args:
        path: the file to write; its folder exists.
        state: nested dicts, lists and tuples of tensors, numbers, strings, booleans and None.
        keep_before: False lets previous.pt be, as the one before is worth less than that.

    Raises:
        TypeError: the state holds a value that `load` would refuse.
        OSError: it cannot be written; what was there before is as it was.
    """
    _check_plain(state, "state")
    temporary = path.with_name(path.name + ".tmp")
    try:
        with safe_files.create(temporary) as file:
            sink = _Sink(file)
            torch.save({"format": FORMAT, "state": dict(state)}, cast(BinaryIO, sink))
            sink.finish()
            file.flush()
            os.fsync(file.fileno())
        if keep_before and path.name == LATEST and path.exists():
            # A rename, not a hard link: some file systems have no links, and previous.pt covers the moment in between.
            os.replace(path, path.with_name(PREVIOUS))
        os.replace(temporary, path)
    except BaseException:
        # On a full disk, a file that nobody will read would take the room that other files need.
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """The state that `save` wrote to `path`, its tensors on `device`. Nothing in the file is ever executed.

    Raises:
        CheckpointError: the file is missing, empty, truncated, corrupt, of another format, or holds code.
    """
    try:
        with safe_files.open_to_read(path) as file:
            archives.require_sound(file)
            content = torch.load(file, map_location=device, weights_only=True)
            size = file.seek(0, os.SEEK_END)
    except OSError as error:
        raise _unusable(path, f"cannot be opened ({error.strerror})") from error
    except pickle.UnpicklingError as error:
        raise _unusable(path, archives.OBJECTS) from error
    except archives.UnsoundError as error:
        raise _unusable(path, str(error)) from error
    # Nothing but the readers of zip, pickle and torch ran: whatever they raise, from UnicodeDecodeError to MemoryError,
    # is about what the file holds.
    except Exception as error:
        cause = terminal.one_line(str(error))[:100] or type(error).__name__
        raise _unusable(path, f"is corrupt or not a checkpoint ({cause})") from error
    try:
        safe_files.require_small(content, _parts, most=MOST_ENTRIES, deepest=DEEPEST)
    except safe_files.TooLargeError as error:
        raise _unusable(path, str(error)) from error
    if claimed_bytes(content) > size + MOST_REPEATED:
        raise _unusable(path, f"has {size:,} bytes, and its tensors claim {claimed_bytes(content):,}")
    if not isinstance(content, dict) or not {"format", "state"} <= content.keys():
        raise _unusable(path, "is not a checkpoint of this program")
    if type(content["format"]) is not int or content["format"] != FORMAT:
        raise _unusable(path, f"has format {content['format']}, and this version reads format {FORMAT} only")
    state = content["state"]
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise _unusable(path, "is not a checkpoint of this program")
    return state


def load_latest(
    logdir: Path,
    device: torch.device,
    *,
    to_go_on: bool = True,
    take: Callable[[dict[str, Any], Path], None] | None = None,
) -> dict[str, Any] | None:
    """The newest usable checkpoint of a run, or None where it has none yet.

    Where latest.pt cannot be used and previous.pt can, the warning says so. Of a run that is to go on, latest.pt is
    then set aside under another name: the next `save` would otherwise rotate it over the only good one.

    Args:
        logdir: the run's folder.
        device: where its tensors are to be.
        to_go_on: whether the run is to go on.
        take: called with a state and its file; raises CheckpointError where something else that it needs is damaged.

    Raises:
        CheckpointError: there are checkpoints, and none can be used.
    """
    latest, previous = logdir / LATEST, logdir / PREVIOUS
    if not latest.exists() and not previous.exists():
        return None
    try:
        return _taken(latest, device, take)
    except CheckpointError as error:
        if not previous.exists():
            raise
        state = _taken(previous, device, take)
        terminal.tell(f"warning: {error}. Going on from {previous}.")
        if to_go_on and latest.exists():
            os.replace(latest, logdir / UNREADABLE)
        return state


def _taken(path: Path, device: torch.device, take: Callable[[dict[str, Any], Path], None] | None) -> dict[str, Any]:
    state = load(path, device)
    if take is not None:
        take(state, path)
    return state


def generator_state(generators: Mapping[str, torch.Generator]) -> dict[str, Tensor]:
    """The state of every random generator, by name."""
    return {name: generator.get_state() for name, generator in generators.items()}


def restore_generators(generators: Mapping[str, torch.Generator], state: Mapping[str, Tensor]) -> None:
    """Set every generator to the state that `generator_state` gave.

    Raises:
        CheckpointError: the names differ, or a generator was saved on another kind of device.
    """
    if generators.keys() != state.keys():
        raise CheckpointError(
            f"the checkpoint has random generators for {sorted(state)}, this run for {sorted(generators)}; "
            "take its weights only, with --init"
        )
    for name, generator in generators.items():
        try:
            # Loading moves every tensor to the run's device, and a generator takes its state from the host.
            generator.set_state(state[name].cpu())
        except RuntimeError as error:
            raise CheckpointError(
                f"random generator '{name}' was saved on another kind of device than {generator.device.type}; "
                "resume on that kind, or take the weights only, with --init"
            ) from error


def _parts(value: object) -> Iterable[object]:
    """What a container in a state holds."""
    if isinstance(value, Mapping):
        return (*value.keys(), *value.values())
    return value if isinstance(value, (list, tuple)) else ()


def claimed_bytes(content: object) -> int:
    """Bytes that all tensors in a state would take if none repeated its numbers."""
    waiting, total = [content], 0
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
        else:
            waiting += _parts(value)
    return total


class _Sink:
    """A file for torch.save, which turns a failing write into errors of its own: the first one is kept for later."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        if self._error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self._error = error
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Nothing: `save` does it."""

    def finish(self) -> None:
        """Raise what a write has met."""
        if self._error is not None:
            raise self._error


def _unusable(path: Path, cause: str) -> CheckpointError:
    previous = path.with_name(PREVIOUS)
    if path.name == LATEST and previous.exists():
        remedy = f"the one before it is there: --resume {previous}"
    else:
        remedy = "give another checkpoint, or begin in a new logdir"
    return CheckpointError(f"{path} {cause}; {remedy}")


def _check_plain(value: object, where: str) -> None:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            _check_plain(entry, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            _check_plain(entry, f"{where}[{index}]")
    # The exact type: a numpy scalar is a float to isinstance, and an unknown object to the loader.
    elif not isinstance(value, Tensor) and type(value) not in (int, float, str, bool, type(None)):
        raise TypeError(f"{where} is a {type(value).__name__}; a checkpoint holds tensors and plain values only")


def _sync_folder(folder: Path) -> None:
    # A rename is durable once the folder itself is on the disk.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
