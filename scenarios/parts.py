"""What a sample consists of: parts that are built of the egos of a frame, features and targets."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from driving.features import features
from driving.roads import RoadMap
from driving.scene import Log
from settings.mapping import nearest
from system.errors import UserError


@dataclass(frozen=True, eq=False)
class Scene:
    """Some egos in one frame of a log.

    Attributes:
        log: who was where.
        road_map: of the log.
        agents: the egos' ids.
        frame: of the log.
    """

    log: Log
    road_map: RoadMap
    agents: Int64[np.ndarray, " E"]
    frame: int

    @functools.cached_property
    def observed(self) -> dict[str, np.ndarray]:
        """All features and targets of `driving.features`, computed once for all parts that are of them."""
        return features(self.log, self.road_map, self.agents, self.frame)


class Spec(NamedTuple):
    """An array of a part: its shape for one ego, and its type."""

    shape: tuple[int, ...]
    dtype: type[np.generic]

    @property
    def bytes(self) -> int:
        """Of one ego."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a sample, and how it is built.

    What it gives of an ego must not depend on which other egos it is asked for together with: files have to be the same
    however the work is divided.

    Attributes:
        name: among all parts.
        version: to be raised whenever other numbers come of the same scene, so that what is cached is computed again.
        arrays: that it gives, by name.
        build: gives each of them with an axis of egos in front.
    """

    name: str
    version: int
    arrays: Mapping[str, Spec]
    build: Callable[[Scene], Mapping[str, np.ndarray]]

    @property
    def stamp(self) -> str:
        """Tells this version of it from others."""
        return f"{self.name}:{self.version}"


class Needs(NamedTuple):
    """What a model asks of a sample.

    Attributes:
        features: names of arrays that it is given.
        targets: names of arrays that it is compared with.
    """

    features: tuple[str, ...]
    targets: tuple[str, ...]


def chosen(needs: Needs, known: Iterable[Part]) -> tuple[Part, ...]:
    """The parts that have all that a model needs, in the order of those that are known.

    Raises:
        UserError: it names an array that none of them has.
    """
    parts = tuple(known)
    owners = {name: part for part in parts for name in part.arrays}
    names = {*needs.features, *needs.targets}
    for name in sorted(names):
        if name not in owners:
            raise UserError(f"the model needs '{name}' of its samples, which nothing builds; {nearest(name, owners)}")
    wanted = {owners[name] for name in names}
    return tuple(part for part in parts if part in wanted)
