"""Works a sweep off: starts runs, watches them, goes on with those that were killed, and stops all when asked to."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

import checkpoint
from checkpoint import CheckpointError
from comparing import runs
from sweeping.jobs import Job, Workers
from sweeping.plans import Ending, Plan, Row, Run, Trial
from system.terminal import tell
from training.stopping import StopRequests

# Seconds between two looks at the jobs, and between two at a run's metrics.
LOOK_EVERY, READ_EVERY = 0.1, 1.0
# How often in a row a run is started again that was killed before it got any further.
MOST_RESTARTS = 3
# Seconds that runs are given to save, and to end after a second Ctrl-C, before they are killed.
GRACE, SHORT_GRACE = 300.0, 5.0
# The status of a mistake of the user's, which the same command makes again.
MISTAKE = 2

IsDone = Callable[[Run], bool]


class MetricTail:
    """The values of one metric in a run's metrics.jsonl, as it grows."""

    def __init__(self, logdir: Path, metric: str | None) -> None:
        """Read nothing yet; nothing ever where there is no metric."""
        self._path, self._metric = logdir / runs.METRICS, metric
        self._size, self._read_at = -1, -math.inf
        self.rows: list[Row] = []

    def has_grown(self, *, at_once: bool = False) -> bool:
        """Read what there is, if it is time to; whether there are other rows than before."""
        now = time.monotonic()
        if self._metric is None or (now - self._read_at < READ_EVERY and not at_once):
            return False
        self._read_at = now
        size = self._path.stat().st_size if self._path.exists() else 0
        if size == self._size:
            return False
        self._size, before = size, self.rows
        self.rows = self._read() if size else []
        return self.rows != before

    def _read(self) -> list[Row]:
        # A run that goes on cuts the file first, so that all of it is read anew.
        found = []
        for line in self._path.read_bytes().split(b"\n")[:-1]:
            row = runs.metric_row(line)
            if row is not None and self._metric in row:
                value = row[self._metric]
                found.append(Row(int(row["step"]), math.nan if value is None else value))
        return found


@dataclass
class Active:
    """A trial that is being worked on: the run that it has come to, and its job."""

    trial: Trial
    slot: int
    place: int = 0
    job: Job | None = None
    tail: MetricTail | None = None
    scores: list[float] = field(default_factory=list)
    restarts: int = 0
    steps: int = -1
    is_pruned: bool = False
    is_waiting: bool = False

    @property
    def run(self) -> Run:
        """The run that it has come to."""
        return self.trial.runs[self.place]


class Sweep:
    """A plan's trials and the workers that run them."""

    def __init__(self, plan: Plan, workers: Workers, *, program: str, is_done: IsDone) -> None:
        """Take both.

        Args:
            plan: says what comes next.
            workers: run it.
            program: that trains.
            is_done: whether a run had been finished before, just as it is to be.
        """
        self.plan, self.workers, self.program, self._is_done = plan, workers, program, is_done
        self.endings: dict[str, Ending] = {}
        self._active: list[Active] = []
        self._stop = StopRequests()

    def work(self) -> str | None:
        """Go through the whole plan; the name of the signal that ended it early, if one did.

        Raises:
            KeyboardInterrupt: Ctrl-C came twice; all runs have ended.
            OSError: a run cannot be started.
        """
        with self._stop.taken():
            try:
                more = True
                while more or self._active:
                    if self._stop.signal is not None:
                        self._end_all(signal.Signals[self._stop.signal], GRACE)
                        return self._stop.signal
                    while more and len(self._active) < self.workers.count:
                        more = self._begin()
                    for active in list(self._active):
                        self._look(active)
                    time.sleep(LOOK_EVERY)
            except BaseException as error:
                self._end_all(signal.SIGINT, SHORT_GRACE)
                if isinstance(error, KeyboardInterrupt):
                    raise KeyboardInterrupt(
                        "stopped at once; what was saved before stays, and the same command goes on"
                    ) from error
                raise
        return None

    def _begin(self) -> bool:
        trial = self.plan.next()
        if trial is None:
            return False
        slot = min(set(range(self.workers.count)) - {active.slot for active in self._active})
        active = Active(trial, slot)
        self._active.append(active)
        self._start(active)
        return True

    def _start(self, active: Active) -> None:
        """Start the run that the trial has come to; those that were finished before are passed over."""
        while self._is_done(active.run):
            active.tail = MetricTail(active.run.logdir, self.plan.metric)
            if self._note_run(active):
                return
        run = active.run
        if runs.is_locked(run.logdir / runs.LOCK):
            # A run whose sweep was killed is still saving, say.
            if not active.is_waiting:
                tell(f"{run.logdir.name} is in use by another process; waiting for its end")
            active.is_waiting = True
            return
        active.is_waiting = False
        active.tail = active.tail or MetricTail(run.logdir, self.plan.metric)
        active.job = self.workers.start(self.program, run.arguments, name=run.logdir.name, slot=active.slot)

    def _look(self, active: Active) -> None:
        if active.is_waiting:
            self._start(active)
            return
        job, tail = active.job, active.tail
        assert job is not None and tail is not None, "whoever does not wait was started"
        status = job.status()
        has_grown = tail.has_grown(at_once=status is not None)
        if has_grown and not active.is_pruned and self.plan.should_stop(active.trial, active.run, tail.rows):
            active.is_pruned = True
            job.send(signal.SIGTERM)
            return
        if status is None:
            return
        if active.is_pruned:
            self._end(active, "pruned", f"stopped at step {tail.rows[-1].step:,}, being worse than most")
        elif status == 0 and _is_finished(active.run.logdir):
            if not self._note_run(active):
                self._start(active)
        elif status <= 0 and self._may_start_again(active):
            cause = f"killed by {signal.Signals(-status).name}" if status else "stopped by somebody else"
            tell(f"{active.run.logdir.name}: {cause}, and goes on from its last checkpoint")
            self._start(active)
        else:
            said = self.workers.printed(active.run.logdir.name)
            cause = said if status == MISTAKE else f"ended with status {status} ({said})"
            self._end(active, "failed", cause)

    def _may_start_again(self, active: Active) -> bool:
        """Whether a run that was killed has come any further since, or has not been killed often."""
        steps = _last_step(active.run.logdir)
        active.restarts = 0 if steps > active.steps else active.restarts + 1
        active.steps = steps
        return active.restarts < MOST_RESTARTS

    def _note_run(self, active: Active) -> bool:
        """Take note of a run that is finished; whether its trial is, too."""
        tail = active.tail
        assert tail is not None, "a run that is finished has been looked at"
        tail.has_grown(at_once=True)
        if tail.rows:
            active.scores.append(tail.rows[-1].value)
        elif self.plan.metric is not None:
            self._end(active, "failed", f"its runs log no {self.plan.metric}; search by one that they log")
            return True
        if active.place + 1 == len(active.trial.runs):
            self._end(active, "finished", _listed(active.scores, self.plan.metric))
            return True
        active.place += 1
        active.job = active.tail = None
        active.restarts, active.steps = 0, -1
        return False

    def _end(self, active: Active, ending: Ending, words: str) -> None:
        self._active.remove(active)
        self.endings[active.trial.name] = ending
        self.plan.note(active.trial, ending, active.scores)
        tell(f"{active.trial.name}: {ending}{words and f', {words}'} ({len(self.endings)} of {self.plan.total})")

    def _end_all(self, number: signal.Signals, grace: float) -> None:
        """Hand a request to stop on to every run, wait for their ends, and kill those that take too long."""
        jobs = [active.job for active in self._active if active.job is not None]
        for job in jobs:
            job.send(number)
        deadline = time.monotonic() + grace
        while any(job.status() is None for job in jobs) and time.monotonic() < deadline:
            time.sleep(LOOK_EVERY)
        for job in jobs:
            job.kill()
        for active in self._active:
            self.plan.note(active.trial, "stopped", active.scores)
        self._active = []


def _is_finished(logdir: Path) -> bool:
    """Whether a run has come to its end, by its checkpoint."""
    try:
        return bool(checkpoint.load(logdir / checkpoint.LATEST, torch.device("cpu")).get("finished"))
    except CheckpointError:
        return False


def _last_step(logdir: Path) -> int:
    """The step of the last row that a run has logged; -1 where there is none."""
    try:
        return int(runs.read(logdir).steps)
    except (runs.UnreadableRunError, OSError):
        return -1


def _listed(scores: list[float], metric: str | None) -> str:
    return "" if metric is None else f"{metric} {', '.join(f'{score:.4g}' for score in scores)}"
