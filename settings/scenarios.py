"""What the way from logs of traffic to a cache of samples reads: logs, filter, cache, weights, splits, augmentation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

from settings.mapping import as_text, nearest
from settings.sections import Between, Count, NotNegative, Section, Share, Weight
from system.errors import ConfigError

# What an ego does over a scenario; one type each, the first in this order that fits.
SCENARIO_TYPES = (
    *("stationary", "lane_change", "turn_left", "turn_right", "starting", "stopping", "following", "free"),
)
# The sections that are read here.
SCENARIO_SECTIONS = ("logs", "scenario_filter", "cache", "scenario_weights", "split", "augment")
# Names of logs are names of folders, too.
LOG_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
TOKEN = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class LogSettings(Section):
    """Which logs there are.

    Attributes:
        path: a folder with logs of others; empty: simulations are recorded.
        maps: that traffic is simulated on.
        recordings: simulations of each map, by the seeds 0, 1 and so on.
        start: second of the traffic of each map at which a simulation begins, so that sets are apart in time.
        seconds: of a simulation.
        piece: seconds of a log; a simulation is cut into as many as it takes.
    """

    PLACE = "logs"

    path: str
    maps: tuple[str, ...]
    recordings: Count
    start: Weight
    seconds: Annotated[float, Between(1)]
    piece: Annotated[float, Between(1)]

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_texts("logs.maps", self.maps)
        if not self.path and not self.maps:
            raise ConfigError("logs.maps is []; name a map to simulate, or give a folder of logs: --logs.path FOLDER")


@dataclass(frozen=True)
class FilterSettings(Section):
    """Which scenarios of the logs are taken; a list that is empty and a number that is 0 or null take any.

    Attributes:
        types: what the ego does.
        tokens: of single scenarios.
        logs: names, or patterns with * and ?.
        maps: names.
        per_type: scenarios of each type at most.
        total: scenarios at most; below 1, their share.
        least_gap: seconds between the beginnings of two scenarios of one ego.
        least_displacement: metres between where the ego begins and ends.
        start_speed: m/s that the ego rises above from below.
        stop_speed: m/s that the ego falls below from above.
        speed_tolerance: m/s above either of them that count as noise.
        expand: make a scenario of every single row.
        drop_invalid_goals: leave out egos whose way ends off the lanes of the map.
        shuffle: draw at random, by the seed, what is taken and in which order.
    """

    PLACE = "scenario_filter"

    types: tuple[str, ...]
    tokens: tuple[str, ...]
    logs: tuple[str, ...]
    maps: tuple[str, ...]
    per_type: NotNegative
    total: Weight
    least_gap: Weight
    least_displacement: Weight
    start_speed: float | None
    stop_speed: float | None
    speed_tolerance: Weight
    expand: bool
    drop_invalid_goals: bool
    shuffle: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("types", "tokens", "logs", "maps"):
            _require_texts(self.key(name), getattr(self, name))
        for each in self.types:
            if each not in SCENARIO_TYPES:
                raise ConfigError(f"{self.key('types')} has '{each}'; {nearest(each, SCENARIO_TYPES)}")
        for each in self.tokens:
            if not TOKEN.fullmatch(each):
                raise ConfigError(f"{self.key('tokens')} has '{each}'; tokens are 16 of the digits 0 to 9 and a to f")
        for name in ("start_speed", "stop_speed"):
            value = getattr(self, name)
            if value is not None:
                _require_number(self.key(name), value)
        if self.total > 1 and not float(self.total).is_integer():
            raise ConfigError(
                f"{self.key('total')} is {self.total:g}; it takes a whole number, or a share between 0 and 1"
            )


@dataclass(frozen=True)
class CacheSettings(Section):
    """Where samples are kept, and whether they are computed.

    Attributes:
        path: the folder.
        force: compute also what is there.
        clean: remove what is there first.
        only: compute nothing; what is missing is an error.
        workers: processes that compute side by side; 0: this one alone.
        profile: whether to show what the time goes into.
    """

    PLACE = "cache"

    path: str
    force: bool
    clean: bool
    only: bool
    workers: Annotated[int, Between(0, 1024)]
    profile: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path:
            raise ConfigError("cache.path is empty; give the folder that samples are kept in: --cache.path FOLDER")
        for name in ("force", "clean"):
            if self.only and getattr(self, name):
                raise ConfigError(f"cache.only computes nothing, and cache.{name} asks for it; give one of them")
        if self.profile and self.workers:
            raise ConfigError(f"cache.workers is {self.workers}; cache.profile is of one process: --cache.workers 0")


@dataclass(frozen=True)
class ScenarioWeights(Section):
    """How often a row of each type is drawn in training, relative to the others."""

    PLACE = "scenario_weights"

    stationary: Weight
    lane_change: Weight
    turn_left: Weight
    turn_right: Weight
    starting: Weight
    stopping: Weight
    following: Weight
    free: Weight

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(getattr(self, each.name) for each in fields(self)):
            raise ConfigError("scenario_weights are all 0, and nothing would be drawn; give one above 0")


@dataclass(frozen=True)
class SplitSettings(Section):
    """Which logs train, validate and test; a log is never divided.

    Attributes:
        valid: share of the logs of each recording, those before the last.
        test: likewise, the last.
        held_out_maps: all of whose logs test, in a set of its own.
    """

    PLACE = "split"

    valid: Share
    test: Share
    held_out_maps: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_texts("split.held_out_maps", self.held_out_maps)
        if self.valid + self.test >= 1:
            raise ConfigError(
                f"split.valid and split.test are {self.valid:g} and {self.test:g}; below 1 together, they leave"
                " something to train on"
            )


@dataclass(frozen=True)
class AugmentSettings(Section):
    """What is done to the samples of training, each anew whenever it is drawn; 0: nothing.

    Attributes:
        mirror: share of them in which left is right.
        shift: metres that the ego is put beside its place at most.
        turn: radians that it is turned by at most.
        drop_agents: share of the other agents that are left out at most.
        hide_motion: share of them in which nobody says how the ego moves.
    """

    PLACE = "augment"

    mirror: Share
    shift: Weight
    turn: Annotated[float, Between(0, 1)]
    drop_agents: Share
    hide_motion: Share


@dataclass(frozen=True)
class ScenarioSettings(Section):
    """The whole way from logs to samples."""

    logs: LogSettings
    filter: FilterSettings
    cache: CacheSettings
    weights: ScenarioWeights
    split: SplitSettings
    augment: AugmentSettings


def _require_texts(key: str, values: Sequence[Any]) -> None:
    for value in values:
        if not isinstance(value, str):
            raise ConfigError(f"{key} has {as_text(value)}; it takes a list of names")


def _require_number(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{key} is {as_text(value)}; it takes a number, or null")
    Between(0).require(key, value)
