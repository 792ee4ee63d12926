"""What is known of an environment's crash, and how many of them a run goes on after."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple


class Crash(NamedTuple):
    """What is known of a crash: the row of the environment, and the environment's own traceback."""

    row: int
    trace: str


class EnvironmentCrashed(RuntimeError):
    """An environment cannot be made or begun, or crashes where none may be replaced any more. The message is one line.

    Attributes:
        crash: where and how.
    """

    def __init__(self, message: str, crash: Crash) -> None:
        super().__init__(message)
        self.crash = crash


@dataclasses.dataclass
class Restarts:
    """How many environments that crash a run may replace, over its whole length, and how many it has."""

    allowed: int = 0
    used: int = 0
