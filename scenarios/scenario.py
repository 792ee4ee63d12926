"""A scenario: one ego over a stretch of a log, what it does there, and the token that names it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from driving.scene import STEP

# Rows of a whole scenario: 10 seconds, both ends included.
ROWS = 21
TOKEN_BYTES = 8


class Scenario(NamedTuple):
    """One ego over some frames of a log, with what a filter asks about.

    Attributes:
        log: name.
        map: name of the map that the log is of.
        type: one of `SCENARIO_TYPES`.
        token: names it among all; see `token_of`.
        agent: id of the ego in the log.
        frame: of the log, the first.
        rows: frames, one after the other.
        speeds: of the ego in each frame of the stretch, m/s, in hundredths. A single row keeps those of its stretch.
        displacement: metres from its first place in the stretch to its last, in hundredths.
        goal_on_road: whether its way through the log ends on a lane of the map.
    """

    log: str
    map: str
    type: str
    token: str
    agent: int
    frame: int
    rows: int
    speeds: tuple[float, ...]
    displacement: float
    goal_on_road: bool

    @property
    def seconds(self) -> float:
        """From the log's beginning to the first row."""
        return STEP * self.frame

    def path(self, cache: Path) -> Path:
        """The file of its samples."""
        return cache / self.log / self.type / f"{self.token}.npz"

    def single(self, row: int) -> Scenario:
        """One of its rows as a scenario."""
        return self._replace(
            token=token_of(self.log, self.agent, self.frame + row, rows=1),
            frame=self.frame + row,
            rows=1,
        )


def token_of(log: str, agent: int, frame: int, *, rows: int) -> str:
    """The name of the scenario of an agent over `rows` frames from `frame` on: 16 hexadecimal digits, ever the same."""
    words = f"{log}/{agent}/{frame}/{rows}".encode()
    return hashlib.blake2b(words, digest_size=TOKEN_BYTES).hexdigest()
