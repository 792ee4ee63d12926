"""The training loop of runs that draw what they learn from anew with each update, and keep none of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from guard import NonFinite
from settings.run import LoopSettings
from training.agent import Practitioner
from training.loop import Loop


class Practice(Loop):
    """A run whose steps are what its samples count as: env steps, or answers."""

    agent: Practitioner

    def __init__(self, agent: Practitioner, *, settings: LoopSettings, device: torch.device, **shared: Any) -> None:
        """Take the parts together.

        Args:
            agent: draws samples, and learns.
            settings: how many steps are made, and how often what is done.
            device: where the agent learns.
            shared: the other arguments of `Loop`.
        """
        super().__init__(agent, settings=settings, total=settings.steps, device=device, **shared)

    @property
    def _more(self) -> str:
        return "give more --steps to go on"

    def _advance(self) -> None:
        # How many steps an update makes is known after it.
        self.updates_owed += 1

    def _update(self, *, progress: float) -> dict[str, Tensor]:
        try:
            metrics, steps = self.agent.practise(progress=progress)
        except NonFinite:
            raise
        except Exception:
            # What a reward of the user's raises, say; what was learnt before is not lost by it.
            if self.updates:
                self._save(emergency=True)
            raise
        self.step += int(steps)
        return metrics

    def _save_beside(self, *, emergency: bool) -> dict[str, Any]:
        return {}
