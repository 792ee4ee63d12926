"""The files of samples: one for each scenario, CACHE/log/type/token.npz, each an episode that --replay reads too."""

from __future__ import annotations

import fcntl
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from scenarios import manifest
from scenarios.logs import MAPS, LogFolder
from scenarios.manifest import Entry
from scenarios.parts import Part
from scenarios.samples import FLAGS, Samples
from scenarios.scenario import Scenario
from scenarios.splits import Split
from settings.scenarios import LOG_NAME, SCENARIO_TYPES, TOKEN
from system import safe_files
from system.errors import UserError
from training import episode_files

# The array of a file that says what it holds.
PARTS = "parts"
LOCK = ".lock"
# Logs that a simulator has recorded. Names that begin with a dot are never read as episodes.
LOGS = ".logs"


class Cache:
    """A folder with the samples of scenarios.

    Attributes:
        folder: where they are.
        logs: what they are computed from, where a simulator has recorded it.
    """

    def __init__(self, folder: Path) -> None:
        """Name the folder; it is made when something is written."""
        self.folder = folder
        self.logs = LogFolder(folder / LOGS)

    def write(self, scenario: Scenario, samples: Samples, parts: Sequence[Part]) -> Entry:
        """Keep the samples of a scenario; a reader meets all of them or none.

        Raises:
            OSError: they cannot be written.
        """
        path = scenario.path(self.folder)
        for folder in (path.parents[1], path.parent):
            safe_files.make_folder(folder)
        stamps = tuple(part.stamp for part in parts)
        episode_files.write(path, {PARTS: np.array(stamps), **samples}, lasting=False)
        return Entry(scenario, stamps, path.stat().st_size)

    def read(self, scenario: Scenario, parts: Sequence[Part]) -> Samples:
        """The arrays of these parts, and the flags of an episode.

        Raises:
            UserError: there is no file, it is damaged, or it lacks one of them.
        """
        samples, stamps = self._read(scenario)
        if missing := lacking(stamps, parts):
            raise UserError(self.refusal(scenario, f"lacks {' and '.join(missing)}"))
        specs = {name: spec for part in parts for name, spec in part.arrays.items()}
        for name, spec in specs.items():
            shape = (scenario.rows, *spec.shape)
            values = samples.get(name)
            if values is None or values.shape != shape or values.dtype != spec.dtype:
                found = "nothing" if values is None else f"{values.dtype} of shape {list(values.shape)}"
                wanted = f"{np.dtype(spec.dtype)} of shape {list(shape)}"
                raise UserError(self.refusal(scenario, f"has {found} as {name}, where {wanted} is needed"))
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise UserError(self.refusal(scenario, f"has a number that is not finite in {name}"))
        return {name: samples[name] for name in (*specs, *FLAGS) if name in samples}

    def entry(self, scenario: Scenario) -> Entry | None:
        """What there is of a scenario, by its file alone; None where there is none that is whole."""
        try:
            samples, stamps = self._read(scenario)
        except UserError:
            return None
        lengths = {len(values) if values.ndim else 0 for values in samples.values()}
        if len(lengths) != 1 or not 1 <= max(lengths) <= scenario.rows:
            return None
        found = scenario._replace(rows=max(lengths))
        return Entry(found, stamps, scenario.path(self.folder).stat().st_size)

    def holds(self, entry: Entry) -> bool:
        """Whether the file that an entry tells of is there; that it is whole, its size says."""
        try:
            return entry.scenario.path(self.folder).stat().st_size == entry.size
        except OSError:
            return False

    def refusal(self, scenario: Scenario, fault: str) -> str:
        """A line about a scenario that cannot be used, and what would do."""
        return (
            f"scenario {scenario.token} ({scenario.path(self.folder)}) {fault}; remove that file, if there is one, and"
            " have it computed again: --mode cache, without cache.only"
        )

    def log_entries(self, log: str) -> dict[str, Entry]:
        """What was noted of the scenarios of a log, by token. A table that is damaged counts as none."""
        path = self.folder / log / manifest.FILE_NAME
        try:
            return {entry.scenario.token: entry for entry in manifest.read(path) if entry.scenario.log == log}
        except UserError:
            return {}

    def write_log_entries(self, log: str, entries: Mapping[str, Entry]) -> None:
        """Note what there is of the scenarios of a log.

        Raises:
            OSError: it cannot be written.
        """
        safe_files.make_folder(self.folder / log)
        manifest.write(self.folder / log / manifest.FILE_NAME, entries.values())

    def write_manifest(self) -> None:
        """Join the tables of all logs.

        Raises:
            OSError: it cannot be written.
        """
        entries = [entry for log in self._log_names() for entry in self.log_entries(log).values()]
        manifest.write(self.folder / manifest.FILE_NAME, entries)

    def manifest(self) -> list[Entry]:
        """All that the cache holds, and what it could not be computed of.

        Raises:
            UserError: there is no such table, or it is damaged.
        """
        path = self.folder / manifest.FILE_NAME
        if not path.exists():
            raise UserError(f"{self.folder} is no finished cache: it has no {manifest.FILE_NAME}; run --mode cache")
        return manifest.read(path)

    def tidy(self, log: str) -> None:
        """Remove what a process that was killed has left half-written in the folder of a log."""
        for path in (self.folder / log).glob("*/.*.npz"):
            path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove all that a cache consists of, logs of the simulator among it; any other file stays.

        Raises:
            OSError: something cannot be removed.
        """
        for log in self._log_names():
            for kind in SCENARIO_TYPES:
                _remove((self.folder / log / kind).glob("*.npz"), TOKEN)
                _remove_folder(self.folder / log / kind)
            (self.folder / log / manifest.FILE_NAME).unlink(missing_ok=True)
            _remove_folder(self.folder / log)
        for folder in (self.folder / LOGS / MAPS, self.folder / LOGS):
            _remove(folder.glob("*.npz"), LOG_NAME)
            _remove_folder(folder)
        for name in (manifest.FILE_NAME, *(f"{each}.txt" for each in Split._fields)):
            (self.folder / name).unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from computing into the same folder, which is made where there is none.

        Raises:
            UserError: one does already.
            OSError: the folder cannot be made or written to.
        """
        safe_files.make_folder(self.folder)
        with safe_files.open_in_place(self.folder / LOCK) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"{self.folder} is being filled by another process; give another --cache.path, or wait for it"
                ) from error
            yield

    def _read(self, scenario: Scenario) -> tuple[Samples, tuple[str, ...]]:
        path = scenario.path(self.folder)
        try:
            samples = episode_files.read(path)
        except episode_files.EpisodeFault as fault:
            raise UserError(self.refusal(scenario, str(fault))) from fault
        stamps = samples.pop(PARTS, np.array([], "<U1"))
        if stamps.dtype.kind != "U" or stamps.ndim != 1:
            raise UserError(self.refusal(scenario, f"has {PARTS} that are no names"))
        return samples, tuple(stamps.tolist())

    def _log_names(self) -> list[str]:
        if not self.folder.is_dir():
            return []
        return sorted(
            path.name
            for path in self.folder.iterdir()
            if LOG_NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
        )


def lacking(stamps: Sequence[str], parts: Sequence[Part]) -> list[str]:
    """The names of parts that are not among those that a file holds, in the version that is built now."""
    return [part.name for part in parts if part.stamp not in stamps]


def _remove(paths: Iterable[Path], names: re.Pattern[str]) -> None:
    for path in paths:
        if names.fullmatch(path.stem) and not path.is_symlink():
            path.unlink()


def _remove_folder(folder: Path) -> None:
    """Remove an empty folder; one that holds something else stays."""
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()
