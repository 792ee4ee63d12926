"""The training loop of runs whose environments are stepped elsewhere: collectors bring episodes, and it learns."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from config import UserError
from envs.tasks import Task
from settings.run import LoopSettings
from training.agent import Agent
from training.collecting import Collecting
from training.company import Company
from training.gatherer import Brought
from training.pieces import Slots
from training.replay import Replay
from training.resuming import require_like

# Seconds to wait for collectors before looking whether somebody asks to stop.
PATIENCE = 0.2


class Gathering(Collecting):
    """A run whose env steps are those of the rows that collectors have brought, once they are in replay."""

    def __init__(
        self,
        agent: Agent,
        task: Task,
        *,
        settings: LoopSettings,
        replay: Replay,
        slots: Slots,
        company: Callable[[], AbstractContextManager[Company]],
        device: torch.device,
        **shared: Any,
    ) -> None:
        """Take the parts together.

        Args:
            agent: learns.
            task: what is to be solved.
            settings: how much is collected and learnt, and how often what is done.
            replay: where what comes is stored.
            slots: put it into columns of replay.
            company: opens what collectors come to, for as long as the run goes on.
            device: where the agent learns.
            shared: the other arguments of `Collecting`.
        """
        super().__init__(agent, task, settings=settings, replay=replay, device=device, **shared)
        self.slots, self._company = slots, company
        self.collected: dict[str, int] = {}

    def run(self) -> None:
        with self._company() as (self.gatherer, self.helpers):
            try:
                if self.step < self.total:
                    self.helpers.start()
                super().run()
            finally:
                self.gatherer.dismiss(finished=False, reason=f"the learner has stopped at step {self.step}")

    def _advance(self) -> None:
        """Store a column as soon as there is one, or nothing where somebody asks to stop before."""
        self._hear(0.0)
        while not self._fill():
            if self._asked_to_stop() is not None:
                return
            self._hear(PATIENCE)
            self._require_somebody()
        column, steps = self.slots.take()
        for name, count in steps.items():
            self.collected[name] = self.collected.get(name, 0) + count
        self._add({name: value.to(self.device) for name, value in column.items()}, decisions=sum(steps.values()))

    def _hear(self, seconds: float) -> None:
        """Take in what has come."""
        prefill = self.step < self._updates_from
        for brought in self.gatherer.poll(seconds, update=self.updates, prefill=prefill):
            self.slots.add(brought.pieces, brought.origin)
            self._note_episodes(brought)
        for line in [*self.helpers.look(), *self.gatherer.notices]:
            self._progress.alert(line)
        self.gatherer.notices.clear()
        if self.slots.wants_more:
            self.gatherer.release(update=self.updates, prefill=prefill)

    def _fill(self) -> bool:
        """Put pieces into slots that are free; whether there is a column then."""
        for origin in self.slots.fill():
            age = torch.tensor(float(self.updates - origin.update), device=self.device)
            self.averages.add({"collect/weights_age": age})
        return self.slots.ready

    def _require_somebody(self) -> None:
        """Say now and then that nobody brings anything.

        Raises:
            UserError: nobody ever will: all collectors have ended by themselves, and no others know the way.
        """
        if self.helpers.have_failed and not len(self.gatherer):
            self._save()
            raise UserError(
                f"all collectors have ended, and their own lines say why; saved at step {self.step}. Mend that, and the"
                " same command goes on"
            )
        if self.gatherer.is_time_to_remind():
            self._progress.alert(f"no collector is there; step {self.step} waits for one at {self.helpers.address}")

    def _note_episodes(self, brought: Brought) -> None:
        """Log the returns of episodes that have ended."""
        if not brought.finished:
            return
        for name, values in (
            ("train_return", [each.returned for each in brought.finished]),
            ("train_length", [float(each.length) for each in brought.finished]),
        ):
            self.averages.add_each(name, torch.tensor(values, device=self.device))
        if not self.task.has_references:
            for each in brought.finished:
                self.logger.scalars(self.step, self._elapsed(), {"episode_return": each.returned})

    def _figures(self, values: dict[str, float]) -> dict[str, float | int]:
        return {
            **self._scaled_return(values),
            **self.gatherer.counters,
            "collect/collectors": len(self.gatherer),
            "collect/lost": self.gatherer.lost,
            **{f"collect/steps_{name}": count for name, count in self.collected.items()},
        }

    def _finish(self) -> None:
        # The final evaluation may take long, and nothing is collected for it.
        self.gatherer.dismiss(finished=True, reason=f"the run has ended at step {self.step}")
        super()._finish()

    def _save_beside(self, *, emergency: bool) -> dict[str, Any]:
        return {
            "replay": self._save_replay(emergency=emergency),
            "slots": self.slots.state_dict(),
            "collected": dict(self.collected),
            # A run that steps its environments itself has these.
            **{name: {} for name in ("env", "acting", "row")},
            "any_first": False,
            "episode_return": torch.zeros(0, device=self.device),
        }

    def load(self, state: dict[str, Any], *, elsewhere: bool) -> None:
        ours, theirs = (each["rows"].items() for each in (self.slots.state_dict(), state["slots"]))
        require_like({name: rows[:0] for name, rows in ours}, {name: rows[:0] for name, rows in theirs}, "slots")
        self.slots.load_state_dict(state["slots"])
        super().load(state, elsewhere=elsewhere)
        self.collected = dict(state["collected"])
        self._limit_updates(self.replay.num_envs)
