"""Recorded episodes as a run learns from them: checked against its task, and laid out as replay keeps what it lives."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch

from checkpoint import CheckpointError
from config import ConfigError, UserError
from envs.tasks import ACTION_MASK, ActionSpec, Task
from settings.run import RunSettings
from training.episode_files import Episode, EpisodeFault, EpisodeFolder, EpisodeList
from training.minari_sets import PREFIX, MinariSet
from training.replay import Replay
from training.ring import REWARD_AND_ENDS, Spaces

# Columns that are handed to replay's device at once.
COLUMNS_AT_ONCE = 1024
FLAGS = ("is_first", "is_last", "is_terminal")


@runtime_checkable
class EpisodeSet(Protocol):
    """Episodes of any origin: their names, and each of them in the layout of files."""

    @property
    def names(self) -> Sequence[str]: ...

    def read(self, index: int) -> dict[str, np.ndarray]:
        """One of the episodes.

        Raises:
            EpisodeFault: it cannot be read.
        """


class Piece(NamedTuple):
    """The first `rows` of an episode, by its number."""

    episode: int
    rows: int


class Record:
    """Episodes that fit a task.

    Attributes:
        rows: of all of them.
        returns: what each of them has earned, in the environment's own units.
        faults: why others are left out, a line each.
        checksum: of all that is learnt from.
    """

    def __init__(self, episodes: EpisodeSet, *, task: Task, spaces: Spaces) -> None:
        """Read and check all of them. None is kept: they are read again where replay takes them.

        Args:
            episodes: where they come from.
            task: that they are to be of.
            spaces: what replay stores of it.

        Raises:
            UserError: most cannot be used.
        """
        self.episodes, self.task = episodes, task
        self.spaces: Spaces = {**spaces, **REWARD_AND_ENDS}
        self.faults: list[str] = []
        self.returns: list[float] = []
        self.checksum = 0
        self._lengths: dict[int, int] = {}
        for index, name in enumerate(episodes.names):
            try:
                episode = self._read(index)
            except EpisodeFault as fault:
                self.faults.append(f"{name} {fault}")
                continue
            self._lengths[index] = len(episode["reward"])
            self.returns.append(float(episode["reward"].sum(dtype=np.float64)))
            for key in sorted(episode):
                self.checksum = zlib.crc32(episode[key].tobytes(), self.checksum)
        if len(self.faults) > len(self._lengths):
            raise UserError(
                f"{episodes}: {len(self.faults):,} of {len(episodes.names):,} episodes cannot be used, so that nothing"
                f" is learnt; the first: {self.faults[0]}"
            )
        self.rows = sum(self._lengths.values())

    def __len__(self) -> int:
        """Episodes that are learnt from."""
        return len(self._lengths)

    def facts(self) -> dict[str, int]:
        """What a checkpoint tells of it."""
        return {"episodes": len(self), "rows": self.rows, "checksum": self.checksum}

    def require_same(self, facts: Mapping[str, Any], source: Path) -> None:
        """Check that these are the episodes that a checkpoint tells of.

        Raises:
            CheckpointError: they are others.
        """
        if facts["checksum"] != self.checksum:
            raise CheckpointError(
                f"{source} has learnt from other episodes, {facts['episodes']:,} of {facts['rows']:,} rows; give those,"
                " or begin with its weights in another --logdir: --init"
            )

    def streams(self, num_envs: int) -> list[list[Piece]]:
        """One episode after the other for each environment, all of the same number of rows.

        Each episode goes where there are fewest rows yet. What is missing then to the longest is filled with episodes a
        second time, the last of them as far as it fits.
        """
        streams: list[list[Piece]] = [[] for _ in range(num_envs)]
        totals = [0] * num_envs
        for index, rows in self._lengths.items():
            shortest = totals.index(min(totals))
            streams[shortest].append(Piece(index, rows))
            totals[shortest] += rows
        again = self._repeated()
        for stream, total in zip(streams, totals, strict=True):
            missing = max(totals) - total
            while missing:
                index, rows = next(again)
                stream.append(Piece(index, min(rows, missing)))
                missing -= stream[-1].rows
        return streams

    def columns(self, num_envs: int) -> int:
        """Columns that they take."""
        return sum(piece.rows for piece in self.streams(num_envs)[0])

    def fill(self, replay: Replay, *, reward_scale: float) -> None:
        """Add all of them to an empty replay, rewards multiplied by `reward_scale`; of latents there is nothing yet.

        They are drawn from, and not learnt from in their order first, as rows are that a run lives through.
        """
        blocks = [self._blocks(stream) for stream in self.streams(replay.num_envs)]
        memory = {name: torch.zeros_like(rows[:, 0]) for name, rows in replay.memory.items()}
        for parts in zip(*blocks, strict=True):
            stacked = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
            stacked["reward"] = (reward_scale * stacked["reward"]).astype(np.float32)
            block = {name: torch.from_numpy(value).to(replay.device) for name, value in stacked.items()}
            for column in range(block["reward"].shape[1]):
                replay.add({**{name: value[:, column] for name, value in block.items()}, **memory})
        replay.fresh.skip(replay.total)

    def _repeated(self) -> Iterator[tuple[int, int]]:
        while True:
            yield from self._lengths.items()

    def _blocks(self, stream: Sequence[Piece]) -> Iterator[dict[str, np.ndarray]]:
        """The rows of a stream, `COLUMNS_AT_ONCE` at a time."""
        waiting: list[Episode] = []
        count = 0
        for index, rows in stream:
            episode = {name: value[:rows].copy() for name, value in self._read(index).items()}
            # One that is cut short ends as a time limit would end it.
            episode["is_last"][-1] = True
            waiting.append(episode)
            count += rows
            while count >= COLUMNS_AT_ONCE:
                joined = _joined(waiting)
                yield {name: value[:COLUMNS_AT_ONCE] for name, value in joined.items()}
                waiting = [{name: value[COLUMNS_AT_ONCE:] for name, value in joined.items()}]
                count -= COLUMNS_AT_ONCE
        if count:
            yield _joined(waiting)

    def _read(self, index: int) -> dict[str, np.ndarray]:
        """An episode as replay stores it.

        Raises:
            EpisodeFault: it is none of the task.
        """
        arrays = self.episodes.read(index)
        if missing := [name for name in self.spaces if name not in arrays]:
            raise EpisodeFault(f"lacks {', '.join(missing)}")
        rows = len(arrays["reward"]) if arrays["reward"].ndim else 0
        if rows < 2:
            raise EpisodeFault(f"has {rows} rows; an episode has two at least, its first observation and its last")
        episode = {name: _fitted(name, arrays[name], rows, *space) for name, space in self.spaces.items()}
        _require_ends(episode)
        # What is done after the end is read by nobody.
        episode["action"][-1] = 0
        _require_actions(episode, self.task.actions)
        if fault := self.task.fault(episode):
            raise EpisodeFault(fault)
        return episode


def read_record(settings: RunSettings, *, task: Task, spaces: Spaces) -> Record:
    """The episodes that `replay` names.

    Raises:
        UserError: they cannot be read, most cannot be used, or replay has no room for them.
    """
    record = Record(episode_set(settings.loop.replay), task=task, spaces=spaces)
    envs = settings.environments.envs
    if (needed := envs * record.columns(envs)) > settings.loop.replay_capacity:
        raise ConfigError(
            f"replay_capacity is {settings.loop.replay_capacity}, and {record.episodes} has more: give"
            f" --replay_capacity {needed}"
        )
    return record


def episode_set(place: str) -> EpisodeSet:
    """The episodes that a place names: a folder, a list of files, or a data set of Minari.

    Raises:
        UserError: there is nothing there.
    """
    if place.startswith(PREFIX):
        return MinariSet(place.removeprefix(PREFIX))
    path = Path(place)
    return EpisodeList(path) if path.is_file() else EpisodeFolder(path)


def _joined(episodes: Sequence[Episode]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([episode[name] for episode in episodes]) for name in episodes[0]}


def _fitted(name: str, array: np.ndarray, rows: int, shape: tuple[int, ...], dtype: torch.dtype) -> np.ndarray:
    """An array of its own in the type that replay stores. Numbers of any shape are a row of them to an agent.

    Raises:
        EpisodeFault: it has another shape or kind of numbers, or one that is not finite.
    """
    if len(shape) == 1 and array.ndim > 2 and array.shape[0] == rows and math.prod(array.shape[1:]) == shape[0]:
        array = array.reshape(rows, -1)
    if array.shape != (rows, *shape):
        raise EpisodeFault(f"has {name} of shape {list(array.shape)}, where {[rows, *shape]} is needed")
    wanted = torch.empty(0, dtype=dtype, device="cpu").numpy().dtype
    if array.dtype.kind not in "biuf" or not np.can_cast(array.dtype, wanted, "same_kind"):
        raise EpisodeFault(f"has {name} as {array.dtype}, where {wanted} is needed")
    with np.errstate(over="ignore"):
        fitted = array.astype(wanted)
    if wanted.kind == "f" and not (finite := np.isfinite(fitted).reshape(rows, -1).all(-1)).all():
        raise EpisodeFault(f"has a number that is not finite in {name}, row {int(finite.argmin())}")
    return fitted


def _require_ends(episode: Episode) -> None:
    """Check that an episode begins with its first row and ends with its last one.

    Raises:
        EpisodeFault: it does not.
    """
    rows = np.arange(len(episode["reward"]))
    if (episode["is_first"] != (rows == 0)).any():
        raise EpisodeFault("is not one episode: is_first has to be true in the first row alone")
    if (episode["is_last"] != (rows == rows[-1])).any():
        raise EpisodeFault("is not one episode: is_last has to be true in the last row alone")
    if episode["is_terminal"][:-1].any():
        raise EpisodeFault("has is_terminal before its last row")
    if episode["reward"][0]:
        raise EpisodeFault("has a reward in its first row, which no action has earned")


def _require_actions(episode: Episode, actions: ActionSpec) -> None:
    """Check that everything that was done can be done.

    Raises:
        EpisodeFault: it cannot.
    """
    action = episode["action"]
    if actions.kind == "continuous":
        # What lies beyond the bounds counts as them.
        return
    sizes = np.array(actions.sizes if actions.kind == "multi_discrete" else actions.sizes[0])
    if ((action < 0) | (action >= sizes)).any():
        raise EpisodeFault(f"has an action outside 0 to {(sizes - 1).tolist()}")
    if actions.masked:
        legal = np.take_along_axis(episode[ACTION_MASK], action[:, None], -1)[:-1, 0]
        if not legal.all():
            raise EpisodeFault(f"has an action in row {int(legal.argmin())} that its {ACTION_MASK} forbids")


def require_columns(record: Record, replay: Replay, rows: int) -> None:
    """Check that replay will hold a sequence of so many rows, once the episodes are in it.

    Raises:
        ConfigError: it will not.
    """
    if (columns := record.columns(replay.num_envs)) < rows:
        raise ConfigError(
            f"{record.episodes} has {record.rows:,} rows, {columns} for each of {replay.num_envs} environments, and"
            f" updates take {rows} in a row: give more episodes, or lower --envs or --batch_length"
        )
