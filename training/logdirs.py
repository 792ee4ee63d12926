"""The folder of a run: its name, and who may write to it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from comparing.runs import LOCK, METRICS
from config import CommandLine, Config, ConfigError
from system import safe_files
from system.safe_files import refuse_links
from training.collecting import OWN_FOLDERS
from training.run_lock import RunLock

# The names of this program's logdirs do not begin with the program.
DREAMER = "dreamer.py"


def default_logdir(program: str, command: CommandLine) -> Path:
    """logdir/<sections, or else the task>-seed<seed>, so that the same command goes on with its own run."""
    of_task = command.config.task if program == DREAMER else f"{Path(program).stem}-{command.config.task}"
    name = re.sub("[^A-Za-z0-9_.-]+", "_", "-".join(command.sections) or of_task)
    return Path("logdir") / f"{name}-seed{command.config.seed}"


def unused_logdir(config: Config) -> Path:
    """The folder that the config names, for a run that is not ours to go on with.

    Raises:
        ConfigError: it names none, or one with a run in it.
    """
    if config.logdir is None or (Path(str(config.logdir)) / METRICS).exists():
        raise ConfigError(f"--logdir is {config.logdir}; name a folder that has no run yet")
    return Path(str(config.logdir))


@contextmanager
def claimed(logdir: Path) -> Iterator[RunLock]:
    """Keep other processes out of a folder, which is made if need be, and goes away again if nothing came of it.

    Raises:
        ConfigError: it cannot be made or written to.
        LogdirInUseError: another process has it.
    """
    made = [folder for folder in (logdir, *logdir.parents) if not folder.exists()]
    with writing_to(logdir):
        logdir.mkdir(parents=True, exist_ok=True)
        refuse_links(logdir, (METRICS, *OWN_FOLDERS))
        lock = RunLock(logdir)
    try:
        yield lock
    finally:
        lock.release()
        # Somebody may have taken the folder away, and another run may have begun beside this one.
        with suppress(OSError):
            if made and [path.name for path in logdir.iterdir()] == [LOCK]:
                (logdir / LOCK).unlink()
                for folder in made:
                    folder.rmdir()


@contextmanager
def writing_to(logdir: Path) -> Iterator[None]:
    """Say in one line that a folder cannot be written to."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"logdir {logdir} cannot be written to ({error.strerror or error}); give another --logdir, or"
            f" {safe_files.remedy(error)}"
        ) from error
