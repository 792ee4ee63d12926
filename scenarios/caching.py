"""Fills a cache: from logs to scenarios, through a filter, to samples in files; what is there already stays."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from tqdm import tqdm

from driving.roads import RoadMap
from driving.scene import Log
from scenarios import builder, filtering
from scenarios.cache import Cache, lacking
from scenarios.logs import LogFolder, prepared
from scenarios.manifest import Entry
from scenarios.parts import Needs, Part, chosen
from scenarios.profiling import profiled
from scenarios.report import Report
from scenarios.samples import compute
from scenarios.scenario import Scenario
from scenarios.splits import write_lists
from scenarios.work import Workers, workers_of
from settings.scenarios import FilterSettings, ScenarioSettings
from system import safe_files
from system.errors import UserError

# Scenarios that are computed at a time: those that begin one after the other have most of their frames in common.
CHUNK = 200
# Arrays that an episode has beside what is observed.
EPISODE = {"action", "reward"}
# Rows that are not computed, as a report calls them.
AFTER = "rows after an ego has touched another or left the road"

Job = TypeVar("Job")
Result = TypeVar("Result")


def fill(settings: ScenarioSettings, needs: Needs, known: Sequence[Part], *, seed: int) -> Report:
    """Have the samples of all scenarios that a filter takes in the cache; with `cache.only`, see that they are.

    It may be stopped or killed at any moment: what is written stays, and the rest comes with the next call.

    Args:
        settings: the whole way from logs to samples.
        needs: what the model asks of a sample.
        known: all parts that can be built.
        seed: of the filter's shuffling.

    Raises:
        UserError: logs cannot be read or recorded, the filter takes nothing, the cache cannot be written to or is being
            filled; with `cache.only`, a scenario is not there.
    """
    cache, parts = Cache(Path(settings.cache.path)), chosen(needs, known)
    if settings.cache.only:
        return look_up(cache, settings.filter, parts, seed=seed)
    try:
        with (
            cache.locked(),
            workers_of(settings.cache.workers) as workers,
            profiled(wanted=settings.cache.profile),
        ):
            if settings.cache.clean:
                cache.clear()
            logs, names = prepared(settings.logs, cache.logs, workers)
            # Whatever a model needs, files are episodes.
            wanted = [part for part in known if part in parts or part.arrays.keys() & EPISODE]
            filling = _Filling(cache, logs, workers, parts=wanted, known=known)
            report = filling.run(names, settings.filter, seed=seed, force=settings.cache.force)
            write_lists(cache.folder, report.entries, settings.split)
            return report
    except OSError as error:
        raise UserError(f"{cache.folder} cannot be filled ({error.strerror}); {safe_files.remedy(error)}") from error


def look_up(cache: Cache, settings: FilterSettings, parts: Sequence[Part], *, seed: int) -> Report:
    """The scenarios of a cache that a filter takes, by the cache's own table.

    Raises:
        UserError: there is no such table, the filter takes nothing of it, or a scenario lacks a part.
    """
    report = Report()
    entries = {entry.scenario.token: entry for entry in cache.manifest()}
    # Single rows and whole scenarios may lie side by side.
    kept = [entry.scenario for entry in entries.values() if (entry.scenario.rows == 1) == settings.expand]
    taken = filtering.apply(kept, settings, seed=seed)
    report.left_out.update(taken.left_out)
    for scenario in taken.scenarios:
        entry = entries[scenario.token]
        if missing := lacking(entry.parts, parts):
            raise UserError(cache.refusal(scenario, f"lacks {' and '.join(missing)}"))
        if not entry.fault and not cache.holds(entry):
            raise UserError(cache.refusal(scenario, "has no file, or one that has changed since"))
        report.add(entry)
    return report


class _Chunk(NamedTuple):
    """Scenarios of one log that are computed together, and where their samples go."""

    cache: Path
    logs: Path
    log: str
    parts: tuple[Part, ...]
    scenarios: tuple[Scenario, ...]


class _Filling:
    """One call of `fill`: what it works with, and what it has done.

    Attributes:
        entries: of the scenarios that are done, by log and token.
    """

    def __init__(
        self, cache: Cache, logs: LogFolder, workers: Workers, *, parts: Sequence[Part], known: Sequence[Part]
    ) -> None:
        self.cache, self.logs, self.workers = cache, logs, workers
        self.parts, self.known = parts, known
        self.report = Report()
        self.entries: dict[str, dict[str, Entry]] = {}

    def run(self, names: Sequence[str], settings: FilterSettings, *, seed: int, force: bool) -> Report:
        taken = filtering.apply(self._build(names), settings, seed=seed)
        self.report.left_out.update(taken.left_out)
        by_log: dict[str, list[Scenario]] = defaultdict(list)
        for scenario in taken.scenarios:
            by_log[scenario.log].append(scenario)
        chunks: list[_Chunk] = []
        for log, scenarios in by_log.items():
            self._recall(log, scenarios)
            chunks += self._chunks(log, scenarios, force=force)
        self._compute(chunks)
        self.cache.write_manifest()
        for scenario in taken.scenarios:
            entry = self.entries[scenario.log][scenario.token]
            self.report.add(entry)
            self.report.left_out[AFTER] += 0 if entry.fault else scenario.rows - entry.scenario.rows
        return self.report

    def _build(self, names: Sequence[str]) -> list[Scenario]:
        """All scenarios of some logs."""
        work = functools.partial(_build, self.logs.folder)
        found: dict[str, builder.Built] = {}
        with tqdm(total=len(names), desc="logs", delay=2, disable=None) as bar:
            for name, built in self.workers.each(work, names):
                found[name] = built
                bar.update()
        # Logs are done in any order, and come in that of their names.
        for name in names:
            self.report.left_out.update(found[name].left_out)
        return [scenario for name in names for scenario in found[name].scenarios]

    def _recall(self, log: str, scenarios: Sequence[Scenario]) -> None:
        """Find out what there is of a log already."""
        self.cache.tidy(log)
        noted = self.cache.log_entries(log)
        own = {token: entry for token, entry in noted.items() if entry.fault or self.cache.holds(entry)}
        for scenario in scenarios:
            # A run that was killed has noted nothing of the log that it was about.
            if scenario.token not in own and scenario.path(self.cache.folder).exists():
                if entry := self.cache.entry(scenario):
                    own[scenario.token] = entry
                else:
                    self.report.damaged += 1
        self.entries[log] = own

    def _chunks(self, log: str, scenarios: Sequence[Scenario], *, force: bool) -> Iterator[_Chunk]:
        """What is to be computed. Parts that a file holds for another model go into it again."""
        missing: dict[tuple[Part, ...], list[Scenario]] = defaultdict(list)
        for scenario in scenarios:
            entry = self.entries[log].get(scenario.token)
            there = entry.parts if entry else ()
            if force or entry is None or lacking(there, self.parts):
                wanted = tuple(part for part in self.known if part in self.parts or part.stamp in there)
                missing[wanted].append(scenario)
        for parts, those in missing.items():
            those.sort(key=lambda one: (one.frame, one.agent))
            for begin in range(0, len(those), CHUNK):
                some = tuple(those[begin : begin + CHUNK])
                yield _Chunk(self.cache.folder, self.logs.folder, log, parts, some)

    def _compute(self, chunks: Sequence[_Chunk]) -> None:
        """Compute, and note what is done as soon as a log is complete."""
        begin = time.perf_counter()
        open_chunks: dict[str, int] = defaultdict(int)
        for chunk in chunks:
            open_chunks[chunk.log] += 1
        rows = sum(scenario.rows for chunk in chunks for scenario in chunk.scenarios)
        with tqdm(total=rows, desc="samples", unit=" samples", unit_scale=True, delay=2, disable=None) as bar:
            for chunk, (entries, seconds) in self.workers.each(_compute, chunks):
                self.entries[chunk.log] |= {entry.scenario.token: entry for entry in entries}
                open_chunks[chunk.log] -= 1
                if not open_chunks[chunk.log]:
                    self.cache.write_log_entries(chunk.log, self.entries[chunk.log])
                self.report.computed += len(entries)
                self.report.processor += seconds
                self.report.rows += sum(entry.scenario.rows for entry in entries if not entry.fault)
                bar.update(sum(scenario.rows for scenario in chunk.scenarios))
        for log in self.entries.keys() - open_chunks.keys():
            self.cache.write_log_entries(log, self.entries[log])
        self.report.seconds = time.perf_counter() - begin


def _build(folder: Path, name: str) -> builder.Built:
    return builder.build(*LogFolder(folder).open(name))


def _compute(chunk: _Chunk) -> tuple[list[Entry], float]:
    """The entries of a chunk's scenarios, and the seconds of the processor that they took."""
    cache, begin = Cache(chunk.cache), time.process_time()
    log, road_map = _open(chunk.logs, chunk.log)
    entries = []
    for scenario, samples, fault in compute(log, road_map, chunk.scenarios, chunk.parts):
        if fault:
            scenario.path(chunk.cache).unlink(missing_ok=True)
            entries.append(Entry(scenario, tuple(part.stamp for part in chunk.parts), fault=fault))
        else:
            entries.append(cache.write(scenario, samples, chunk.parts))
    return entries, time.process_time() - begin


@functools.lru_cache(maxsize=2)
def _open(folder: Path, name: str) -> tuple[Log, RoadMap]:
    return LogFolder(folder).open(name)
