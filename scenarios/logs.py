"""Where logs come from: a folder of files, which a simulator fills where nobody else has."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from driving.roads import RoadMap
from driving.scene import COLUMNS, LIGHT_COLUMNS, STEP, Log
from scenarios.work import Workers
from settings.scenarios import LOG_NAME, LogSettings
from system.errors import UserError

MAPS = "maps"
SUFFIX = ".npz"


class LogFolder:
    """Logs as files NAME.npz, and the maps that they are of as maps/NAME.npz beside them."""

    def __init__(self, folder: Path) -> None:
        """Name the folder; nothing is read yet."""
        self.folder = folder

    def names(self) -> list[str]:
        """Of all logs that are there."""
        paths = (path for path in self.folder.glob(f"*{SUFFIX}") if LOG_NAME.fullmatch(path.stem))
        return sorted(path.stem for path in paths)

    def log_path(self, name: str) -> Path:
        """The file of a log."""
        return self.folder / f"{name}{SUFFIX}"

    def map_path(self, name: str) -> Path:
        """The file of a map."""
        return self.folder / MAPS / f"{name}{SUFFIX}"

    def open(self, name: str) -> tuple[Log, RoadMap]:
        """A log and its map.

        Raises:
            UserError: a file is missing or damaged, or they do not go together.
        """
        path = self.log_path(name)
        log = Log.load(path)
        if log.name != name:
            raise UserError(f"{path} holds the log '{log.name}'; a log's file is called like the log")
        if not LOG_NAME.fullmatch(log.map_name):
            raise UserError(f"{path} is of a map called '{log.map_name}', which no file can be called")
        road_map = _load_map(self.map_path(log.map_name))
        if len(log.lane) and log.lane.max() >= len(road_map.lanes):
            raise UserError(f"{path} has lane {log.lane.max()}, and its map {len(road_map.lanes)} lanes")
        return log, road_map


@functools.lru_cache(maxsize=4)
def _load_map(path: Path) -> RoadMap:
    return RoadMap.load(path)


class Recording(NamedTuple):
    """A simulation, and the logs that it is cut into.

    Attributes:
        map: to be simulated.
        seed: of the traffic.
        start: second of the map's demand.
        seconds: to be simulated.
        piece: seconds of a log.
    """

    map: str
    seed: int
    start: float
    seconds: float
    piece: float

    @property
    def names(self) -> list[str]:
        """Of its logs: the map, the seed, and the second of the demand that the log begins at."""
        return [self._name(begin) for begin in self._begins]

    def pieces(self, log: Log) -> Iterator[Log]:
        """The logs of a simulation, one after the other."""
        for begin in self._begins:
            yield cut(log, begin, begin + self._frames, name=self._name(begin))

    @property
    def _frames(self) -> int:
        return max(1, round(self.piece / STEP))

    @property
    def _begins(self) -> range:
        return range(0, max(1, round(self.seconds / STEP)), self._frames)

    def _name(self, begin: int) -> str:
        return f"{self.map}-{self.seed}-{round(self.start + STEP * begin):05d}"


def cut(log: Log, begin: int, end: int, *, name: str) -> Log:
    """Frames `begin` to `end`, without the last, as a log of its own; what comes before and after is unknown in it."""
    end = min(end, log.frames)
    begin = min(begin, end)
    columns: dict[str, Any] = {}
    for first, *others in (COLUMNS, LIGHT_COLUMNS):
        starts = getattr(log, first)[begin : end + 1]
        columns[first] = starts - starts[0]
        columns |= {name: getattr(log, name)[starts[0] : starts[-1]] for name in others}
    return dataclasses.replace(log, name=name, **columns)


def prepared(settings: LogSettings, recorded: LogFolder, workers: Workers) -> tuple[LogFolder, list[str]]:
    """The logs that there are to be: all of a folder, or those of simulations, recorded where they are not there yet.

    Args:
        settings: which.
        recorded: where those of simulations are.
        workers: who simulates.

    Returns:
        The folder, and the names of the logs.

    Raises:
        UserError: there is no such folder or no log in it, no such map, or no simulator.
    """
    if settings.path:
        folder = LogFolder(Path(settings.path))
        if not folder.names():
            raise UserError(f"logs.path is {settings.path}, where there are no logs, files NAME{SUFFIX}")
        return folder, folder.names()
    wanted = [
        Recording(name, seed, settings.start, settings.seconds, settings.piece)
        for name in settings.maps
        for seed in range(settings.recordings)
    ]
    missing = [each for each in wanted if not all(recorded.log_path(name).exists() for name in each.names)]
    with tqdm(total=len(missing), desc="simulations", delay=2, disable=None) as bar:
        for _ in workers.each(functools.partial(_record, recorded), missing):
            bar.update()
    return recorded, sorted(name for each in wanted for name in each.names)


def _record(folder: LogFolder, recording: Recording) -> None:
    # Whoever has the logs needs no simulator.
    from driving import maps, simulator

    log = simulator.record(recording.map, recording.seed, recording.seconds, start=recording.start)
    map_path = folder.map_path(recording.map)
    map_path.parent.mkdir(parents=True, exist_ok=True)
    maps.road_map(recording.map).save(map_path)
    for piece in recording.pieces(log):
        piece.save(folder.log_path(piece.name))
