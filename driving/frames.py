"""Moments of traffic, one by one, and the log that they make."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from driving.scene import COLUMNS, LIGHT_COLUMNS, Log


class Frame(NamedTuple):
    """One moment of a log: the columns of its tables, without `first` and `light_first`."""

    agents: dict[str, np.ndarray]
    lights: dict[str, np.ndarray]


def assemble(name: str, map_name: str, frames: Sequence[Frame]) -> Log:
    """A log of consecutive frames."""
    columns = {key: np.concatenate([frame.agents[key] for frame in frames]) for key in COLUMNS if key != "first"}
    lights = {
        key: np.concatenate([frame.lights[key] for frame in frames]) for key in LIGHT_COLUMNS if key != "light_first"
    }
    return Log(
        name,
        map_name,
        first=_first(len(frame.agents["id"]) for frame in frames),
        light_first=_first(len(frame.lights["light"]) for frame in frames),
        **columns,
        **lights,
    )


def _first(counts: Iterable[int]) -> np.ndarray:
    """The row that each frame begins with, and the number of rows at the end."""
    return np.cumsum([0, *counts]).astype(np.int64)
