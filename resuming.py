"""What a run goes on from: a checkpoint that fits its config, in a folder that is its own, of the same task."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import checkpoint
from checkpoint import CheckpointError
from config import CommandLine, Config, ConfigError, difference, read
from envs.routing import RULES
from runs import CONFIG_FILE, METRICS, MOST_FACTS, RUN_FILE, changes_of
from safe_files import read_text

# A run whose replay holds another task cannot go on; of changes in how it is run nobody needs to be told.
WHAT_REPLAY_HOLDS = ("task", "cost", "cost_shown", "context", "reward_scale", "envs")
OF_ROUTING = ("nodes",)
UNREMARKABLE = (
    "steps",
    "logdir",
    "device",
    "threads",
    "checkpoint_numbered",
    "log_every",
    "eval_every",
    "checkpoint_every",
)


# The settings, before and now, in which a run goes on otherwise than it was.
Changes = dict[str, tuple[Any, Any]]


@contextmanager
def fitting(source: Path, changes: Changes | None = None) -> Iterator[None]:
    """Say in one line that a checkpoint was made with another config, and what is known to be another."""
    try:
        yield
    except (RuntimeError, KeyError) as error:
        if isinstance(error, CheckpointError):
            raise
        lines = str(error).splitlines()
        cause = textwrap.shorten(lines[min(1, len(lines) - 1)], 160, placeholder=" ...")
        if changes:
            cause += f"; changed since it was made: {listed(changes)}"
        raise CheckpointError(
            f"{source} does not fit this config ({cause}); give the config that it was made with, or another --logdir"
        ) from error


def listed(changes: Changes) -> str:
    """Changes as one reads them."""
    return ", ".join(f"{key} {now} (was {was})" for key, (was, now) in changes.items())


def require_class(state: dict[str, Any], needed: object, source: Path) -> None:
    """Check that a checkpoint is of this kind of agent. Older ones do not say; weights for acting are a Dreamer's.

    Raises:
        CheckpointError: it is of another.
    """
    was = state.get("agent_class", "Dreamer" if "config" in state else None)
    now = getattr(needed, "__name__", None)
    if None not in (was, now) and was != now:
        raise CheckpointError(f"{source} holds a {was}, where a {now} is needed; give it to the program that made it")


def load_start(
    command: CommandLine, logdir: Path, device: torch.device, *, program: str
) -> tuple[dict[str, Any] | None, Path]:
    """The checkpoint to go on from, if any, and the folder it stands in.

    Raises:
        ConfigError: `--resume` or `--init` in a logdir that has a run of its own, or the logdir holds what another
            program than `program` has logged, of which nothing can be gone on with.
        CheckpointError: the file cannot be used.
    """
    resume, init = command.entry["resume"], command.entry["init"]
    if resume and init:
        raise ConfigError("--resume goes on with a run and --init begins one; give one of them")
    has_run = (logdir / checkpoint.LATEST).exists() or (logdir / checkpoint.PREVIOUS).exists()
    if not has_run and (maker := _other_maker(logdir, program)):
        raise ConfigError(f"{logdir} holds a run of {maker}, which would be lost; give another --logdir")
    if init and has_run:
        raise ConfigError(f"{logdir} has a run of its own; give --init with another --logdir")
    if resume and has_run and Path(resume).resolve().parent != logdir.resolve():
        raise ConfigError(
            f"{logdir} has a run of its own; give --resume with that run's own checkpoints or another --logdir"
        )
    if resume:
        return checkpoint.load(Path(resume), device), Path(resume).parent
    return (checkpoint.load_latest(logdir, device), logdir) if has_run else (None, logdir)


def changes_since(folder: Path, config: Config, *, defaults: Config) -> Changes:
    """The settings in which the run in a folder goes on otherwise than it was.

    Raises:
        ConfigError: what replay holds would not be of the task that goes on.
    """
    if not (folder / CONFIG_FILE).exists():
        return {}
    before = read(folder / CONFIG_FILE, missing_from=defaults)
    values = before.flat()
    changes = {
        key: (values.get(key), now) for key, now in difference(config, before).items() if key not in UNREMARKABLE
    }
    for key in (*WHAT_REPLAY_HOLDS, *(OF_ROUTING if config.task in RULES else ())):
        if key in changes:
            was, now = changes[key]
            raise ConfigError(
                f"the run in {folder} has {key} {was} and cannot go on with {now}, as what it has lived through would"
                " not fit; give another --logdir"
            )
    return changes


def history(folder: Path, changes: Changes, *, step: int) -> list[dict[str, Any]]:
    """The changes that the run in a folder has seen so far, and those with which it goes on from `step`, in order.

    What it had seen behind that step has not happened to the run that goes on, but for the settings it ended with.
    """
    merged: dict[tuple[int, str], dict[str, Any]] = {}
    now = [{"step": step, "key": key, "was": was, "now": now} for key, (was, now) in changes.items()]
    for change in [*changes_of(folder), *now]:
        place = min(change["step"], step), change["key"]
        was = merged[place]["was"] if place in merged else change["was"]
        merged[place] = {**change, "step": place[0], "was": was}
    return [change for change in merged.values() if change["was"] != change["now"]]


def _other_maker(logdir: Path, program: str) -> str | None:
    """What has logged something in a folder, if it was not `program`."""
    log = logdir / METRICS
    if not log.exists() or not log.stat().st_size:
        return None
    try:
        maker = json.loads(read_text(logdir / RUN_FILE, most=MOST_FACTS)).get("program")
    except (OSError, ValueError, AttributeError, RecursionError):
        maker = None
    return None if maker == program else str(maker or "another program")
