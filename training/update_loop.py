"""The training loop of runs whose every step is an update, on what is there before they begin."""

from __future__ import annotations

from typing import Any

import torch

from settings.run import LoopSettings
from training.agent import Trained
from training.loop import Loop


class UpdateLoop(Loop):
    """A run whose steps are updates: `settings.updates` of them."""

    def __init__(self, agent: Trained, *, settings: LoopSettings, device: torch.device, **shared: Any) -> None:
        """Take the parts together.

        Args:
            agent: learns.
            settings: how many updates are made, and how often what is done.
            device: where the agent learns.
            shared: the other arguments of `Loop`.
        """
        super().__init__(agent, settings=settings, total=settings.updates, device=device, **shared)

    @property
    def _more(self) -> str:
        return "give more --updates to go on"

    def _advance(self) -> None:
        self.step += 1
        self.updates_owed += 1
