"""How long looking for solutions may take: so many seconds, or until somebody presses Ctrl-C."""

from __future__ import annotations

import math
import time

from training.stopping import StopRequests


class Patience:
    """A clock that is set for each piece of work, and a request to stop that holds for all of them.

    Attributes:
        seconds: for each instance, where a piece of work does not say; infinite where nothing but a request ends it.
    """

    def __init__(self, seconds: float = math.inf, *, requests: StopRequests | None = None) -> None:
        """Set no clock yet.

        Args:
            seconds: for each instance.
            requests: tells of Ctrl-C; None where nobody listens.
        """
        self.seconds, self._requests = seconds, requests
        self._began, self._given = 0.0, math.inf

    def begin(self, instances: int = 1, *, seconds: float | None = None) -> None:
        """Set the clock for work on that many instances, `seconds` for each if that is given."""
        self._began = time.monotonic()
        self._given = instances * (self.seconds if seconds is None else seconds)

    @property
    def is_stopped(self) -> bool:
        """Whether somebody asked to stop."""
        return self._requests is not None and self._requests.signal is not None

    @property
    def share(self) -> float:
        """How much of the time is gone, from 0 to 1."""
        return min(1.0, (time.monotonic() - self._began) / self._given)

    @property
    def is_over(self) -> bool:
        """Whether the work is to end with what it has."""
        return self.is_stopped or self.share >= 1
