"""The training loop of runs that learn from a log of trips alone: nobody moves."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from training.agent import Student
from training.trips import TripLog
from training.update_loop import UpdateLoop


class Study(UpdateLoop):
    """A run whose steps are updates on a log."""

    agent: Student

    def __init__(self, agent: Student, log: TripLog, **shared: Any) -> None:
        """Take who learns, what from, and the other arguments of `UpdateLoop`."""
        super().__init__(agent, **shared)
        self.log = log

    def _update(self, *, progress: float) -> dict[str, Tensor]:
        return self.agent.study(self.log, progress=progress)

    def _save_beside(self, *, emergency: bool) -> dict[str, Any]:
        return {"log": self.log.facts()}
