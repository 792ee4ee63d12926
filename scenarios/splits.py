"""Which scenarios train, validate and test: by whole logs, so that no moment of traffic is in two of the sets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from scenarios.manifest import Entry
from settings.scenarios import SplitSettings
from system import safe_files
from system.errors import UserError


class Split(NamedTuple):
    """Entries of a cache, in four sets.

    Attributes:
        train: to be learnt from.
        valid: logs that were recorded after those.
        test: logs that were recorded last.
        held_out: logs of maps that nothing else is of.
    """

    train: list[Entry]
    valid: list[Entry]
    test: list[Entry]
    held_out: list[Entry]


def split(entries: Sequence[Entry], settings: SplitSettings) -> Split:
    """Entries by the set that their log belongs to, in their order.

    Raises:
        UserError: nothing is left to train on.
    """
    found = _split(entries, settings)
    if entries and not found.train:
        raise UserError("no log is left to train on; give more logs, or hold out less (split)")
    return found


def write_lists(folder: Path, entries: Sequence[Entry], settings: SplitSettings) -> None:
    """Name the files of each set in a text of its own beside them, which --replay reads.

    Raises:
        OSError: one cannot be written.
    """
    for name, those in _split(entries, settings)._asdict().items():
        paths = (entry.scenario.path(folder).relative_to(folder) for entry in those)
        safe_files.write_text(folder / f"{name}.txt", "".join(f"{path}\n" for path in paths))


def _split(entries: Sequence[Entry], settings: SplitSettings) -> Split:
    sets = log_sets(((entry.scenario.log, entry.scenario.map) for entry in entries), settings)
    found = Split([], [], [], [])
    for entry in entries:
        getattr(found, sets[entry.scenario.log]).append(entry)
    return found


def log_sets(logs: Iterable[tuple[str, str]], settings: SplitSettings) -> dict[str, str]:
    """The set that each log belongs to.

    Args:
        logs: name and map of each.
        settings: the shares, and the maps that are held out.
    """
    recordings: dict[tuple[str, str], set[str]] = defaultdict(set)
    sets: dict[str, str] = {}
    for log, of_map in logs:
        if of_map in settings.held_out_maps:
            sets[log] = "held_out"
        else:
            recordings[of_map, recording_of(log)].add(log)
    for names in recordings.values():
        # Names of a recording's logs end with the time, so that they come in its order.
        in_time = sorted(names)
        test, valid = (_some(share, len(in_time)) for share in (settings.test, settings.valid))
        train = len(in_time) - valid - test
        sets |= dict.fromkeys(in_time[:train], "train")
        sets |= dict.fromkeys(in_time[train : train + valid], "valid")
        sets |= dict.fromkeys(in_time[train + valid :], "test")
    return sets


def recording_of(log: str) -> str:
    """The recording that a log is cut from: its name without the last part, which is the time."""
    recording, dash, time = log.rpartition("-")
    return recording if dash and time.isdigit() else ""


def _some(share: float, count: int) -> int:
    """A share of the logs; one at least where there is a share, and more than two logs."""
    return max(round(share * count), int(share > 0 and count > 2))
