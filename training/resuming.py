"""What a run goes on from: a checkpoint that fits its config, in a folder that is its own, of the same task."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import checkpoint
from checkpoint import CheckpointError
from comparing.runs import CONFIG_FILE, METRICS, MOST_FACTS, RUN_FILE, changes_of
from config import CommandLine, Config, ConfigError, UserError, difference, filled, parse, read
from envs.routing import RULES
from guard import NonFinite
from system import terminal
from system.safe_files import read_text

# A run whose replay holds another task cannot go on. Changes in how it is run are not reported.
REPLAY_KEYS = ("task", "trips", "replay", "cost", "cost_shown", "context", "reward_scale", "envs")
ROUTING_REPLAY_KEYS = ("nodes",)
UNREPORTED_KEYS = (
    "updates",
    "steps",
    "logdir",
    "device",
    "threads",
    "deterministic",
    "checkpoint_numbered",
    "log_every",
    "eval_every",
    "checkpoint_every",
)


# Settings that a run goes on with changed: each before and now.
Changes = dict[str, tuple[Any, Any]]


class Kind(NamedTuple):
    """What a value in a checkpoint has to be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


COUNT = Kind("a whole number from 0", lambda value: type(value) is int and 0 <= value < 2**53)
AMOUNT = Kind("a number from 0", lambda value: _is_number(value) and 0 <= value < math.inf)
YES_OR_NO = Kind("true or false", lambda value: type(value) is bool)
TEXT = Kind("text", lambda value: type(value) is str)
MAPPING = Kind("a mapping", lambda value: isinstance(value, dict))
TENSOR = Kind("a tensor", lambda value: isinstance(value, Tensor))
SCALAR = Kind("a tensor with one number", lambda value: isinstance(value, Tensor) and value.dim() == 0)
TENSORS = Kind(
    "tensors by name",
    lambda value: isinstance(value, dict) and all(isinstance(each, Tensor) for each in value.values()),
)
NUMBERS = Kind("numbers by name", lambda value: isinstance(value, dict) and all(map(_is_number, value.values())))
PAIR = Kind(
    "two whole numbers in order",
    lambda value: isinstance(value, list) and len(value) == 2 and all(map(COUNT.holds, value)) and value[0] <= value[1],
)
FILE_NAME = Kind("the name of a file", lambda value: type(value) is str and value == Path(value).name != "")
FILE_NAMES = Kind(
    "two lists of names of files",
    lambda value: (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(names, list) and all(map(FILE_NAME.holds, names)) for names in value)
    ),
)
# The content of a run's checkpoint. A list of one entry stands for any number of them; `?` marks entries that older
# checkpoints lack.
CHUNK = {"name": FILE_NAME, "start": COUNT, "stop": COUNT, "bytes?": COUNT}
FRAME = {
    **{name: TENSOR for name in ("corner", "scale", "size", "places", "seen")},
    "unit": AMOUNT,
    "on_earth": YES_OR_NO,
    "names": [TEXT],
}
# What a run knows of the log that it has learnt from; without a frame, that is of a world in whose units it is.
LOG = {"moves": COUNT, "checksum": COUNT, "frame?": FRAME}
WEIGHTS = {"agent": MAPPING, "step": COUNT, "agent_class?": TEXT, "log?": LOG}
COMMON: dict[str, Any] = {
    **WEIGHTS,
    "generators": TENSORS,
    "averages": {"values": TENSORS, "counts": TENSORS},
    "logger": {"bytes": COUNT, "rows?": COUNT, "checksum?": COUNT, "pending?": TEXT},
    "step_before?": COUNT,
    "updates": COUNT,
    "updates_owed": AMOUNT,
    "seconds": AMOUNT,
    "latest": NUMBERS,
    "finished": YES_OR_NO,
    "emergency": YES_OR_NO,
    f"{CONFIG_FILE}?": TEXT,
}
# And of a run that collects what it learns from, that learns from a log, or that practises.
_OWN: dict[str, Any] = {
    "generators": TENSORS,
    "averages": {"values": TENSORS, "counts": TENSORS},
    "replay": {
        "num_envs": COUNT,
        "length": Kind("a whole number from 1", lambda value: COUNT.holds(value) and value > 0),
        "saved_totals": PAIR,
        "saved_oldest?": PAIR,
        "chunks": [CHUNK],
        "reward_min": SCALAR,
        "reward_max": SCALAR,
        "memory?": TENSORS,
        "memory_chunks?": [CHUNK],
        "replaced?": FILE_NAMES,
        "fresh_column?": COUNT,
        "fresh_env?": COUNT,
    },
    "env": MAPPING,
    "acting": MAPPING,
    "row": TENSORS,
    "any_first": YES_OR_NO,
    "episode_return": TENSOR,
}
# Where several ranks have learnt together, the first one's stand with what all have, and the others' in a list.
RUN: dict[str, Any] = {**COMMON, **_OWN, "ranks?": [_OWN]}
# Of one whose environments are stepped elsewhere, what it has of pieces of episodes.
GATHERED = {**RUN, "slots": {"rows": TENSORS, "lengths": [COUNT], "origins": [TEXT]}, "collected": NUMBERS}
# Of one that begins with recorded episodes.
RECORDED = {**RUN, "record": {"episodes": COUNT, "rows": COUNT, "checksum": COUNT}}
STUDY = {**COMMON, "log": LOG, "ranks?": [{"generators": TENSORS, "averages": COMMON["averages"]}]}
# Of a run that draws what it learns from anew each time there is nothing else.
PRACTICE = COMMON


def require(state: Any, needed: Any, source: Path) -> None:
    """Check that a checkpoint holds what is needed, each value of its kind.

    Args:
        state: what was loaded.
        needed: `RUN` or `STUDY` to go on with a run, `WEIGHTS` for its agent alone.
        source: the file, for the message.

    Raises:
        CheckpointError: it does not.
    """
    fault = _fault(state, needed, "")
    if fault is not None:
        raise CheckpointError(f"{source} is no whole checkpoint of a run ({fault}); give another one")


def _fault(value: Any, needed: Any, where: str) -> str | None:
    """What is wrong with a value, if anything is."""
    if isinstance(needed, Kind):
        return None if needed.holds(value) else f"{where} is not {needed.words}"
    if isinstance(needed, list):
        if not isinstance(value, list):
            return f"{where} is not a list"
        faults = (_fault(entry, needed[0], f"{where}[{index}]") for index, entry in enumerate(value))
        return next((fault for fault in faults if fault), None)
    if not isinstance(value, dict):
        return f"{where or 'its content'} is not a mapping"
    for marked, kind in needed.items():
        name, place = marked.removesuffix("?"), f"{where}.{marked.removesuffix('?')}".removeprefix(".")
        if name in value:
            fault = _fault(value[name], kind, place)
        else:
            fault = None if marked.endswith("?") else f"{place} is missing"
        if fault:
            return fault
    return None


def require_like(ours: Any, theirs: Any, where: str) -> None:
    """Check that a loaded state has the structure of a present one: names, and shapes and types of tensors.

    Where the present one is an empty mapping, anything may come: there was nothing to keep yet.

    Raises:
        RuntimeError: it has not.
    """
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        if ours and ours.keys() != theirs.keys():
            raise RuntimeError(f"{where} has {sorted(map(str, theirs))}, and {sorted(map(str, ours))} are needed")
        for name in ours:
            require_like(ours[name], theirs[name], f"{where}.{name}")
    elif isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise RuntimeError(
                f"{where} is {theirs.dtype} {tuple(theirs.shape)}, and {ours.dtype} {tuple(ours.shape)} is needed"
            )
    elif type(ours) is not type(theirs):
        raise RuntimeError(f"{where} is {type(theirs).__name__}, and {type(ours).__name__} is needed")


@contextmanager
def fitting(source: Path, changes: Changes | None = None) -> Iterator[None]:
    """Say in one line that a checkpoint was made with another config, and what is known to be another."""
    try:
        yield
    except NonFinite as error:
        raise CheckpointError(f"{source} holds an agent that is not finite ({error}); give another one") from error
    # Loading raises these where parts of a state are of another shape or kind.
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, (CheckpointError, UserError)):
            raise
        lines = str(error).splitlines() or [type(error).__name__]
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
    command: CommandLine,
    logdir: Path,
    device: torch.device,
    *,
    program: str,
    take: Callable[[dict[str, Any], Path], None],
) -> tuple[dict[str, Any] | None, Path]:
    """The checkpoint to go on from, if any, and the folder it stands in.

    Args:
        command: for `--resume` and `--init`.
        logdir: where the run is to be.
        device: where the checkpoint's tensors are to be.
        program: who wants to go on.
        take: as for `checkpoint.load_latest`.

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
        state = checkpoint.load(Path(resume), device)
        take(state, Path(resume))
        return state, Path(resume).parent
    return (checkpoint.load_latest(logdir, device, take=take), logdir) if has_run else (None, logdir)


def saved_config(folder: Path, state: Mapping[str, Any], *, defaults: Config) -> Config:
    """The config of the run in a folder; the copy in its checkpoint where config.yaml is missing or damaged.

    Raises:
        ConfigError: neither can be read.
    """
    path = folder / CONFIG_FILE
    copy = state.get(CONFIG_FILE)
    try:
        saved = read(path)
        # A file that was cut at the end of a line is still a valid config.
        if copy is None or parse(copy, where=CONFIG_FILE).flat().keys() <= saved.flat().keys():
            return filled(saved, defaults, where=str(path))
        cause = f"{path} lacks keys"
    except ConfigError as error:
        if copy is None:
            raise
        cause = str(error)
    terminal.tell(f"warning: {cause}. The copy in the checkpoint is taken instead.")
    return filled(parse(copy, where=CONFIG_FILE), defaults, where=f"the copy of {CONFIG_FILE} in {folder}'s checkpoint")


def changes_since(folder: Path, state: Mapping[str, Any], config: Config, *, defaults: Config) -> Changes:
    """The settings in which the run in a folder goes on otherwise than it was.

    Args:
        folder: where the run is.
        state: its checkpoint.
        config: of the run that goes on.
        defaults: gives the keys that did not exist when the run was made.

    Raises:
        ConfigError: what replay holds would not be of the task that goes on.
    """
    if CONFIG_FILE not in state and not (folder / CONFIG_FILE).exists():
        return {}
    before = saved_config(folder, state, defaults=defaults)
    values = before.flat()
    changes = {
        key: (values.get(key), now) for key, now in difference(config, before).items() if key not in UNREPORTED_KEYS
    }
    for key in (*REPLAY_KEYS, *(ROUTING_REPLAY_KEYS if config.task in RULES else ())):
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
