"""Where else a run's figures, pictures and texts go: TensorBoard, Weights & Biases, a class of the user's own.

metrics.jsonl has the figures whatever else there is: what is read back comes from there.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch.utils.tensorboard import summary

from comparing import runs
from comparing.runs import METRICS
from config import ConfigError, load_function
from system import safe_files
from training.records import EventFile

VERBS = ("scalars", "image", "text", "close")
# The file in a logdir that tells in which run of Weights & Biases its figures are.
WANDB_FILE, WANDB_PROJECT = "wandb.json", "dreamer-routing"
MOST_ID = 2**10


class Sink(Protocol):
    """Takes what a run tells. It is made with the logdir, which exists, and then

    - `resume_step`: the step of the checkpoint that the run goes on from, and None for a run that begins. What an
      earlier process told beyond that step is told again;
    - `config`: the run's, as nested plain values.

    Attributes:
        notices: lines that the user should read. Whoever prints them empties the list.
    """

    notices: list[str]

    def scalars(self, step: int, seconds: float, values: Mapping[str, float | int]) -> None: ...

    def image(self, step: int, name: str, image: np.ndarray) -> None: ...

    def text(self, name: str, markdown: str, *, step: int | None = None) -> None: ...

    def close(self) -> None: ...


MakeSink = Callable[..., Any]


class TensorBoardSink:
    """Scalars and pictures in sections, as `score/valid_gap`, and texts, in an event file.

    TensorBoard hides what a process that was killed has logged beyond the checkpoint.
    """

    def __init__(self, logdir: Path, *, resume_step: int | None, config: Mapping[str, Any]) -> None:
        """Begin an event file.

        Raises:
            OSError: it cannot be written.
        """
        self._events = EventFile(logdir, purge_step=0 if resume_step is None else resume_step + 1)

    @property
    def notices(self) -> list[str]:
        """Those of the file."""
        return self._events.notices

    def scalars(self, step: int, seconds: float, values: Mapping[str, float | int]) -> None:
        """Log figures."""
        for name, value in values.items():
            self._events.add(summary.scalar(runs.tag(name), value), step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Log a picture, uint8 `[height, width, 3]`."""
        self._events.add(summary.image(runs.tag(name), image, dataformats="HWC"), step)

    def text(self, name: str, markdown: str, *, step: int | None = None) -> None:
        """Show a page in the text tab; with `step`, a line of a diary."""
        self._events.add(summary.text(name, markdown), step)

    def close(self) -> None:
        """Close the file."""
        self._events.close()


class WandbSink:
    """Weights & Biases, with env steps as its steps. Its own variables say which project, and whether it is offline.

    A run that goes on from where it was saved goes on in the same run there. What was told beyond the last checkpoint
    cannot be taken back, and what was written offline cannot be gone on with: then another run begins with the figures
    so far, so that it has none twice.
    """

    def __init__(self, logdir: Path, *, resume_step: int | None, config: Mapping[str, Any]) -> None:
        """Begin a run, or go on with one.

        Raises:
            ConfigError: it cannot begin.
        """
        import wandb

        self.notices: list[str] = []
        self._wandb = wandb
        known, before = _wandb_id(logdir), [] if resume_step is None else [*_rows(logdir)]
        last = max((row["step"] for row in before), default=0)
        offline = wandb.setup().settings.mode in ("offline", "dryrun")
        goes_on = bool(known) and resume_step is not None and last <= resume_step and not offline
        name = known if goes_on and known else uuid.uuid4().hex[:12]
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", WANDB_PROJECT),
                dir=str(logdir),
                name=logdir.name,
                id=name,
                resume="allow" if goes_on else None,
                config=dict(config),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"logger wandb cannot begin ({reason}); log in with wandb login, or set WANDB_MODE=offline"
            ) from error
        safe_files.write_text(logdir / WANDB_FILE, json.dumps({"id": name}) + "\n")
        if before and resume_step is not None and not goes_on:
            self.notices.append(f"Weights & Biases: run {name} begins with the figures up to step {resume_step}")
            for row in before:
                if (step := int(row.pop("step"))) <= resume_step:
                    self.scalars(step, row.pop("seconds"), row)

    def scalars(self, step: int, seconds: float, values: Mapping[str, float | int]) -> None:
        """Log figures; those of one step are one row there."""
        self._run.log({"seconds": seconds, **{runs.tag(name): value for name, value in values.items()}}, step=step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Log a picture, uint8 `[height, width, 3]`."""
        self._run.log({runs.tag(name): self._wandb.Image(image)}, step=step)

    def text(self, name: str, markdown: str, *, step: int | None = None) -> None:
        """Keep a page in the run's summary; with `step`, the latest line of a diary."""
        self._run.summary[name] = markdown

    def close(self) -> None:
        """Hand over what is left, and end the process that sends it."""
        self._run.finish()


class Guarded:
    """A sink that is left out once it fails, since no log is worth a run."""

    def __init__(self, sink: Any, name: str) -> None:
        """Take a sink that is there, and what the config calls it."""
        self._sink, self._name, self._failed = sink, name, False
        self.notices: list[str] = getattr(sink, "notices", [])

    def scalars(self, step: int, seconds: float, values: Mapping[str, float | int]) -> None:
        """As the sink's."""
        self._try("scalars", step, seconds, values)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """As the sink's."""
        self._try("image", step, name, image)

    def text(self, name: str, markdown: str, *, step: int | None = None) -> None:
        """As the sink's."""
        self._try("text", name, markdown, step=step)

    def close(self) -> None:
        """As the sink's."""
        self._try("close")

    def _try(self, verb: str, *arguments: Any, **named: Any) -> None:
        if self._failed:
            return
        try:
            getattr(self._sink, verb)(*arguments, **named)
        # Whatever a service or a user's class may raise.
        except Exception as error:
            self._failed = True
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            self.notices.append(
                f"warning: logger {self._name} failed in {verb} ({cause}) and is left out from here on; {METRICS} has"
                " all numbers"
            )
            with contextlib.suppress(Exception):
                self._sink.close()


SINKS: dict[str, MakeSink] = {"tensorboard": TensorBoardSink, "wandb": WandbSink}


def find_sinks(names: str) -> list[MakeSink]:
    """What makes the sinks that a config names, separated by commas; none for an empty text.

    Raises:
        ConfigError: there is no such sink, or it lacks a package or one of its four methods.
    """
    return [_found(name) for name in (part.strip() for part in names.split(",")) if name]


def _found(name: str) -> MakeSink:
    if name in SINKS:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f'logger {name} needs its package: pip install -e ".[{name}]"')
        return _guarding(SINKS[name], name) if name != "tensorboard" else SINKS[name]
    if ":" not in name:
        raise ConfigError(f"logger has {name!r}; choose among {', '.join(SINKS)}, or name a class as module:Class")
    made = load_function(name, key="logger")
    if missing := [verb for verb in VERBS if not callable(getattr(made, verb, None))]:
        raise ConfigError(f"logger names {name!r}, which has no {', '.join(missing)}; docs/loggers.md has an example")
    return _guarding(made, name)


def _guarding(make: MakeSink, name: str) -> MakeSink:
    return lambda logdir, **options: Guarded(make(logdir, **options), name)


def _wandb_id(logdir: Path) -> str | None:
    """The run of Weights & Biases that a logdir's figures are in; None where none is known."""
    try:
        known = json.loads(safe_files.read_text(logdir / WANDB_FILE, most=MOST_ID))["id"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return known if isinstance(known, str) and known.isalnum() else None


def _rows(logdir: Path) -> Iterator[dict[str, float]]:
    """The rows of metrics.jsonl that can be read."""
    try:
        lines = safe_files.read_text(logdir / METRICS, most=runs.MOST_LOG).splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        if (row := runs.metric_row(line.encode())) is not None:
            yield {name: math.nan if value is None else value for name, value in row.items()}
