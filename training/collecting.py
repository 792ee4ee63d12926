"""What loops have in common that learn from replay: how it grows, what updates are owed for that, and its files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from envs.tasks import ACTION_MASK, Task
from settings.run import LoopSettings
from system import safe_files
from training.agent import Agent
from training.loop import REPORTS, Loop
from training.replay import Replay

REPLAY, CRASHES = "replay", "crashes"
# Folders of the logdir in which the program makes and deletes files.
OWN_FOLDERS = (REPORTS, REPLAY, CRASHES)
# Ranks tell one another what they have stepped, and whether they are asked to stop, after so many steps at the latest.
MOST_APART = 8


def replay_folder(logdir: Path, rank: int) -> Path:
    """Where a rank keeps the files of its replay."""
    return logdir / REPLAY / f"rank{rank}" if rank else logdir / REPLAY


class Collecting(Loop):
    """A run whose steps are env steps, which come with the columns of its replay."""

    agent: Agent

    def __init__(
        self,
        agent: Agent,
        task: Task,
        *,
        settings: LoopSettings,
        replay: Replay,
        device: torch.device,
        total: int | None = None,
        **shared: Any,
    ) -> None:
        """Take the parts together.

        Args:
            agent: learns.
            task: what is to be solved.
            settings: how much is collected and learnt, and how often what is done.
            replay: where that is stored.
            device: where the agent learns.
            total: steps of the run; the settings' env steps where there are no others.
            shared: the other arguments of `Loop`.
        """
        total = settings.steps if total is None else total
        super().__init__(agent, settings=settings, total=total, device=device, **shared)
        self.task, self.replay = task, replay
        self._uncounted = 0

    @property
    def _updates_from(self) -> int:
        return self.settings.prefill

    @property
    def _more(self) -> str:
        return "give more --steps to go on"

    def _steps_apart(self, envs: int) -> int:
        """How many steps of its environments a rank may take before it has to know what the others have taken.

        Nothing is due before the last of them: no update, end, evaluation, line in the log or checkpoint.

        Args:
            envs: its environments.
        """
        if self.ranks.count == 1:
            return 1
        settings, most = self.settings, envs * self.ranks.count
        regular = (settings.log_every, settings.eval_every, settings.checkpoint_every)
        dues: list[float] = [self.total - self.step, *(every - self.step % every for every in regular if every)]
        if self.step < self._updates_from:
            # The steps of the last before the first updates are no part of what is owed.
            dues.append(self._updates_from - self.step - most)
        elif settings.train_ratio:
            rows = self.agent.rows_per_update * self.ranks.count
            dues.append((1 - self.updates_owed) * rows / settings.train_ratio)
        return min(max(1, math.ceil(min(dues) / most)), MOST_APART)

    def _add(self, column: dict[str, Tensor], *, decisions: int, counted: bool = True) -> None:
        """Store a column, count its steps, and note what updates are due after them.

        Args:
            column: a row for each environment.
            decisions: how many of them were acted on: the last row of an episode was not.
            counted: now, with those of all ranks; otherwise with the next column that is.
        """
        self.replay.add(column)
        if decisions and self.task.actions.masked:
            action, ended = column["action"], column["is_last"]
            legal = column[ACTION_MASK].gather(-1, action[:, None]).squeeze(-1) | ended
            self.averages.add({"env_miss_rate": (~legal).float().mean()})
        self._uncounted += decisions
        if counted:
            self._count()

    def _count(self) -> None:
        decisions, self._uncounted = self.ranks.add(self._uncounted), 0
        self.step += decisions
        if self.step >= self._updates_from:
            rows = self.agent.rows_per_update * self.ranks.count
            self.updates_owed += decisions * self.settings.train_ratio / rows

    def _update(self, *, progress: float) -> dict[str, Tensor]:
        return self.agent.update(self.replay, progress=progress)

    def _notices(self) -> list[str]:
        lines = list(self.replay.notices)
        self.replay.notices.clear()
        return lines

    def _scaled_return(self, values: dict[str, float]) -> dict[str, float | int]:
        """The return as the agent sees it, where that is another one."""
        if self.settings.reward_scale == 1 or "train_return" not in values:
            return {}
        return {"train_return_scaled": self.settings.reward_scale * values["train_return"]}

    def _save_replay(self, *, emergency: bool) -> dict[str, Any]:
        """Write what replay has gathered since the last save; how to find it again."""
        folder = replay_folder(self.logdir, self.ranks.index)
        if not self.ranks.is_first:
            safe_files.make_folder(folder.parent, parents=False)
        return self.replay.save_chunks(folder, emergency=emergency, numbered=self.settings.checkpoint_numbered)

    def _bytes_beside(self) -> int:
        return self.replay.bytes_written

    def _write_latest(self, state: dict[str, Any], *, keep_before: bool) -> None:
        try:
            super()._write_latest(state, keep_before=keep_before)
        except OSError:
            # No checkpoint names what replay has written for this one.
            self.replay.discard_save()
            raise

    def _limit_updates(self, envs: int) -> None:
        """Owe no more updates than after one step of this config: the config may have changed since."""
        due = envs * self.settings.train_ratio / self.agent.rows_per_update
        self.updates_owed = min(self.updates_owed, due + 1)
