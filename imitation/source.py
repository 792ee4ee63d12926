"""What a planner learns from: batches of a cache, by their numbers."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from checkpoint import CheckpointError
from scenarios.dataset import Draws, Rows
from settings.run import RunSettings
from training.agent import Trained
from training.resuming import COMMON, COUNT
from training.update_loop import UpdateLoop


@runtime_checkable
class Imitating(Trained, Protocol):
    """An agent that learns what experts have done: `imitate` is one update, on the next batch that is drawn."""

    def imitate(self, draws: Draws, *, progress: float) -> dict[str, Tensor]: ...


class Imitation(UpdateLoop):
    """A run whose steps are updates on batches of a cache."""

    agent: Imitating

    def __init__(self, agent: Imitating, source: Cached, **shared: Any) -> None:
        """Take who learns, what from, and the other arguments of `UpdateLoop`."""
        super().__init__(agent, **shared)
        self.source = source

    def _update(self, *, progress: float) -> dict[str, Tensor]:
        return self.agent.imitate(self.source.draws, progress=progress)

    def _save_beside(self, *, emergency: bool) -> dict[str, Any]:
        return {"cache": self.source.identity}


class Cached:
    """Rows of a cache to train on."""

    needed: Mapping[str, Any] = {**COMMON, "cache": {"rows": COUNT, "checksum": COUNT}}

    def __init__(self, rows: Rows, draws: Draws, *, told: Sequence[str]) -> None:
        """Take them.

        Args:
            rows: all that there is to train on.
            draws: batches of them.
            told: what there is to say of the cache that they are from, in lines.
        """
        self.draws, self._told = draws, list(told)
        self.identity = {"rows": len(rows), "checksum": checksum(rows)}

    def take(self, state: Mapping[str, Any], path: Path) -> None:
        """See that the run at `path` has learnt from the same rows."""
        if state["cache"] != self.identity:
            raise CheckpointError(
                f"{path} has learnt from {state['cache']['rows']:,} rows, and the cache has {self.identity['rows']:,}"
                " now, or others; give the cache, filter and split that it was made with, or another --logdir"
            )

    def facts(self, settings: RunSettings, device: torch.device) -> dict[str, list[str]]:
        return {"sees": self._told}

    def ends(self, settings: RunSettings) -> str:
        return f"to update {settings.loop.updates:,}"

    def warnings(self, settings: RunSettings) -> list[str]:
        return []

    def loop(self, agent: Any, **shared: Any) -> Imitation:
        return Imitation(agent, self, **shared)


def checksum(rows: Rows) -> int:
    """Of all numbers in some rows."""
    found = 0
    for name in sorted(rows.arrays):
        found = zlib.crc32(np.ascontiguousarray(rows.arrays[name]).view(np.uint8).data, found)
    return found
