"""What every run does, whatever it learns from: learn, evaluate, log, checkpoint, resume and stop, step by step."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import checkpoint
from checkpoint import CheckpointError
from guard import Guard, NonFinite
from settings.run import LoopSettings
from system import safe_files, terminal
from system.ranks import apart, here
from training.agent import Trained
from training.averages import MetricAverages
from training.evaluation import Evaluator, Report
from training.logger import Logger
from training.progress import ProgressBar, SilentBar
from training.run_lock import RunLock
from training.stopping import StopRequests

# A metric above its threshold is worth a line on the terminal.
WARN_ABOVE = {
    "target_clip_rate": 0.01,
    "miss_rate": 0.0,
    "env_miss_rate": 0.0,
    "mask_rules_wrong": 0.0,
    "value_outside_rate": 0.1,
    "actor_saturation": 0.5,
    # Tokens are then drawn from something else than what learns.
    "sampling_error_max": 0.1,
    "logits_nan_max": 0.0,
    "logits_inf_max": 0.0,
    **{f"{group}_clip_rate": 0.99 for group in ("model", "actor", "critic", "policy", "q")},
    # Model-free training has been seen to run away at such values, long before anything was not finite.
    "train/q_mean": 1e4,
    "train/q_std": 5e3,
}
WARN_BELOW = {"actor_entropy_share": 1e-3, "train/q_mean": -1e4}
REPORTS = "guard"
# What is shown beside the bar, those that matter most first: the name there, the metric, and how it is written.
FIGURES = {
    "gap": ("valid_gap", "{:.3g} %"),
    "plan": ("valid_plan_gap", "{:.3g} %"),
    "error": ("valid_move_error", "{:.3g} %"),
    "valid": ("valid_return", "{:.4g}"),
    "reward": ("valid_reward", "{:.4g}"),
    "ade": ("valid_ade", "{:.3g} m"),
    "best of six": ("valid_min_ade", "{:.3g} m"),
    "return": ("train_return", "{:.4g}"),
    "entropy": ("actor_entropy", "{:.3g}"),
}


class Loop(ABC):
    """One run: its counters and clocks, its log and its checkpoints.

    A subclass says what a step is (`_advance`), which learns by as many updates as it owes then (`updates_owed`), and
    what else belongs into a checkpoint.
    """

    def __init__(
        self,
        agent: Trained,
        *,
        settings: LoopSettings,
        total: int,
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
        """Take the parts together; `run` begins, after `load` where there is something to go on from.

        Args:
            agent: learns, and is evaluated.
            settings: how often what is done.
            total: steps after which the run ends.
            evaluator: judges the agent.
            generators: one for each role.
            guard: told of everything that is not finite.
            logger: where figures and pictures go.
            logdir: the run's folder.
            lock: keeps other processes out of it.
            device: where the agent learns.
            files: copies of small files of the logdir, for the checkpoints.
            at_end: called after the last update, before the final evaluation and the last checkpoint.
        """
        self.agent, self.settings, self.total = agent, settings, total
        self.evaluator, self.guard, self.generators = evaluator, guard, generators
        self.logger, self.logdir, self.lock, self.device = logger, logdir, lock, device
        self.files, self.at_end = dict(files), at_end
        self.averages = MetricAverages()
        self.step = 0
        self.step_before = 0
        self.seconds = 0.0
        self.updates_owed = 0.0
        self.updates = 0
        self.latest: dict[str, float] = {}
        self.finished = False
        self.emergency = False
        self.save_costs: dict[str, float] = {}
        self._stop = StopRequests()
        self.ranks = here()
        # Of what several ranks write into one folder.
        self.label = "" if self.ranks.is_first else f"_rank{self.ranks.index}"

    # What a subclass says

    @property
    def _begun(self) -> bool:
        """Whether there is anything to go on from."""
        return self.step > 0

    def _begin(self) -> None:
        """What comes before the first step of a run that is not gone on with: the first evaluation."""
        if self.settings.eval_every:
            self._evaluate()
            self._show()

    @abstractmethod
    def _advance(self) -> None:
        """Make one step, or several of which only the last makes anything due, and note what updates are due then."""

    @abstractmethod
    def _update(self, *, progress: float) -> dict[str, Tensor]:
        """One update of the agent, and its metrics."""

    @abstractmethod
    def _save_beside(self, *, emergency: bool) -> dict[str, Any]:
        """What else a checkpoint holds; files that it needs are written now."""

    def _bytes_beside(self) -> int:
        """The size of the files that `_save_beside` wrote last."""
        return 0

    def _figures(self, values: dict[str, float]) -> dict[str, float | int]:
        """What else a row of the log tells, beside averages that were just fetched."""
        return {}

    def _notices(self) -> list[str]:
        """Lines to be read about other files than the log's, each once."""
        return []

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Around an evaluation: what has to hold after it, however it ends."""
        yield

    def _note_report(self, name: str, report: Report) -> None:
        """Print what went wrong in an evaluation."""
        for line in report.notices:
            self._progress.say(f"{name}: {line}")

    # What is the same for all

    def run(self) -> None:
        """Train until the last step, then evaluate on the test set. A request to stop saves and ends early.

        Raises:
            CheckpointError: a checkpoint cannot be written.
            KeyboardInterrupt: Ctrl-C came twice.
        """
        self._clock = time.monotonic()
        self._progress = self._make_progress()
        self._logged_at = (self.step, self._elapsed())
        self._note_files()
        with self._stop.taken(), closing(self._progress):
            try:
                if not self._begun:
                    self._begin()
                self._train()
                if self.finished:
                    self._progress.say(f"this run ended at step {self.step}; {self._more}")
                    return
                if self._asked_to_stop() is None:
                    self._finish()
                self._save()
            except KeyboardInterrupt as error:
                raise KeyboardInterrupt(
                    f"stopped at once at step {self.step}; what was saved before stays as it is in {self.logdir}"
                ) from error
        if (stopped_by := self._asked_to_stop()) is not None:
            terminal.tell(f"stopped by {stopped_by} at step {self.step}; saved. The same command goes on from there.")

    def _make_progress(self) -> ProgressBar:
        if self.ranks.is_first:
            return ProgressBar(self.total, initial=self.step, updates_from=self._updates_from)
        return SilentBar(f"rank {self.ranks.index}")

    def _asked_to_stop(self) -> str | None:
        """The signal by which this rank, or any other, is asked to stop; None where none is."""
        return self.ranks.agree(self._stop.signal)

    @property
    def _updates_from(self) -> int:
        """The step from which on updates go with every step."""
        return 0

    @property
    @abstractmethod
    def _more(self) -> str:
        """What lets a run that has ended go on."""

    def _train(self) -> None:
        """Step and learn until the last step or a request to stop, and log, evaluate and save on the way."""
        while True:
            # Updates that an early stop left out come first, so that the run goes on as if it had not been stopped.
            if self.updates_owed < 1:
                if self.step >= self.total or self._asked_to_stop() is not None:
                    return
                self.step_before = self.step
                self._advance()
            self._learn()
            if self.updates_owed >= 1:
                return
            self._progress.move(self.step)
            logged, evaluated = self._crossed("log_every"), self._crossed("eval_every")
            if logged:
                self._log()
            if evaluated:
                self._evaluate()
            if logged or evaluated:
                self._show()
            if self._crossed("checkpoint_every"):
                self._save()

    def _learn(self) -> None:
        """Make the updates that are owed, or as many of them as come before a request to stop."""
        while self.updates_owed >= 1 and self._asked_to_stop() is None:
            try:
                self.averages.add(self._update(progress=min(1.0, self.step / self.total)))
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
            self._progress.alert(self.guard.notices.pop(0))
        while self.guard.reports:
            report = self.guard.reports.pop(0)
            path = self.logdir / REPORTS / f"step_{self.step:09d}_update_{report['update']}{self.label}.pt"
            try:
                safe_files.make_folder(path.parent)
                checkpoint.save(path, {"step": self.step, **report})
            except OSError as error:
                # A report is a help; the run goes on without it, as it does without a log.
                self._progress.alert(f"guard: {path} cannot be written ({error.strerror}); the run goes on without it")
            else:
                self._progress.alert(f"guard: python -m guard {path} tells more")

    def _note_files(self) -> None:
        """Print what there is to say of the run's files."""
        for line in [*self.logger.notices(), *self._notices()]:
            self._progress.say(line)

    def _crossed(self, key: str) -> bool:
        every = getattr(self.settings, key)
        return every > 0 and self.step // every > self.step_before // every

    def _elapsed(self) -> float:
        return self.seconds + time.monotonic() - self._clock

    def _log(self) -> None:
        """Fetch the averages, the one time that the loop waits for the device, and warn of what looks wrong."""
        for other in self.ranks.collect(self.averages.state_dict())[1:]:
            self.averages.merge(other)
        values = self.averages.fetch()
        seconds = self._elapsed()
        step, since = self._logged_at
        values["fps"] = (self.step - step) / max(seconds - since, 1e-9)
        values["updates"] = self.updates
        self._logged_at = (self.step, seconds)
        values |= self._figures(values)
        values |= self.save_costs
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
        figures = dict(FIGURES)
        if "valid_gap" in self.latest or "valid_plan_gap" in self.latest:
            del figures["valid"]
        told = {name: form.format(self.latest[key]) for name, (key, form) in figures.items() if key in self.latest}
        self._progress.update(self.step, told)

    def _evaluate(self) -> None:
        with self._undisturbed(), apart():
            report = self.evaluator.validate(self.agent)
        self._report("validation", "valid", report)

    def _finish(self) -> None:
        """The test set, once."""
        if self.step > self._logged_at[0]:
            self._log()
            self._show()
        with apart():
            if self.at_end is not None:
                self.at_end()
            with self._undisturbed():
                report = self.evaluator.test(self.agent)
        self.finished = True
        if report is None:
            self._progress.say("there is no final evaluation, as the config says")
            return
        self._report("test", "eval", report)
        self._progress.say(f"final evaluation: {report.summary}")

    def _report(self, name: str, prefix: str, report: Report) -> None:
        self._note_report(name, report)
        values = {f"{prefix}_{key}": value for key, value in report.values.items()}
        self.latest |= values
        self.logger.scalars(self.step, self._elapsed(), values)
        for key, picture in report.pictures.items():
            self.logger.image(self.step, f"{name}_{key}", picture)
        for key, page in report.texts.items():
            self.logger.text(f"{name}_{key}", page, step=self.step)
        self._note_files()

    def _save(self, *, emergency: bool = False) -> None:
        """Write latest.pt: all that going on exactly needs.

        One emergency after another leaves previous.pt as it was before the first. The next log tells what it has cost.
        """
        begin = time.monotonic()
        try:
            self.lock.hold()
            state = self._state(emergency=emergency)
            if not self.ranks.is_first:
                return
            self._write(state, emergency=emergency)
            self._note_files()
            written = self._bytes_beside() + (self.logdir / checkpoint.LATEST).stat().st_size
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
        """All that going on exactly needs, beside files of their own, which are written here."""
        agent = self.agent.state_dict()
        own, *others = self.ranks.collect(self._own_state(emergency=emergency)) or [{}]
        return {
            **self.files,
            "agent": agent,
            "agent_class": type(self.agent).__name__,
            **own,
            **({"ranks": others} if others else {}),
            "logger": self.logger.state_dict(),
            "step": self.step,
            "step_before": self.step_before,
            "updates": self.updates,
            "updates_owed": self.updates_owed,
            "seconds": self._elapsed(),
            "latest": self.latest,
            "finished": self.finished,
            "emergency": emergency,
        }

    def _own_state(self, *, emergency: bool) -> dict[str, Any]:
        """What each rank has for itself."""
        return {
            **self._save_beside(emergency=emergency),
            "generators": checkpoint.generator_state(self.generators),
            "averages": self.averages.state_dict(),
        }

    def _write(self, state: dict[str, Any], *, emergency: bool) -> None:
        self._write_latest(state, keep_before=not (emergency and self.emergency))
        self.emergency = emergency
        if self.settings.checkpoint_numbered:
            checkpoint.save(self.logdir / f"step_{self.step:09d}.pt", state)

    def _write_latest(self, state: dict[str, Any], *, keep_before: bool) -> None:
        checkpoint.save(self.logdir / checkpoint.LATEST, state, keep_before=keep_before)

    def load(self, state: dict[str, Any], *, elsewhere: bool) -> None:
        """Go on from a checkpoint from which the agent, and what it learns from, have their parts already.

        Args:
            state: the checkpoint.
            elsewhere: it is from another folder than the run's.

        Raises:
            RuntimeError: it does not fit this run.
            OSError: the log cannot be cut.
        """
        checkpoint.restore_generators(self.generators, state["generators"])
        self.averages.load_state_dict(state["averages"])
        self.logger.load_state_dict(state["logger"], elsewhere=elsewhere)
        self.step_before = state.get("step_before", state["step"])
        for name in ("step", "updates", "updates_owed", "seconds", "latest", "emergency"):
            setattr(self, name, state[name])
        # With more steps than it had, a run that has ended goes on.
        self.finished = state["finished"] and self.step >= self.total
