"""The training loop: collect, learn, evaluate, log, checkpoint, resume. Every agent runs on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

import checkpoint
from checkpoint import CheckpointError
from config import UserError
from envs.crashes import Crash, EnvironmentCrashed
from envs.gym_vector import GymVectorEnv
from envs.tasks import ACTION_MASK, RoutingTask, Task
from envs.vector import RoutingVectorEnv
from guard import Guard, NonFinite
from parts.acting import Sight
from routing.rules import nearest_node
from settings.run import LoopSettings
from system import safe_files, terminal
from tools import OneHotDist
from training.agent import Agent
from training.evaluation import Evaluator, Report
from training.logger import Logger, MetricAverages, ProgressBar, RunLock
from training.regret import Regret
from training.replay import REWARD_AND_ENDS, Replay
from training.resuming import require_like
from training.stopping import StopRequests

# A metric above its threshold is worth a line on the terminal.
WARN_ABOVE = {
    "target_clip_rate": 0.01,
    "miss_rate": 0.0,
    "env_miss_rate": 0.0,
    "mask_rules_wrong": 0.0,
    "value_outside_rate": 0.1,
    "actor_saturation": 0.5,
    **{f"{group}_clip_rate": 0.99 for group in ("model", "actor", "critic", "policy", "q")},
    # Model-free training has been seen to run away at such values, long before anything was not finite.
    "train/q_mean": 1e4,
    "train/q_std": 5e3,
}
WARN_BELOW = {"actor_entropy_share": 1e-3, "train/q_mean": -1e4}
REPORTS, REPLAY, CRASHES = "guard", "replay", "crashes"
# Folders of the logdir in which the program makes and deletes files.
OWN_FOLDERS = (REPORTS, REPLAY, CRASHES)
# The most reports, by one process, of crashes that the run goes on after.
MOST_CRASH_REPORTS = 20


class Trainer:
    """One run: its environments, replay, counters and clocks."""

    def __init__(
        self,
        agent: Agent,
        task: Task,
        *,
        settings: LoopSettings,
        env: RoutingVectorEnv | GymVectorEnv,
        replay: Replay,
        evaluator: Evaluator,
        generators: dict[str, torch.Generator],
        guard: Guard,
        logger: Logger,
        logdir: Path,
        lock: RunLock,
        device: torch.device,
        files: Mapping[str, str],
        at_end: Callable[[], None] | None = None,
    ) -> None:
        """Take the parts together; `run` begins, after `load` where there is something to go on from."""
        self.agent, self.task, self.settings = agent, task, settings
        self.player = agent.players[settings.act]
        self.env, self.replay, self.evaluator, self.guard = env, replay, evaluator, guard
        self.generators, self.logger, self.logdir, self.device = generators, logger, logdir, device
        self.lock = lock
        # Copies of small files of the logdir, for the checkpoints.
        self.files = dict(files)
        self.at_end = at_end
        self.averages = MetricAverages()
        self.step = 0
        self.step_before = 0
        self.seconds = 0.0
        self.updates_owed = 0.0
        self.updates = 0
        self.row: dict[str, Tensor] = {}
        self.any_first = True
        self.acting = self.player.initial_state(env.num_envs)
        self.episode_return = torch.zeros(env.num_envs, device=device)
        self.latest: dict[str, float] = {}
        self.finished = False
        self.emergency = False
        self.crash_reports = 0
        self.save_costs: dict[str, float] = {}
        self.regret: Regret | None = None
        if settings.log_regret:
            assert isinstance(env, RoutingVectorEnv), "settings refuse it elsewhere"
            self.regret = Regret(env.rules)
        self._stop = StopRequests()

    def run(self) -> None:
        """Train until `steps`, then evaluate on the test set. A request to stop saves and ends early.

        Raises:
            CheckpointError: a checkpoint cannot be written.
            KeyboardInterrupt: Ctrl-C came twice.
        """
        self._clock = time.monotonic()
        self._progress = ProgressBar(self.settings.steps, initial=self.step, updates_from=self.settings.prefill)
        self._logged_at = (self.step, self._elapsed())
        self._note_files()
        with self._stop.taken(), closing(self._progress):
            try:
                if not self.row:
                    self._begin()
                self._train()
                if self.finished:
                    self._progress.say(f"this run ended at step {self.step}; give more --steps to go on")
                    return
                if self._stop.signal is None:
                    self._finish()
                self._save()
            except KeyboardInterrupt as error:
                raise KeyboardInterrupt(
                    f"stopped at once at step {self.step}; what was saved before stays as it is in {self.logdir}"
                ) from error
        if self._stop.signal is not None:
            terminal.tell(
                f"stopped by {self._stop.signal} at step {self.step}; saved. The same command goes on from there."
            )

    def _begin(self) -> None:
        """The first evaluation and the first observations."""
        with self._saving():
            # Training's first episodes come after it, since an evaluation in the same environments would end them.
            if self.settings.eval_every:
                self._evaluate()
            obs, info = self.env.reset()
        self.row = self._first_row(obs)
        self.any_first = info["any_first"]
        if self.latest:
            self._show()

    def _train(self) -> None:
        """Collect and learn until `steps` or a request to stop, and log, evaluate and save on the way."""
        while True:
            # Updates that an early stop left out come first, so that the run goes on as if it had not been stopped.
            if self.updates_owed < 1:
                if self.step >= self.settings.steps or self._stop.signal is not None:
                    return
                self.step_before = self.step
                self._collect()
            self._learn()
            if self.updates_owed >= 1:
                return
            self._progress.move(self.step)
            logged, evaluated = self._crossed("log_every"), self._crossed("eval_every")
            if logged:
                self._log()
            if evaluated:
                with self._saving():
                    self._evaluate()
            if logged or evaluated:
                self._show()
            if self._crossed("checkpoint_every"):
                self._save()

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
            if self.row:
                self._save()
            if not isinstance(error, EnvironmentCrashed):
                raise
            path = self._report_crash(error.crash)
            where = f"{path} has its traceback" if path else f"its traceback: {error.crash.trace}"
            remedy = "mend the environment, and the same command goes on; or --env_restarts N restarts it N times"
            raise EnvironmentCrashed(f"{error}; {where}; {remedy}", error.crash) from error

    def _report_crash(self, crash: Crash) -> Path | None:
        """Save the environment's own traceback; the file, or None where it cannot be written."""
        path = self.logdir / CRASHES / f"step_{self.step:09d}_env_{crash.row}.txt"
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
                self._progress.say(f"{path} has the traceback of environment {crash.row}")

    def _collect(self) -> None:
        """One step of every environment."""
        obs = {key: value for key, value in self.row.items() if key not in REWARD_AND_ENDS}
        # An agent acts from the first step on, so that it knows the episodes that it takes over from the prefill, and
        # replay holds what it remembered.
        sight = Sight(obs, self.row["is_first"], self.any_first)
        action, acting = self.player.act(sight, self.acting, generator=self.generators["acting"])
        if self.step < self.settings.prefill:
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
        self.step += info["decisions"]
        self._note_returns(reward, info)
        if self.step >= self.settings.prefill:
            self.updates_owed += info["decisions"] * self.settings.train_ratio / self.agent.rows_per_update

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
                self._progress.say(self.env.notices.pop(0))
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

    def _learn(self) -> None:
        """Make the updates that are owed, or as many of them as come before a request to stop."""
        while self.updates_owed >= 1 and self._stop.signal is None:
            progress = min(1.0, self.step / self.settings.steps)
            try:
                self.averages.add(self.agent.update(self.replay, progress=progress))
            except NonFinite as error:
                self._note_guard()
                self._save(emergency=True)
                latest = self.logdir / checkpoint.LATEST
                raise NonFinite(
                    f"{error}; stopped at step {self.step}. {latest} holds the last good state, and"
                    f" python -m guard {self.logdir / REPORTS}/* tells more; mend the cause, or begin in a new logdir"
                    f" with --init {latest} and lower learning rates"
                ) from error
            self._note_guard()
            self.updates += 1
            self.updates_owed -= 1

    def _note_guard(self) -> None:
        """Print what the guard has to say, and save its reports."""
        while self.guard.notices:
            self._progress.say(self.guard.notices.pop(0))
        while self.guard.reports:
            report = self.guard.reports.pop(0)
            path = self.logdir / REPORTS / f"step_{self.step:09d}_update_{report['update']}.pt"
            try:
                safe_files.make_folder(path.parent)
                checkpoint.save(path, {"step": self.step, **report})
            except OSError as error:
                # A report is a help; the run goes on without it, as it does without a log.
                self._progress.say(f"guard: {path} cannot be written ({error.strerror}); the run goes on without it")
            else:
                self._progress.say(f"guard: python -m guard {path} tells more")

    def _note_files(self) -> None:
        """Print what there is to say of the run's files."""
        lines = [*self.logger.notices(), *self.replay.notices]
        self.replay.notices.clear()
        for line in lines:
            self._progress.say(line)

    def _prefill_action(self, obs: dict[str, Tensor]) -> Shaped[Tensor, "E *A"]:
        """Uniform among the legal actions, or in routing the nearest node."""
        if self.settings.prefill_policy == "nearest":
            assert isinstance(self.task, RoutingTask), "settings refuse it elsewhere"
            return nearest_node(*self.task.rules.restore(obs), obs[ACTION_MASK])
        actions, generator = self.task.actions, self.generators["acting"]
        noise = torch.rand((self.env.num_envs, *actions.shape), generator=generator, device=self.device)
        if actions.kind == "continuous":
            return 2 * noise - 1
        if actions.kind == "multi_discrete":
            return (noise * torch.tensor(actions.sizes, device=self.device)).long()
        logits = torch.zeros((self.env.num_envs, actions.sizes[0]), device=self.device)
        return OneHotDist(logits, mask=obs.get(ACTION_MASK)).sample(noise)

    def _first_row(self, obs: dict[str, Tensor]) -> dict[str, Tensor]:
        yes = torch.ones(self.env.num_envs, dtype=torch.bool, device=self.device)
        return {
            **obs,
            "reward": torch.zeros(self.env.num_envs, device=self.device),
            "is_first": yes,
            "is_last": ~yes,
            "is_terminal": ~yes,
        }

    def _crossed(self, key: str) -> bool:
        every = getattr(self.settings, key)
        return every > 0 and self.step // every > self.step_before // every

    def _elapsed(self) -> float:
        return self.seconds + time.monotonic() - self._clock

    def _log(self) -> None:
        """Fetch the averages, the one time that the loop waits for the device, and warn of what looks wrong."""
        values = self.averages.fetch()
        seconds = self._elapsed()
        step, since = self._logged_at
        values["fps"] = (self.step - step) / max(seconds - since, 1e-9)
        values["updates"] = self.updates
        if self.settings.reward_scale != 1 and "train_return" in values:
            values["train_return_scaled"] = self.settings.reward_scale * values["train_return"]
        self._logged_at = (self.step, seconds)
        values |= self.env.counters() | self.save_costs
        if self.regret is not None:
            values |= self.regret.percent()
        self.save_costs = {}
        self.latest |= values
        self.logger.scalars(self.step, seconds, values)
        self._note_files()
        for name, threshold in WARN_ABOVE.items():
            if values.get(name, 0.0) > threshold:
                self._warn(f"{name} is {values[name]:.3g}, above {threshold:g}")
        for name, threshold in WARN_BELOW.items():
            if values.get(name, threshold) < threshold:
                self._warn(f"{name} is {values[name]:.3g}, below {threshold:g}")

    def _warn(self, line: str) -> None:
        self._progress.say(f"warning: {line}")
        self.logger.text("warnings", line, step=self.step)

    def _show(self) -> None:
        figures = {
            "gap": ("valid_gap", "{:.3g} %"),
            "plan": ("valid_plan_gap", "{:.3g} %"),
            "valid": ("valid_return", "{:.4g}"),
            "return": ("train_return", "{:.4g}"),
            "entropy": ("actor_entropy", "{:.3g}"),
        }
        if "valid_gap" in self.latest or "valid_plan_gap" in self.latest:
            del figures["valid"]
        told = {name: form.format(self.latest[key]) for name, (key, form) in figures.items() if key in self.latest}
        self._progress.update(self.step, told)

    def _evaluate(self) -> None:
        with self._closing_lost_episodes():
            report = self.evaluator.validate(self.agent)
        self._report("validation", "valid", report)

    @contextmanager
    def _closing_lost_episodes(self) -> Iterator[None]:
        """Close the episodes that an evaluation in the training's environments ends, as a time limit would."""
        try:
            yield
        finally:
            if self.row:
                self.row = {**self.row, "is_last": self.row["is_last"] | self.env.take_lost()}

    def _finish(self) -> None:
        """The test set, once."""
        if self.step > self._logged_at[0]:
            self._log()
            self._show()
        if self.at_end is not None:
            self.at_end()
        with self._saving(), self._closing_lost_episodes():
            report = self.evaluator.test(self.agent)
        self.finished = True
        if report is None:
            self._progress.say("there is no final evaluation, as the config says")
            return
        self._report("test", "eval", report)
        self._progress.say(f"final evaluation: {report.summary}")

    def _report(self, name: str, prefix: str, report: Report) -> None:
        for line in report.notices:
            self._progress.say(f"{name}: {line}")
        self._note_crashes(report.crashes)
        values = {f"{prefix}_{key}": value for key, value in report.values.items()}
        self.latest |= values
        self.logger.scalars(self.step, self._elapsed(), values)
        for key, picture in report.pictures.items():
            self.logger.image(self.step, f"{name}_{key}", picture)
        self._note_files()

    def _save(self, *, emergency: bool = False) -> None:
        """Write latest.pt: all that going on exactly needs.

        One emergency after another leaves previous.pt as it was before the first. The next log tells what it has cost.
        """
        begin = time.monotonic()
        try:
            self.lock.hold()
            self._write(self._state(emergency=emergency), emergency=emergency)
            self._note_files()
            written = self.replay.bytes_written + (self.logdir / checkpoint.LATEST).stat().st_size
            self.save_costs = {
                "checkpoint_seconds": time.monotonic() - begin,
                "checkpoint_megabytes": written / 1e6,
            }
        except OSError as error:
            raise CheckpointError(
                f"{self.logdir} cannot be written to at step {self.step} ({error.strerror or error});"
                f" {safe_files.remedy(error)}, and the same command goes on from the last checkpoint"
            ) from error

    def _state(self, *, emergency: bool) -> dict[str, Any]:
        """All that going on exactly needs, beside replay's chunks, which are written here."""
        return {
            **self.files,
            "agent": self.agent.state_dict(),
            "agent_class": type(self.agent).__name__,
            "replay": self.replay.save_chunks(
                self.logdir / REPLAY, emergency=emergency, numbered=self.settings.checkpoint_numbered
            ),
            "env": self.env.state_dict(),
            "generators": checkpoint.generator_state(self.generators),
            "averages": self.averages.state_dict(),
            "logger": self.logger.state_dict(),
            "acting": self.acting,
            "row": self.row,
            "any_first": self.any_first,
            "episode_return": self.episode_return,
            "step": self.step,
            "step_before": self.step_before,
            "updates": self.updates,
            "updates_owed": self.updates_owed,
            "seconds": self._elapsed(),
            "latest": self.latest,
            "regret": None if self.regret is None else self.regret.state_dict(),
            "finished": self.finished,
            "emergency": emergency,
        }

    def _write(self, state: dict[str, Any], *, emergency: bool) -> None:
        try:
            checkpoint.save(self.logdir / checkpoint.LATEST, state, keep_before=not (emergency and self.emergency))
        except OSError:
            self.replay.discard_save()
            raise
        self.emergency = emergency
        if self.settings.checkpoint_numbered:
            checkpoint.save(self.logdir / f"step_{self.step:09d}.pt", state)

    def load(self, state: dict[str, Any], *, elsewhere: bool) -> None:
        """Go on from a checkpoint from which agent and replay have their parts already.

        Args:
            state: the checkpoint.
            elsewhere: it is from another folder than the run's.

        Raises:
            RuntimeError: it does not fit this run.
            OSError: the log cannot be cut.
        """
        self._require_fit(state)
        lost = self.env.load_state_dict(state["env"])
        checkpoint.restore_generators(self.generators, state["generators"])
        self.averages.load_state_dict(state["averages"])
        self.logger.load_state_dict(state["logger"], elsewhere=elsewhere)
        self.step_before = state.get("step_before", state["step"])
        for name in (
            "acting",
            "row",
            "any_first",
            "episode_return",
            "step",
            "updates",
            "updates_owed",
            "seconds",
            "latest",
            "emergency",
        ):
            setattr(self, name, state[name])
        if self.regret is not None and state.get("regret"):
            self.regret.load_state_dict(state["regret"])
        if lost is not None and bool(lost.any()):
            # An episode that cannot be taken up again is closed as a time limit would close it.
            self.row = {**self.row, "is_last": self.row["is_last"] | lost}
        # With more steps than it had, a run that has ended goes on.
        self.finished = state["finished"] and self.step >= self.settings.steps
        # No more updates are due than after one step of this config: the config may have changed since.
        due = self.env.num_envs * self.settings.train_ratio / self.agent.rows_per_update
        self.updates_owed = min(self.updates_owed, due + 1)

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
