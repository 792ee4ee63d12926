"""The training loop of runs that learn from a log of trips alone: every step is an update, and nobody moves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from settings.run import LoopSettings
from training.agent import Student
from training.loop import Loop
from training.trips import TripLog


class Study(Loop):
    """A run whose steps are updates on a log."""

    agent: Student

    def __init__(
        self, agent: Student, log: TripLog, *, settings: LoopSettings, device: torch.device, **shared: Any
    ) -> None:
        """Take the parts together.

        Args:
            agent: learns.
            log: what it learns from.
            settings: how many updates are made, and how often what is done.
            device: where the agent learns.
            shared: the other arguments of `Loop`.
        """
        super().__init__(agent, settings=settings, total=settings.updates, device=device, **shared)
        self.log = log

    @property
    def _more(self) -> str:
        return "give more --updates to go on"

    def _advance(self) -> None:
        self.step += 1
        self.updates_owed += 1

    def _update(self, *, progress: float) -> dict[str, Tensor]:
        return self.agent.study(self.log, progress=progress)

    def _save_beside(self, *, emergency: bool) -> dict[str, Any]:
        return {"log": self.log.facts()}
