"""A data set of Minari as recorded episodes, in the layout of files. Nothing is downloaded."""

from __future__ import annotations

from typing import Any

import numpy as np

from config import UserError
from envs.action_rows import to_row
from envs.spaces import flattener
from training.episode_files import EpisodeFault

PREFIX = "minari:"
# Errors of code below for arrays that are no episode.
FAULTS = (ValueError, TypeError, LookupError, AttributeError, OverflowError, UserError)


class MinariSet:
    """The episodes of a data set that is on this machine, by their numbers."""

    def __init__(self, name: str) -> None:
        """Open it.

        Raises:
            UserError: Minari is not installed, or there is no such data set.
        """
        try:
            import minari
        except ImportError as error:
            raise UserError(f'{PREFIX}{name} needs Minari ({error}): pip install -e ".[minari]"') from error
        self.name = name
        try:
            self._data = minari.load_dataset(name)
        # A name that is none, a data set that is not there, and files that are none of Minari's.
        except (FileNotFoundError, ValueError, LookupError, OSError, ImportError) as error:
            cause = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{self} cannot be opened ({cause}); minari download {name} brings it") from error
        self._numbers = [int(number) for number in self._data.episode_indices]
        self.names = [f"episode {number}" for number in self._numbers]
        self._flatten = flattener(self._data.observation_space)

    def __str__(self) -> str:
        return f"{PREFIX}{self.name}"

    def read(self, index: int) -> dict[str, np.ndarray]:
        """One of the episodes.

        Raises:
            EpisodeFault: it cannot be read.
        """
        try:
            (episode,) = self._data.iterate_episodes([self._numbers[index]])
            return self._rows(episode)
        except FAULTS as error:
            raise EpisodeFault(f"cannot be read ({(str(error).splitlines() or [type(error).__name__])[0]})") from error

    def _rows(self, episode: Any) -> dict[str, np.ndarray]:
        count = len(episode.rewards)
        seen = [self._flatten(_at(episode.observations, row)) for row in range(count + 1)]
        done = [to_row(self._data.action_space, _at(episode.actions, row)) for row in range(count)]
        row = np.arange(count + 1)
        return {
            **{key: np.stack([each[key] for each in seen]) for key in seen[0]},
            # Nothing is done after the end.
            "action": np.stack([*done, np.zeros_like(done[0])]),
            "reward": np.concatenate(([0.0], episode.rewards)).astype(np.float32),
            "is_first": row == 0,
            "is_last": row == count,
            "is_terminal": (row == count) & bool(episode.terminations[-1]),
        }


def _at(values: Any, row: int) -> Any:
    """One row of arrays that may lie in dicts and tuples."""
    if isinstance(values, dict):
        return {name: _at(part, row) for name, part in values.items()}
    if isinstance(values, tuple):
        return tuple(_at(part, row) for part in values)
    return values[row]
