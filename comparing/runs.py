"""Reads what runs left in their logdirs: metrics.jsonl and config.yaml, or any TensorBoard event files.

Nothing here needs PyTorch, whose import takes longer than reading many runs.
"""

from __future__ import annotations

import fcntl
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

import config
from config import Config, UserError
from system import safe_files

METRICS = "metrics.jsonl"
CONFIG_FILE = "config.yaml"
RUN_FILE = "run.json"
LOCK = "lock"
EVENT_FILES = "*tfevents*"
FINAL_EVALUATION = ("eval_return", "eval_gap", "eval_plan_gap", "eval_move_error", "eval_reward")
# A seed as runs are commonly named after it: `-seed3`, a last folder `/3`, and `__3__` before a time stamp.
SEEDS = (
    re.compile(r"[-_./]*seed[-_=]?(\d+)", re.IGNORECASE),
    re.compile(r"(?:^|/)(\d+)$"),
    re.compile(r"__(\d+)__\d{9,}$"),
)
# TensorBoard's sections, and the metrics and pictures in each; what no other pattern matches is in the last one.
# TensorBoard shows them by the alphabet and opens the first two: actor, which is a row of charts, and score.
SECTIONS = (
    ("actor", r"actor_entropy.*"),
    ("score", r"(valid|train|episode)_.*(return|gap|length|move_error|reward|exact).*"),
    ("test", r"eval_.*"),
    ("time", r"fps|updates|checkpoint_.*|env_restarts|bad_inputs"),
    ("training", r"(model|actor|critic|q|policy|alpha)_loss|actor_saturation|target_entropy|train/alpha"),
    ("training", r".*_grad_norm.*|(model|actor|critic|q|policy|alpha)_clip_rate|.*_skips_max|rollbacks_max"),
    ("training", r"group_.*|ratio_clip_rate|reference_kl|sampling_error_max|logits_.*|completion_length"),
    ("value", r"(value|target|advantage|return)_.*|critic_error|train/q_(mean|std)"),
    ("view", r"(validation|test)_.*"),
    ("world_model", r".*"),
)
# Metrics whose names have had a slash from the beginning.
WITH_SLASH = ("train/alpha", "train/q_mean", "train/q_std", "train/q_grad_norm", "train/policy_grad_norm")
# The most bytes of a log (its rows take a few times as many in memory), and of run.json.
MOST_LOG, MOST_FACTS = 2**30, 2**20


class UnreadableRunError(UserError):
    """A folder that nothing can be read from. The message is one line."""


class Series(NamedTuple):
    """One metric over a run; NaN where it was not finite."""

    steps: Float[np.ndarray, " P"]
    minutes: Float[np.ndarray, " P"]
    values: Float[np.ndarray, " P"]


class Run(NamedTuple):
    """What a logdir holds.

    Attributes:
        path: the logdir.
        series: every metric, by its name.
        steps: env steps at the last row.
        minutes: training time at the last row; by the clock, without the pauses between files, for foreign runs.
        config: the resolved config; None for foreign runs.
        made_by: the program, and those of its flags that are no config keys; empty where it is not known.
        seed: the config's, or the one that the name tells; None where it tells none.
        status: finished, running or stopped; `event files` where there is nothing else to tell by.
        notes: what could not be read, a line each.
        changes: as from `changes_of`.
    """

    path: Path
    series: dict[str, Series]
    steps: float
    minutes: float
    config: Config | None
    made_by: dict[str, str]
    seed: int | None
    status: str
    notes: tuple[str, ...]
    changes: tuple[dict[str, Any], ...] = ()


def find(path: Path) -> list[Path]:
    """The run in this folder, or else every run in the folders below it.

    Raises:
        UnreadableRunError: there is none.
    """
    if not path.is_dir():
        raise UnreadableRunError("is no folder" if path.exists() else "does not exist")
    if _has_run(path):
        return [path]
    below = sorted({file.parent for name in (METRICS, EVENT_FILES) for file in path.rglob(name)})
    if not below:
        raise UnreadableRunError(f"has neither {METRICS} nor event files")
    return below


def read(path: Path) -> Run:
    """Read one logdir.

    Raises:
        UnreadableRunError: it holds no metrics.
    """
    rows, notes = _metric_rows(path / METRICS)
    foreign = not rows
    if foreign:
        # Runs of our own are read without TensorBoard, which takes a while to import.
        from comparing.event_files import scalars

        rows, event_notes = scalars(sorted(path.glob(EVENT_FILES)), name_of=metric_name)
        notes += event_notes
    if not rows:
        raise UnreadableRunError("; ".join(notes) or "nothing is logged yet")
    settings = _config(path / CONFIG_FILE, notes)
    seed = without_seed(path.as_posix())[1] if settings is None else _seed(settings, notes)
    made_by = _made_by(path / RUN_FILE, notes)
    last = rows[-1]
    return Run(
        path=path,
        series=_by_metric(rows),
        steps=float(last["step"]),
        minutes=last["seconds"] / 60,
        config=settings,
        made_by=made_by,
        seed=seed,
        status="event files" if foreign else _status(path, last),
        notes=tuple(notes),
        changes=tuple(changes_of(path)),
    )


def changes_of(path: Path) -> list[dict[str, Any]]:
    """With which settings the run in a folder has gone on otherwise than it was: `step`, `key`, `was` and `now`."""
    try:
        told = json.loads(safe_files.read_text(path / RUN_FILE, most=MOST_FACTS))["changes"]
        return [
            {"step": int(change["step"]), "key": str(change["key"]), "was": change["was"], "now": change["now"]}
            for change in told
        ]
    # Also the file of an older run, which lacks this entry, or a damaged one, which `_made_by` reports.
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return []


def without_seed(name: str) -> tuple[str, int | None]:
    """A run's name with its seed taken out, and the seed; None where the name tells none."""
    for pattern in SEEDS:
        match = pattern.search(name)
        if match is not None:
            return name[: match.start()] + name[match.end() :], int(match[1])
    return name, None


def tag(name: str) -> str:
    """What TensorBoard calls a metric of metrics.jsonl, or a picture: its section, and the last part of its name."""
    section = next(section for section, pattern in SECTIONS if re.fullmatch(pattern, name))
    return f"{section}/{name.rpartition('/')[2]}"


def metric_name(written: str) -> str:
    """What metrics.jsonl calls what TensorBoard has under this tag; the tag itself where it is none of `tag`."""
    known = [*WITH_SLASH, written.partition("/")[2]]
    return next((name for name in known if name and tag(name) == written), written)


def _config(path: Path, notes: list[str]) -> Config | None:
    """The config; None where there is none, or none that can be read, which is noted."""
    if not path.exists():
        return None
    try:
        return config.read(path)
    # Files of other programs may hold impossible dates and numbers, or a mapping that contains itself.
    except (ValueError, RecursionError) as error:
        notes.append(str(error) if str(path) in str(error) else f"{path.name} cannot be read ({error})")
        return None


def _seed(settings: Config, notes: list[str]) -> int | None:
    """The config's seed; None, and a note, where that is no whole number."""
    seed = settings.get("seed")
    if seed is None or type(seed) is int:
        return seed
    notes.append(f"{CONFIG_FILE}: seed is {seed!r}, which is no whole number, and so does not count as one")
    return None


def _has_run(path: Path) -> bool:
    return (path / METRICS).exists() or any(path.glob(EVENT_FILES))


def _status(path: Path, last: dict[str, Any]) -> str:
    if any(name in last for name in FINAL_EVALUATION):
        return "finished"
    return "running" if is_locked(path / LOCK) else "stopped"


def is_locked(path: Path) -> bool:
    """Whether a live process holds the lock. The process id in it may be another's by now, or of another container."""
    try:
        with safe_files.open_to_read(path) as file:
            # An empty lock was released. A shared lock for a moment only disturbs a run that begins just then.
            if not file.read(1):
                return False
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _metric_rows(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The whole rows of metrics.jsonl, and notes on those that are none."""
    try:
        lines = safe_files.read_bytes(path, most=MOST_LOG).split(b"\n")
    except FileNotFoundError:
        return [], []
    except OSError as error:
        return [], [f"{path.name} cannot be read ({error.strerror})"]
    rows, broken = [], []
    # After the last line break stands a row that is being written, or was when the run was killed.
    for number, line in enumerate(lines[:-1], start=1):
        row = metric_row(line)
        if row is None:
            broken.append(number)
        else:
            rows.append(row)
    if not broken:
        return rows, []
    return rows, [f"{path.name}: {len(broken)} of {len(lines) - 1} lines left out, the first is line {broken[0]}"]


def metric_row(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl as numbers; None where it is no whole row."""
    try:
        row = json.loads(line)
        if not all(value is None or isinstance(value, (int, float)) for value in row.values()):
            return None
        row = {name: None if value is None else float(value) for name, value in row.items()}
        return row if math.isfinite(row["step"]) and math.isfinite(row["seconds"]) else None
    # Numbers too large for a float, and endlessly nested lists, are caught here, too.
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def _by_metric(rows: Sequence[dict[str, Any]]) -> dict[str, Series]:
    points: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "seconds"):
                point = (row["step"], row["seconds"] / 60, np.nan if value is None else value)
                points.setdefault(name, []).append(point)
    return {name: Series(*np.array(entries, dtype=float).T) for name, entries in points.items()}


def _made_by(path: Path, notes: list[str]) -> dict[str, str]:
    """Which program made a run, and its own flags; nothing where that was not written down; a note if unreadable."""
    if not path.exists():
        return {}
    try:
        facts = json.loads(safe_files.read_text(path, most=MOST_FACTS))
        if "program" not in facts:
            return {}
        return {"program": str(facts["program"]), **{name: str(value) for name, value in facts["flags"].items()}}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        notes.append(f"{path.name} cannot be read ({cause}), so that the program that made this run is unknown")
        return {}
