"""Episodes in pieces: cut from the columns that a collector lives through, and put side by side in a learner's.

A piece is rows of one episode, [T, ...]. It begins with `is_first` and ends with `is_last`, so that any other may come
after it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from training.ring import Spaces

# The most rows of a piece, where episodes need not be whole.
LONGEST = 512
# A row that an episode is cut at is in both pieces. It ends one of them, as a time limit would; in the other there is
# nothing before it that its reward could be for.
AT_BEGIN = {"reward": 0.0, "is_first": True, "is_last": False, "is_terminal": False}


class Finished(NamedTuple):
    """An episode that has ended: its undiscounted return, and how many decisions it took."""

    returned: float
    length: int


class Cutter:
    """Cuts the columns of some environments into pieces.

    Attributes:
        finished: episodes that have ended. Whoever tells of them empties the list.
    """

    def __init__(self, spaces: Spaces, *, num_envs: int, longest: int) -> None:
        """Begin with nothing.

        Args:
            spaces: of all that a row has.
            num_envs: rows of a column.
            longest: rows of the longest piece, two at least; a longer episode is cut there.
        """
        assert longest > 1, "a piece of one row has no transition"
        self.finished: list[Finished] = []
        self._rows = _room(spaces, num_envs, longest)
        self._count = torch.zeros(num_envs, dtype=torch.int64, device="cpu")
        self._every = torch.arange(num_envs, device="cpu")
        self._returns = torch.zeros(num_envs, dtype=torch.float64, device="cpu")
        self._lengths = torch.zeros(num_envs, dtype=torch.int64, device="cpu")
        self._longest = longest

    def add(self, column: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Take in a column; the pieces that end with it.

        Args:
            column: a row for each environment, on any device. The first one is `is_first` throughout.
        """
        for name, rows in self._rows.items():
            rows[self._every, self._count] = column[name].cpu()
        here = self._every, self._count
        self._note_ends(*(self._rows[name][here] for name in ("reward", "is_first", "is_last")))
        last = self._rows["is_last"][here].clone()
        self._count += 1
        full = ~last & (self._count == self._longest)
        pieces = [self._piece(env) for env in (last | full).nonzero()[:, 0].tolist()]
        self._count[last] = 0
        for env in full.nonzero()[:, 0].tolist():
            for name, rows in self._rows.items():
                rows[env, 0] = AT_BEGIN[name] if name in AT_BEGIN else rows[env, self._longest - 1]
            self._count[env] = 1
        return pieces

    def _piece(self, env: int) -> dict[str, Tensor]:
        piece = {name: rows[env, : int(self._count[env])].clone() for name, rows in self._rows.items()}
        piece["is_last"][-1] = True
        return piece

    def _note_ends(self, reward: Tensor, is_first: Tensor, is_last: Tensor) -> None:
        self._returns = torch.where(is_first, 0.0, self._returns) + reward
        self._lengths = torch.where(is_first, 0, self._lengths + 1)
        for env in is_last.nonzero()[:, 0].tolist():
            self.finished.append(Finished(float(self._returns[env]), int(self._lengths[env])))


@dataclass
class Origin:
    """Where pieces come from: whose they are, and the update whose weights acted."""

    name: str
    update: int


class Slots:
    """Puts pieces side by side, each after another's end, into columns of a fixed number of rows.

    Attributes:
        waiting: pieces whose turn has not come.
    """

    def __init__(self, spaces: Spaces, *, count: int, longest: int) -> None:
        """Begin with nothing.

        Args:
            spaces: of all that a row has.
            count: rows of a column.
            longest: rows of the longest piece.
        """
        self.waiting: deque[tuple[dict[str, Tensor], Origin]] = deque()
        self._rows = _room(spaces, count, longest)
        self._next = torch.zeros(count, dtype=torch.int64, device="cpu")
        self._stop = torch.zeros(count, dtype=torch.int64, device="cpu")
        self._every = torch.arange(count, device="cpu")
        self._origins = [Origin("", 0)] * count

    def add(self, pieces: Iterable[dict[str, Tensor]], origin: Origin) -> None:
        """Let pieces wait for their turn."""
        self.waiting.extend((piece, origin) for piece in pieces)

    @property
    def wants_more(self) -> bool:
        """Whether fewer pieces wait than there are slots. Where that many do, there is enough for a while."""
        return len(self.waiting) < len(self._origins)

    def fill(self) -> list[Origin]:
        """Begin with pieces that wait, where others have ended; where those came from."""
        begun = []
        for slot in (self._next == self._stop).nonzero()[:, 0].tolist():
            if not self.waiting:
                break
            piece, origin = self.waiting.popleft()
            self._put(slot, piece)
            self._origins[slot] = origin
            begun.append(origin)
        return begun

    def _put(self, slot: int, piece: Mapping[str, Tensor]) -> None:
        rows = len(piece["is_last"])
        for name, value in piece.items():
            self._rows[name][slot, :rows] = value
        self._next[slot], self._stop[slot] = 0, rows

    @property
    def ready(self) -> bool:
        """Whether every slot has a row, which a column takes."""
        return bool((self._next < self._stop).all())

    def take(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """The next column, once all are `ready`; and how many of its rows were acted on, by whose they are."""
        column = {name: rows[self._every, self._next] for name, rows in self._rows.items()}
        self._next += 1
        steps: dict[str, int] = {}
        for origin, ended in zip(self._origins, column["is_last"].tolist(), strict=True):
            if not ended:
                steps[origin.name] = steps.get(origin.name, 0) + 1
        return column, steps

    def state_dict(self) -> dict[str, Any]:
        """What of the pieces that have begun is still to come. Those that wait are not kept."""
        spans = [*zip(self._next.tolist(), self._stop.tolist(), strict=True)]
        left = {
            name: torch.cat([rows[slot, start:stop] for slot, (start, stop) in enumerate(spans)])
            for name, rows in self._rows.items()
        }
        return {
            "rows": left,
            "lengths": [stop - start for start, stop in spans],
            "origins": [origin.name for origin in self._origins],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            RuntimeError: it is of another number of slots, or of longer pieces.
        """
        lengths, longest = state["lengths"], self._rows["is_last"].shape[1]
        if len(lengths) != len(self._origins) or max(lengths) > longest:
            raise RuntimeError(f"{len(lengths)} pieces of {max(lengths)} rows at most, not {len(self._origins)}")
        for slot, piece in enumerate(split(state["rows"], lengths)):
            self._put(slot, piece)
        self._origins = [Origin(name, 0) for name in state["origins"]]


def joined(pieces: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Pieces one after another, of one or more."""
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def split(rows: Mapping[str, Tensor], lengths: Sequence[int]) -> list[dict[str, Tensor]]:
    """The pieces of such lengths that were joined."""
    parts = {name: value.split(list(lengths)) for name, value in rows.items()}
    return [{name: part[index] for name, part in parts.items()} for index in range(len(lengths))]


def fault_of(piece: Mapping[str, Tensor], *, longest: int) -> str | None:
    """Why rows are no piece, if they are none."""
    first, last = piece["is_first"].tolist(), piece["is_last"].tolist()
    if not 1 <= len(first) <= longest:
        return f"has {len(first)} rows"
    if first != [True] + [False] * (len(first) - 1) or last != [False] * (len(last) - 1) + [True]:
        return "is not of one episode"
    return None


def _room(spaces: Spaces, count: int, longest: int) -> dict[str, Tensor]:
    # Memory is taken as it is written to.
    kinds = {name: torch.empty(0, dtype=dtype, device="cpu").numpy().dtype for name, (_, dtype) in spaces.items()}
    return {
        name: torch.from_numpy(np.zeros((count, longest, *shape), kinds[name])) for name, (shape, _) in spaces.items()
    }
