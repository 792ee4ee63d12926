"""How far a run has come, on a terminal: a bar, or plain lines where there is none."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping

from tqdm import tqdm

from system import terminal

# How many logs the shown speed is a mean over, and how many characters a bar needs to be worth drawing.
SPEED_OVER = 6
LEAST_BAR = 8
REDRAWN_EVERY = 0.2  # seconds, between two logs


class ProgressBar:
    """Env steps done, with the latest figures; plain lines, one a call, where no terminal with a width is there.

    Speed and time left are those of the steps that updates go with, once there are any: what comes before is faster.
    """

    def __init__(
        self, total: int, *, initial: int = 0, updates_from: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin at `initial` of `total` env steps; the agent learns from `updates_from` on."""
        self._total, self._step, self._updates_from, self._clock = total, initial, updates_from, clock
        self._figures: dict[str, str] = {}
        # Steps and times that speed is measured from, the oldest first: at the beginning and at the latest updates.
        self._marks = deque([(initial, clock())], maxlen=SPEED_OVER)
        self._drawn = -math.inf
        self._bar = None
        # A terminal without a size, as `docker run -t` may make one, would show a bar of no characters.
        if sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0:
            self._bar = tqdm(
                total=total,
                initial=initial,
                file=sys.stderr,
                dynamic_ncols=True,
                bar_format=self._layout(),
            )

    def move(self, step: int) -> None:
        """Show that `step` env steps are done, on a terminal and not too often."""
        self._reach(step)
        if self._clock() - self._drawn >= REDRAWN_EVERY:
            self._draw()

    def update(self, step: int, figures: Mapping[str, float | int | str]) -> None:
        """Show that `step` env steps are done, and figures such as gap and return, those that matter most first."""
        self._figures = {
            name: figure if isinstance(figure, str) else f"{figure:.4g}" for name, figure in figures.items()
        }
        self._reach(step)
        if self._bar is None:
            told = [f"step {step}/{self._total}", *self._named(), *self._speed()]
            terminal.tell("  ".join(told))
        self._draw()
        self._marks.append((step, self._clock()))

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        tqdm.write(terminal.printable(message), file=sys.stderr)

    def alert(self, message: str) -> None:
        """Print a line of what went wrong in this process alone, if there are others."""
        self.say(message)

    def close(self) -> None:
        """Leave the last state of the bar on the terminal."""
        if self._bar is not None:
            self._bar.close()

    def _reach(self, step: int) -> None:
        if self._step < self._updates_from <= step:
            self._marks.clear()
            self._marks.append((step, self._clock()))
        self._step = step

    def _draw(self) -> None:
        if self._bar is not None:
            self._drawn = self._clock()
            self._bar.bar_format = self._layout()
            # Several environments may step beyond the last step.
            self._bar.n = min(self._step, self._total)
            self._bar.refresh()

    def _named(self) -> list[str]:
        return [f"{name} {figure}" for name, figure in self._figures.items()]

    def _speed(self) -> list[str]:
        """Env steps a second, and the time that is left at this speed; nothing where none is known yet."""
        step, since = self._marks[0]
        seconds = self._clock() - since
        if self._step <= step or seconds <= 0:
            return []
        speed = (self._step - step) / seconds
        told = [f"{tqdm.format_sizeof(speed)} steps/s"]
        if self._step >= self._updates_from:
            # Several environments may step beyond the last step.
            told.append(f"{tqdm.format_interval(max(0, self._total - self._step) / speed)} left")
        return told

    def _layout(self) -> str:
        """The line as tqdm wants it: the first figure for certain, of all others and the bar what there is room for."""
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
        done = f"{100 * self._step / self._total:3.0f}%"
        count = f"{tqdm.format_sizeof(self._step)}/{tqdm.format_sizeof(self._total)}"
        figures, tail = self._named(), "  ".join([count, *self._speed()])
        while True:
            head = "  ".join([*figures, done])
            room = columns - len(f"{head}||  {tail}")
            if room >= LEAST_BAR or len(figures) <= 1:
                break
            figures.pop()
        if room >= LEAST_BAR:
            return f"{head}|{{bar}}| {tail}"
        return f"{head}  {tail}"[: columns - 1]


class SilentBar(ProgressBar):
    """That of a rank that another one speaks for: what goes wrong here alone is told, and nothing else."""

    def __init__(self, name: str) -> None:
        """Speak under a name."""
        self._name = name

    def move(self, step: int) -> None:
        """The first rank shows it."""

    def update(self, step: int, figures: Mapping[str, float | int | str]) -> None:
        """Likewise."""

    def say(self, message: str) -> None:
        """Likewise."""

    def alert(self, message: str) -> None:
        """Print a line under the rank's name."""
        super().say(f"{self._name}: {message}")

    def close(self) -> None:
        """Nothing was drawn."""
