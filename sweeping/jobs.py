"""Who runs the runs of a sweep: processes of this machine, or a cluster's scheduler through submitit."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from system.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
# Of prctl(2): the signal that a process gets when the one that started it ends, however it ends.
_PARENT_DEATH_SIGNAL = 1
# The status of a job that ended without one, as one that was killed does.
KILLED = -signal.SIGKILL
CLUSTERS = ("slurm", "local")


@runtime_checkable
class Job(Protocol):
    """A run that was started."""

    def status(self) -> int | None:
        """Its exit status, below 0 for the signal that ended it; None while it runs."""

    def send(self, number: signal.Signals) -> None:
        """Hand on a request to stop."""

    def kill(self) -> None:
        """End it at once."""


@runtime_checkable
class Workers(Protocol):
    """Starts runs, at most `count` at once.

    Attributes:
        count: that many.
        logs: the folder where what runs print is kept.
    """

    count: int
    logs: Path

    def start(self, program: str, arguments: Sequence[str], *, name: str, slot: int) -> Job:
        """Start `program` with `arguments`; `slot` is one of 0 to `count` - 1 that no running job has.

        Raises:
            OSError: it cannot be started.
        """

    def printed(self, name: str) -> str:
        """The last line that the run of this name has printed; empty where there is none."""


class ProcessJob:
    """A process, with all those that it starts."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        """Take a process that leads a group of its own."""
        self._process = process

    def status(self) -> int | None:
        """As of every job."""
        return self._process.poll()

    def send(self, number: signal.Signals) -> None:
        """As of every job."""
        # The run alone: its environments' processes end with it, and must not end before.
        if self._process.poll() is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """As of every job; waits for its end."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class Processes:
    """Processes of this machine. Where several GPUs can be seen, they are shared out among the slots."""

    def __init__(self, count: int, *, logs: Path) -> None:
        """Run at most `count` at once; what they print goes to files in `logs`, which exists."""
        self.count, self.logs = count, logs
        self._gpus = _visible_gpus()

    def start(self, program: str, arguments: Sequence[str], *, name: str, slot: int) -> Job:
        """As of all workers."""
        environment = dict(os.environ)
        if len(self._gpus) > 1:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[slot % len(self._gpus)]
        with self._log(name).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, str(ROOT / program), *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C reaches the sweep alone, which hands it on.
                start_new_session=True,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        return ProcessJob(process)

    def printed(self, name: str) -> str:
        """As of all workers."""
        return _last_line(self._log(name))

    def _log(self, name: str) -> Path:
        return self.logs / f"{name}.txt"


class Call(NamedTuple):
    """A run as a scheduler calls it, in a process that it starts. One that it preempts is called again, and goes on."""

    program: str
    arguments: tuple[str, ...]

    def __call__(self) -> int:
        """Run, and give the exit status."""
        sys.argv = [self.program, *self.arguments]
        try:
            runpy.run_path(str(ROOT / self.program), run_name="__main__")
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else 1
        return 0

    def checkpoint(self) -> Any:
        """What submitit is to call when it has been given time again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)  # type: ignore[arg-type]


class SubmittedJob:
    """A job of a scheduler."""

    def __init__(self, job: Any) -> None:
        """Take submitit's."""
        self.job = job

    def status(self) -> int | None:
        """As of every job."""
        if not self.job.done():
            return None
        # A job that raised or was killed has no result; submitit's message quotes all that it printed.
        try:
            return int(self.job.result())
        except Exception as error:
            return KILLED if type(error).__name__ == "UncompletedJobError" else 1

    def send(self, number: signal.Signals) -> None:
        """As of every job: a scheduler has its own signal, which asks a run to save and to stop, too."""
        self.job.cancel()

    def kill(self) -> None:
        """As of every job: a scheduler kills what does not stop."""
        self.job.cancel()


class Cluster:
    """The scheduler of a cluster, SLURM; or submitit's stand-in for one on this machine, `local`."""

    def __init__(self, count: int, *, logs: Path, kind: str, options: Mapping[str, str]) -> None:
        """Submit at most `count` jobs at once.

        Args:
            count: that many.
            logs: an existing folder, for what jobs print, and submitit's own files.
            kind: one of `CLUSTERS`.
            options: of submitit's `update_parameters`, such as timeout_min and slurm_partition.

        Raises:
            ConfigError: submitit is missing, or refuses them.
        """
        if importlib.util.find_spec("submitit") is None:
            raise ConfigError('--cluster needs submitit: pip install -e ".[slurm]"')
        # Without this, importing it closes every handler that this program's logging has.
        os.environ.setdefault("SUBMITIT_LOG_LEVEL", "NOCONFIG")
        import submitit

        self.count, self.logs = count, logs
        # Jobs import what they call, wherever they are.
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        try:
            self._executor = submitit.AutoExecutor(folder=logs, cluster=kind)
            self._executor.update_parameters(**{key: _as_number(value) for key, value in options.items()})
        except (RuntimeError, ValueError, TypeError, NameError) as error:
            # Submitit has made its folder.
            with contextlib.suppress(OSError):
                logs.rmdir()
            raise ConfigError(f"submitit cannot use cluster {kind} so: {' '.join(str(error).split())}") from error
        self._jobs: dict[str, Any] = {}

    def start(self, program: str, arguments: Sequence[str], *, name: str, slot: int) -> Job:
        """As of all workers."""
        self._executor.update_parameters(name=name)
        call: Any = Call(program, tuple(arguments))
        self._jobs[name] = self._executor.submit(call)
        return SubmittedJob(self._jobs[name])

    def printed(self, name: str) -> str:
        """As of all workers."""
        return _last_line(self._jobs[name].paths.stderr) if name in self._jobs else ""


def _end_with_parent() -> None:
    """Ask for SIGTERM, at which a run saves and stops, when the process that started this one is no more."""
    ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def _visible_gpus() -> list[str]:
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def _last_line(path: Path) -> str:
    if not path.exists():
        return ""
    lines = path.read_bytes().decode("utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def _as_number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
