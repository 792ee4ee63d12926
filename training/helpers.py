"""Collectors on the learner's own machine: processes that are started, again where they are killed, and ended."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess

# Seconds before a collector that was killed is started again: at first, and at most after many times.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
# Seconds that one may take to end when it is asked to.
CLOSE_SECONDS = 3.0


@dataclass
class Helper:
    """One of them.

    Attributes:
        number: which.
        process: that it is; None before it is started.
        pause: seconds to wait before it is started once more.
        due: when it is to be started, where it was killed.
        failed: whether it has ended by itself, and is not started any more.
    """

    number: int
    process: BaseProcess | None = None
    pause: float = FIRST_PAUSE
    due: float | None = None
    failed: bool = False


class Helpers:
    """Some collectors on this machine.

    Attributes:
        address: where they find the learner.
    """

    def __init__(self, count: int, *, target: Callable[[str, int], None], address: str, others: bool) -> None:
        """Know them; `start` starts them.

        Args:
            count: how many.
            target: what each does, with the address and its number; of a module, so that a new process finds it.
            address: where they find the learner.
            others: whether collectors may come from elsewhere.
        """
        self.address, self._target, self._others = address, target, others
        self._helpers = [Helper(number) for number in range(1, count + 1)]

    def start(self) -> None:
        """Start them all."""
        for helper in self._helpers:
            self._start(helper)

    def _start(self, helper: Helper) -> None:
        # Forked from a server that was started afresh: safe beside CUDA and threads.
        context = multiprocessing.get_context("forkserver")
        # What each would import, the server has then imported once.
        context.set_forkserver_preload(["__main__", "training.collector"])
        helper.process = context.Process(target=self._target, args=(self.address, helper.number))
        helper.process.start()
        helper.due = None

    @property
    def have_failed(self) -> bool:
        """Whether all have ended by themselves, and nobody else can come."""
        return bool(self._helpers) and not self._others and all(helper.failed for helper in self._helpers)

    def look(self) -> list[str]:
        """See after them; lines that the user should read."""
        lines, now = [], time.monotonic()
        for helper in self._helpers:
            if helper.due is not None:
                if now >= helper.due:
                    self._start(helper)
            elif helper.process is not None and (code := helper.process.exitcode) is not None and not helper.failed:
                if code >= 0:
                    helper.failed = True
                    continue
                name = signal.Signals(-code).name
                lines.append(f"collector {helper.number} is started again in {helper.pause:g} s, since {name} ended it")
                helper.due, helper.pause = now + helper.pause, min(LONGEST_PAUSE, 2 * helper.pause)
        return lines

    def close(self) -> None:
        """End them, if they have not ended already, as they were told."""
        processes = [helper.process for helper in self._helpers if helper.process is not None]
        until = time.monotonic() + CLOSE_SECONDS
        for process in processes:
            process.join(max(0.0, until - time.monotonic()))
        for end in (BaseProcess.terminate, BaseProcess.kill):
            left = [process for process in processes if process.is_alive()]
            for process in left:
                end(process)
            for process in left:
                process.join(CLOSE_SECONDS)
