"""What a run tells the world: metrics.jsonl and other sinks, the progress bar, and the facts in its logdir."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

import config
from comparing.runs import CONFIG_FILE, LOCK, METRICS, RUN_FILE
from config import Config
from system import safe_files, terminal
from training.records import MetricsFile
from training.sinks import MakeSink, Sink, TensorBoardSink

# The most characters of a process id in a lock.
LONGEST_ID = 20
PACKAGES = ("torch", "numpy", "gymnasium", "tensorboard", "ruamel.yaml", "elkai")

# How many logs the shown speed is a mean over, and how many characters a bar needs to be worth drawing.
SPEED_OVER = 6
LEAST_BAR = 8
REDRAWN_EVERY = 0.2  # seconds, between two logs


class LogdirInUseError(RuntimeError):
    """Another live process writes to the logdir."""


class Logger:
    """Scalars to metrics.jsonl and to sinks, pictures and text to sinks; x is env steps everywhere.

    Each row of metrics.jsonl is on its way to the disk before `scalars` returns. `state_dict` marks a place in the
    file and `load_state_dict` cuts it there, so that a resumed run repeats no row. What cannot be written is no reason
    to stop: `notices` say so.
    """

    def __init__(
        self,
        logdir: Path,
        *,
        resume_step: int | None = None,
        sinks: Sequence[MakeSink] = (TensorBoardSink,),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the files of `logdir`, and the sinks.

        Args:
            logdir: an existing folder.
            resume_step: the step of the checkpoint that the run goes on from: `load_state_dict` is to follow. None
                for a run that begins: what an earlier process logged there, without reaching a checkpoint, is kept
                aside.
            sinks: what makes them, in their order.
            config: the run's, for those who show it.

        Raises:
            OSError: they cannot be written.
            UserError: a sink cannot begin.
        """
        self._sinks: list[Sink] = []
        with contextlib.ExitStack() as begun:
            for make in sinks:
                self._sinks.append(make(logdir, resume_step=resume_step, config=config or {}))
                begun.callback(self._sinks[-1].close)
            self._metrics = MetricsFile(logdir / METRICS, resume_step=resume_step)
            begun.pop_all()

    def scalars(self, step: int, seconds: float, values: Mapping[str, float | int]) -> None:
        """Log one row. A value that is not finite is null in metrics.jsonl, since JSON has no word for it."""
        row: dict[str, float | int | None] = {"step": step, "seconds": round(seconds, 3)}
        assert not row.keys() & values.keys()
        row |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        for sink in self._sinks:
            sink.scalars(step, round(seconds, 3), values)
        self._metrics.add(json.dumps(row, allow_nan=False).encode())

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Log a picture, uint8 `[height, width, 3]`."""
        for sink in self._sinks:
            sink.image(step, name, image)

    def text(self, name: str, markdown: str, *, step: int | None = None) -> None:
        """Log a page; with `step`, a line of a diary."""
        for sink in self._sinks:
            sink.text(name, markdown, step=step)

    def notices(self) -> list[str]:
        """What the user should read about files and sinks, a line each, and not said before."""
        lines: list[str] = []
        for notices in (*(sink.notices for sink in self._sinks), self._metrics.notices):
            lines += notices
            notices.clear()
        return lines

    def state_dict(self) -> dict[str, Any]:
        """The place in metrics.jsonl up to which a run resumed from here keeps the rows, and what they are."""
        return self._metrics.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], *, elsewhere: bool = False) -> None:
        """Cut metrics.jsonl at the marked place.

        Args:
            state: from `state_dict`.
            elsewhere: the checkpoint is from another folder: there is nothing to cut, and the rows begin here.

        Raises:
            OSError: the file cannot be changed.
        """
        self._metrics.load_state_dict(state, elsewhere=elsewhere)

    def close(self) -> None:
        """Close files and sinks."""
        self._metrics.close()
        for sink in self._sinks:
            sink.close()


class MetricAverages:
    """Averages of metrics between two log calls, kept on their device until `fetch`.

    Names that end in `_min` or `_max` keep the smallest or largest value instead of the mean. Values that are not
    finite do not count; what had no others is NaN.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self._values: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor | int] = {}

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Take in detached 0-d tensors, all on one device. Never waits for it."""
        if not metrics:
            return
        values = torch.stack([metric.float() for metric in metrics.values()])
        finite = values.isfinite()
        # A value that does not count is 0 in a sum, and NaN in an extreme, which fmin and fmax pass over.
        terms, extremes = torch.where(finite, values, 0.0).unbind(), torch.where(finite, values, torch.nan).unbind()
        for name, term, extreme, count in zip(metrics, terms, extremes, finite.float().unbind(), strict=True):
            if name.endswith("_min"):
                self._values[name] = torch.fmin(self._values.get(name, extreme), extreme)
            elif name.endswith("_max"):
                self._values[name] = torch.fmax(self._values.get(name, extreme), extreme)
            else:
                self._values[name] = self._values.get(name, 0.0) + term
                self._counts[name] = self._counts.get(name, 0) + count

    def merge(self, state: Mapping[str, Any]) -> None:
        """Take in what others have taken in, as `state_dict` gives it."""
        for name, value in state["values"].items():
            ours = self._values.get(name)
            theirs = value if ours is None else value.to(ours.device)
            if name.endswith("_min"):
                self._values[name] = theirs if ours is None else torch.fmin(ours, theirs)
            elif name.endswith("_max"):
                self._values[name] = theirs if ours is None else torch.fmax(ours, theirs)
            else:
                self._values[name] = theirs if ours is None else ours + theirs
                self._counts[name] = self._counts.get(name, 0) + state["counts"][name].to(theirs.device)

    def add_each(self, name: str, values: Float[Tensor, " E"]) -> None:
        """Take in every value of a metric that is averaged. Never waits for the device."""
        finite = values.isfinite()
        self._values[name] = self._values.get(name, 0.0) + torch.where(finite, values, 0.0).sum()
        self._counts[name] = self._counts.get(name, 0) + finite.sum()

    def fetch(self) -> dict[str, float]:
        """The averages since the last fetch, in one transfer to the host; begins anew."""
        if not self._values:
            return {}
        means = [
            value if name.endswith(("_min", "_max")) else value / self._counts[name]
            for name, value in self._values.items()
        ]
        averages = dict(zip(self._values, torch.stack(means).tolist(), strict=True))
        self._values, self._counts = {}, {}
        return averages

    def state_dict(self) -> dict[str, Any]:
        """What is taken in and not fetched yet."""
        return {"values": dict(self._values), "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._values = dict(state["values"])
        self._counts = dict(state["counts"])


class SilentLogger(Logger):
    """The logger of a rank that another one logs for."""

    def __init__(self) -> None:
        """Open nothing."""

    def scalars(self, step: int, seconds: float, values: Mapping[str, float | int]) -> None:
        """The first rank has them."""

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Likewise."""

    def text(self, name: str, markdown: str, *, step: int | None = None) -> None:
        """Likewise."""

    def notices(self) -> list[str]:
        """There are no files to tell of."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], *, elsewhere: bool = False) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing is open."""


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


class RunLock:
    """Keeps a second process out of a logdir. The system releases it when this process ends, however it ends."""

    def __init__(self, logdir: Path) -> None:
        """Take the lock.

        Raises:
            LogdirInUseError: another live process has it.
        """
        self._path = logdir / LOCK
        self._take()

    def hold(self) -> None:
        """Make sure that the lock is where another process would look for it; take it anew where it was removed.

        Raises:
            LogdirInUseError: another live process has taken it meanwhile.
        """
        try:
            there = os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            there = False
        if not there:
            self._file.close()
            self._take()

    def _take(self) -> None:
        self._file = safe_files.open_in_place(self._path)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            owner = self._file.read(LONGEST_ID).decode("ascii", errors="replace").strip() or "unknown"
            self._file.close()
            raise LogdirInUseError(
                f"{self._path.parent} is in use by process {owner};"
                " give another --logdir, or stop that process and start again"
            ) from error
        self._file.truncate(0)
        # The process id is only for people to read: the lock holds without it, on a full disk, too.
        with contextlib.suppress(OSError):
            os.write(self._file.fileno(), f"{os.getpid()}\n".encode())

    def release(self) -> None:
        """Let the next process in, and leave no process id behind, since another process may get the same one."""
        with contextlib.suppress(OSError):
            self._file.truncate(0)
        self._file.close()


class SilentLock(RunLock):
    """The lock of a rank: another one holds the folder for it."""

    def __init__(self) -> None:
        """Take nothing."""

    def hold(self) -> None:
        """The first rank does."""

    def release(self) -> None:
        """Nothing is held."""


def save_run_facts(
    logdir: Path,
    resolved: Config,
    argv: Sequence[str],
    *,
    defaults: Config,
    flags: Mapping[str, str | None] | None = None,
    changes: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Write config.yaml, and run.json with the command, the commit and the package versions.

    Args:
        logdir: an existing folder.
        resolved: the run's config.
        argv: the command, program included.
        defaults: the config to compare with.
        flags: the program's own, which are no config keys and yet make another kind of run.
        changes: of the config at which steps, where the run has gone on otherwise than it was.

    Returns:
        A page for TensorBoard's text tab: the command, what differs from the defaults, the resolved config.
    """
    config.save(resolved, logdir / CONFIG_FILE)
    command = shlex.join(argv)
    facts = {
        "command": command,
        "program": argv[0],
        "flags": {name: value for name, value in (flags or {}).items() if value is not None},
        "changes": list(changes),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }
    safe_files.write_text(logdir / RUN_FILE, json.dumps(facts, indent=2) + "\n")
    before = defaults.flat()
    differing = [
        f"| {key} | {before.get(key)} | {value} |" for key, value in config.difference(resolved, defaults).items()
    ]
    table = ["| key | default | this run |", "| --- | --- | --- |", *differing] if differing else ["nothing"]
    yaml_block = ["```yaml", config.to_yaml(resolved).rstrip(), "```"]
    return "\n".join([f"`{command}`", "", "## Differs from the defaults", "", *table, "", "## Config", "", *yaml_block])


def _commit() -> str | None:
    """The commit of the code that runs, marked where files differ from it; None where there is no repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
