"""The training loop of runs that begin with recorded episodes: updates on them alone, then steps in environments."""

from __future__ import annotations

from typing import Any

from settings.run import LoopSettings
from training.agent import Agent
from training.loop import Loop
from training.recorded import Record
from training.trainer import Trainer


class OfflineTrainer(Trainer):
    """A run that has recorded episodes in replay. Its first steps are updates, and those after them env steps."""

    def __init__(self, agent: Agent, *parts: Any, settings: LoopSettings, record: Record, **shared: Any) -> None:
        """Take the parts together.

        Args:
            agent: as for `Trainer`.
            parts: likewise.
            settings: likewise.
            record: what there is to know of the episodes.
            shared: the other arguments of `Trainer`.
        """
        super().__init__(agent, *parts, settings=settings, total=settings.offline + settings.steps, **shared)
        self.record = record

    @property
    def _begun(self) -> bool:
        return self.step > 0

    @property
    def _updates_from(self) -> int:
        return 0

    @property
    def _more(self) -> str:
        return "give more --updates, or --steps in the environment, to go on"

    def _begin(self) -> None:
        Loop._begin(self)

    def _advance(self) -> None:
        if self.step < self.settings.offline:
            self.step += 1
            self.updates_owed += 1
            return
        if not self.stepper.row:
            self._meet()
        super()._advance()

    def _has_met(self, state: dict[str, Any]) -> bool:
        return bool(state["row"]) or state["step"] > self.settings.offline

    def _save_beside(self, *, emergency: bool) -> dict[str, Any]:
        return {**super()._save_beside(emergency=emergency), "record": self.record.facts()}
