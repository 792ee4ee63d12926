"""The training loop of runs that collect what they learn from: an agent acts in environments, and replay stores it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from config import UserError
from envs.crashes import Crash, EnvironmentCrashed
from envs.gym_vector import GymVectorEnv
from envs.tasks import ACTION_MASK, RoutingTask, Task
from envs.vector import RoutingVectorEnv
from parts.acting import Sight, random_actions
from routing.rules import nearest_node
from settings.run import LoopSettings
from system import safe_files
from training.agent import Agent
from training.evaluation import Report
from training.loop import REPORTS, Loop
from training.regret import Regret
from training.replay import Replay
from training.resuming import require_like
from training.ring import REWARD_AND_ENDS

REPLAY, CRASHES = "replay", "crashes"
# Folders of the logdir in which the program makes and deletes files.
OWN_FOLDERS = (REPORTS, REPLAY, CRASHES)
# The most reports, by one process, of crashes that the run goes on after.
MOST_CRASH_REPORTS = 20


def replay_folder(logdir: Path, rank: int) -> Path:
    """Where a rank keeps the files of its replay."""
    return logdir / REPLAY / f"rank{rank}" if rank else logdir / REPLAY


class Trainer(Loop):
    """A run whose steps are env steps, with its environments and replay."""

    agent: Agent

    def __init__(
        self,
        agent: Agent,
        task: Task,
        *,
        settings: LoopSettings,
        env: RoutingVectorEnv | GymVectorEnv,
        replay: Replay,
        device: torch.device,
        total: int | None = None,
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
            total: steps of the run; the settings' env steps where there are no others.
            shared: the other arguments of `Loop`.
        """
        total = settings.steps if total is None else total
        super().__init__(agent, settings=settings, total=total, device=device, **shared)
        self.task, self.env, self.replay = task, env, replay
        self.player = agent.players[settings.act]
        self.row: dict[str, Tensor] = {}
        self.any_first = True
        self.acting = self.player.initial_state(env.num_envs)
        self.episode_return = torch.zeros(env.num_envs, device=device)
        self.crash_reports = 0
        self.regret: Regret | None = None
        if settings.log_regret:
            assert isinstance(env, RoutingVectorEnv), "settings refuse it elsewhere"
            self.regret = Regret(env.rules)

    @property
    def _begun(self) -> bool:
        return bool(self.row)

    @property
    def _updates_from(self) -> int:
        return self.settings.prefill

    @property
    def _more(self) -> str:
        return "give more --steps to go on"

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
            obs, info = self.env.reset()
        self.row = self._first_row(obs)
        self.any_first = info["any_first"]

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
            if self.row and self.ranks.count == 1:
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
        """One step of every environment, stored."""
        obs = {key: value for key, value in self.row.items() if key not in REWARD_AND_ENDS}
        # An agent acts from the first step on, so that it knows the episodes that it takes over from the prefill, and
        # replay holds what it remembered.
        sight = Sight(obs, self.row["is_first"], self.any_first)
        action, acting = self.player.act(sight, self.acting, generator=self.generators["acting"])
        if self.step < self._updates_from:
            action = self._prefill_action(obs)
            if "action" in acting:
                acting = {**acting, "action": action}
        ended = self.row["is_last"]
        # Where an environment raises, nothing has moved on: a run that goes on takes this step anew, with new episodes.
        with self._saving():
            obs, reward, terminated, truncated, info = self.env.step(action)
        scaled = {"reward": self.settings.reward_scale * self.row["reward"], "action": action}
        self.replay.add({**self.row, **scaled, **self.agent.memory(acting)})
        self.acting = acting
        is_first = info["is_first"]
        if info["decisions"] and self.task.actions.masked:
            legal = self.row[ACTION_MASK].gather(-1, action[:, None]).squeeze(-1) | ended
            self.averages.add({"env_miss_rate": (~legal).float().mean()})
        self.row = {
            **obs,
            "reward": reward,
            "is_first": is_first,
            "is_last": terminated | truncated,
            "is_terminal": terminated,
        }
        self.any_first = info["any_first"]
        decisions = self.ranks.add(info["decisions"])
        self.step += decisions
        self._note_returns(reward, info)
        if self.step >= self._updates_from:
            rows = self.agent.rows_per_update * self.ranks.count
            self.updates_owed += decisions * self.settings.train_ratio / rows

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
                ended = torch.where(self.row["is_last"], self.episode_return, torch.nan)
                self.averages.add_each("train_return", ended)
            elif self.env.all_ended:
                self.averages.add({"train_return": self.episode_return.mean()})
            if self.regret is not None:
                self.regret.note(self.env, self.row["is_last"], self.episode_return)

    def _update(self, *, progress: float) -> dict[str, Tensor]:
        return self.agent.update(self.replay, progress=progress)

    def _prefill_action(self, obs: dict[str, Tensor]) -> Shaped[Tensor, "E *A"]:
        """Uniform among the legal actions, or in routing the nearest node."""
        if self.settings.prefill_policy == "nearest":
            assert isinstance(self.task, RoutingTask), "settings refuse it elsewhere"
            return nearest_node(*self.task.rules.restore(obs), obs[ACTION_MASK])
        count, generator = self.env.num_envs, self.generators["acting"]
        noise = torch.rand((count, *self.task.actions.shape), generator=generator, device=self.device)
        return random_actions(self.task.actions, noise, obs.get(ACTION_MASK))

    def _first_row(self, obs: dict[str, Tensor]) -> dict[str, Tensor]:
        yes = torch.ones(self.env.num_envs, dtype=torch.bool, device=self.device)
        return {
            **obs,
            "reward": torch.zeros(self.env.num_envs, device=self.device),
            "is_first": yes,
            "is_last": ~yes,
            "is_terminal": ~yes,
        }

    def _figures(self, values: dict[str, float]) -> dict[str, float | int]:
        figures: dict[str, float | int] = {}
        if self.settings.reward_scale != 1 and "train_return" in values:
            figures["train_return_scaled"] = self.settings.reward_scale * values["train_return"]
        figures |= self.env.counters()
        return figures if self.regret is None else figures | self.regret.percent()

    def _notices(self) -> list[str]:
        lines = list(self.replay.notices)
        self.replay.notices.clear()
        return lines

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Close the episodes that an evaluation in the training's environments ends, as a time limit would."""
        with self._saving():
            try:
                yield
            finally:
                if self.row:
                    self.row = {**self.row, "is_last": self.row["is_last"] | self.env.take_lost()}

    def _note_report(self, name: str, report: Report) -> None:
        super()._note_report(name, report)
        self._note_crashes(report.crashes)

    def _save_beside(self, *, emergency: bool) -> dict[str, Any]:
        folder = replay_folder(self.logdir, self.ranks.index)
        if not self.ranks.is_first:
            safe_files.make_folder(folder.parent, parents=False)
        return {
            "replay": self.replay.save_chunks(folder, emergency=emergency, numbered=self.settings.checkpoint_numbered),
            # Nothing is there before the first episode.
            "env": self.env.state_dict() if self.row else {},
            "acting": self.acting,
            "row": self.row,
            "any_first": self.any_first,
            "episode_return": self.episode_return,
            "regret": None if self.regret is None else self.regret.state_dict(),
        }

    def _bytes_beside(self) -> int:
        return self.replay.bytes_written

    def _write_latest(self, state: dict[str, Any], *, keep_before: bool) -> None:
        try:
            super()._write_latest(state, keep_before=keep_before)
        except OSError:
            # No checkpoint names what replay has written for this one.
            self.replay.discard_save()
            raise

    def load(self, state: dict[str, Any], *, elsewhere: bool) -> None:
        lost = None
        if self._has_met(state):
            self._require_fit(state)
            lost = self.env.load_state_dict(state["env"])
        super().load(state, elsewhere=elsewhere)
        for name in ("acting", "row", "any_first", "episode_return"):
            setattr(self, name, state[name])
        if self.regret is not None and state.get("regret"):
            self.regret.load_state_dict(state["regret"])
        if lost is not None and bool(lost.any()):
            # An episode that cannot be taken up again is closed as a time limit would close it.
            self.row = {**self.row, "is_last": self.row["is_last"] | lost}
        # No more updates are due than after one step of this config: the config may have changed since.
        due = self.env.num_envs * self.settings.train_ratio / self.agent.rows_per_update
        self.updates_owed = min(self.updates_owed, due + 1)

    def _has_met(self, state: dict[str, Any]) -> bool:
        """Whether the run of a checkpoint had begun its first episodes."""
        return True

    def _require_fit(self, state: dict[str, Any]) -> None:
        """Check what nothing else would complain about before the first step."""
        stored = {name: rows[:, 0] for name, rows in self.replay.rows.items() if name != "action"}
        require_like(stored, state["row"], "row")
        require_like(self.episode_return, state["episode_return"], "episode_return")
        ours = {name: value for name, value in self.acting.items() if isinstance(value, Tensor)}
        require_like(ours, {name: state["acting"].get(name) for name in ours}, "acting")
        if parts := self.env.tensor_parts:
            env = self.env.state_dict()
            require_like({name: env[name] for name in parts}, {name: state["env"].get(name) for name in parts}, "env")
