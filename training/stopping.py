"""Requests to stop a run: signals that come while it trains."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# A closed shell, and the signals that schedulers send before they kill, are requests to stop, too.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU)
# A second Ctrl-C within so many seconds of the first does not wait for anything to be saved.
IMPATIENCE = 5.0


class StopRequests:
    """Takes signals as requests to stop, which the training loop obeys between two updates.

    `signal` is the name of the last one; None where none has come.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._interrupted_at = -math.inf

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Take the signals of `STOP_SIGNALS`, and give them back at the end."""
        # A program that was started with nohup, to outlive its terminal, ignores SIGHUP.
        numbers = [n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        handlers = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and now - self._interrupted_at < IMPATIENCE:
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            self._interrupted_at = now
        self.signal = signal.Signals(number).name
