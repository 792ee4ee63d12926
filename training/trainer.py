"""The training loop of runs that collect what they learn from: an agent acts in environments, and replay stores it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import UserError
from envs.crashes import Crash, EnvironmentCrashed
from envs.gym_vector import GymVectorEnv
from envs.tasks import Task
from envs.vector import RoutingVectorEnv
from settings.run import LoopSettings
from system import safe_files
from training.agent import Agent
from training.collecting import CRASHES, Collecting
from training.evaluation import Report
from training.regret import Regret
from training.replay import Replay
from training.resuming import require_like
from training.stepping import Stepper

# The most reports, by one process, of crashes that the run goes on after.
MOST_CRASH_REPORTS = 20


class Trainer(Collecting):
    """A run with its environments, which it steps itself."""

    def __init__(
        self,
        agent: Agent,
        task: Task,
        *,
        settings: LoopSettings,
        env: RoutingVectorEnv | GymVectorEnv,
        replay: Replay,
        device: torch.device,
        **shared: Any,
    ) -> None:
        """Take the parts together.

        Args:
            agent: acts and learns.
            task: what is to be solved.
            settings: how much is collected and learnt, and how often what is done.
            env: where the agent acts.
            replay: where that is stored.
            device: where the agent acts and learns.
            shared: the other arguments of `Collecting`.
        """
        super().__init__(agent, task, settings=settings, replay=replay, device=device, **shared)
        self.env = env
        self.stepper = Stepper(agent, task, env, settings=settings, generators=self.generators, device=device)
        self.episode_return = torch.zeros(env.num_envs, device=device)
        self.crash_reports = 0
        self.regret: Regret | None = None
        if settings.log_regret:
            assert isinstance(env, RoutingVectorEnv), "settings refuse it elsewhere"
            self.regret = Regret(env.rules)

    @property
    def _begun(self) -> bool:
        return bool(self.stepper.row)

    def _begin(self) -> None:
        """The first evaluation and the first observations."""
        # Training's first episodes come after it, since an evaluation in the same environments would end them.
        if self.settings.eval_every:
            self._evaluate()
        self._meet()
        if self.latest:
            self._show()

    def _meet(self) -> None:
        """The first observations."""
        with self._saving():
            self.stepper.meet()

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """Save the run before an environment ends it: one that crashes, or gives what cannot be taken.

        Raises:
            EnvironmentCrashed: as what is done here, and says where the environment's own traceback is.
        """
        try:
            yield
        except (UserError, EnvironmentCrashed) as error:
            # Before the first episode there is nothing to go on from.
            # No other rank knows of it, so that several go back to their last checkpoint.
            if self.stepper.row and self.ranks.count == 1:
                self._save()
            if not isinstance(error, EnvironmentCrashed):
                raise
            path = self._report_crash(error.crash)
            where = f"{path} has its traceback" if path else f"its traceback: {error.crash.trace}"
            remedy = "mend the environment, and the same command goes on; or --env_restarts N restarts it N times"
            raise EnvironmentCrashed(f"{error}; {where}; {remedy}", error.crash) from error

    def _report_crash(self, crash: Crash) -> Path | None:
        """Save the environment's own traceback; the file, or None where it cannot be written."""
        path = self.logdir / CRASHES / f"step_{self.step:09d}_env_{crash.row}{self.label}.txt"
        try:
            safe_files.make_folder(path.parent)
            safe_files.write_text(path, crash.trace)
        except OSError:
            return None
        return path

    def _note_crashes(self, crashes: Iterable[Crash]) -> None:
        """Save what is known of crashes that the run goes on after, until there are `MOST_CRASH_REPORTS`."""
        for crash in crashes:
            self.crash_reports += 1
            if self.crash_reports <= MOST_CRASH_REPORTS and (path := self._report_crash(crash)):
                self._progress.alert(f"{path} has the traceback of environment {crash.row}")

    def _advance(self) -> None:
        """One step of every environment, stored; of several ranks, steps until anything may be due."""
        for left in reversed(range(self._steps_apart(self.env.num_envs))):
            # Where an environment raises, nothing has moved on: a run that goes on takes this step anew.
            with self._saving():
                stepped = self.stepper.step(prefill=self.step < self._updates_from)
            self._add(stepped.stored, decisions=stepped.info["decisions"], counted=not left)
            self._note_returns(stepped.reward, stepped.info)

    def _note_returns(self, reward: Tensor, info: dict[str, Any]) -> None:
        """Log the returns of the episodes that ended in this step."""
        if isinstance(self.env, GymVectorEnv):
            for name, values in (("train_return", info["returns"]), ("train_length", info["lengths"])):
                for value in values:
                    self.averages.add({name: torch.tensor(float(value), device=self.device)})
            # Returns are few beside steps, and the host knows them already: each has a row of its own.
            for value in info["returns"]:
                self.logger.scalars(self.step, self._elapsed(), {"episode_return": float(value)})
            while self.env.notices:
                self._progress.alert(self.env.notices.pop(0))
            self._note_crashes(self.env.crashes)
            self.env.crashes.clear()
        else:
            self.episode_return = torch.where(info["is_first"], 0.0, self.episode_return) + reward
            if not self.env.rules.fixed_length:
                # Entries that are not finite do not count. Picking the rows that have ended would wait for the device.
                ended = torch.where(self.stepper.row["is_last"], self.episode_return, torch.nan)
                self.averages.add_each("train_return", ended)
            elif self.env.all_ended:
                self.averages.add({"train_return": self.episode_return.mean()})
            if self.regret is not None:
                self.regret.note(self.env, self.stepper.row["is_last"], self.episode_return)

    def _figures(self, values: dict[str, float]) -> dict[str, float | int]:
        figures = self._scaled_return(values) | self.env.counters()
        return figures if self.regret is None else figures | self.regret.percent()

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Close the episodes that an evaluation in the training's environments ends, as a time limit would."""
        with self._saving():
            try:
                yield
            finally:
                self._close_episodes()

    def _close_episodes(self) -> None:
        if row := self.stepper.row:
            self.stepper.row = {**row, "is_last": row["is_last"] | self.env.take_lost()}

    def _note_report(self, name: str, report: Report) -> None:
        super()._note_report(name, report)
        self._note_crashes(report.crashes)

    def _save_beside(self, *, emergency: bool) -> dict[str, Any]:
        return {
            "replay": self._save_replay(emergency=emergency),
            # Nothing is there before the first episode.
            "env": self.env.state_dict() if self.stepper.row else {},
            "acting": self.stepper.acting,
            "row": self.stepper.row,
            "any_first": self.stepper.any_first,
            "episode_return": self.episode_return,
            "regret": None if self.regret is None else self.regret.state_dict(),
        }

    def load(self, state: dict[str, Any], *, elsewhere: bool) -> None:
        lost = None
        if self._has_met(state):
            self._require_fit(state)
            lost = self.env.load_state_dict(state["env"])
        super().load(state, elsewhere=elsewhere)
        for name in ("acting", "row", "any_first"):
            setattr(self.stepper, name, state[name])
        self.episode_return = state["episode_return"]
        if self.regret is not None and state.get("regret"):
            self.regret.load_state_dict(state["regret"])
        if lost is not None and bool(lost.any()):
            # An episode that cannot be taken up again is closed as a time limit would close it.
            self.stepper.row = {**self.stepper.row, "is_last": self.stepper.row["is_last"] | lost}
        self._limit_updates(self.env.num_envs)

    def _has_met(self, state: dict[str, Any]) -> bool:
        """Whether the run of a checkpoint had begun its first episodes."""
        return True

    def _require_fit(self, state: dict[str, Any]) -> None:
        """Check what nothing else would complain about before the first step."""
        stored = {name: rows[:, 0] for name, rows in self.replay.rows.items() if name != "action"}
        require_like(stored, state["row"], "row")
        require_like(self.episode_return, state["episode_return"], "episode_return")
        ours = {name: value for name, value in self.stepper.acting.items() if isinstance(value, Tensor)}
        require_like(ours, {name: state["acting"].get(name) for name in ours}, "acting")
        if parts := self.env.tensor_parts:
            env = self.env.state_dict()
            require_like({name: env[name] for name in parts}, {name: state["env"].get(name) for name in parts}, "env")
