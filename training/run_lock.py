"""One process at a time writes to a logdir."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from comparing.runs import LOCK
from system import safe_files

# The most characters of a process id in a lock.
LONGEST_ID = 20


class LogdirInUseError(RuntimeError):
    """Another live process writes to the logdir."""


class RunLock:
    """Keeps a second process out of a logdir. The system releases it when this process ends, however it ends."""

    def __init__(self, logdir: Path) -> None:
        """Take the lock.

        Raises:
            LogdirInUseError: another live process has it.
        """
        self._path = logdir / LOCK
        self._take()

    def hold(self) -> None:
        """Make sure that the lock is where another process would look for it; take it anew where it was removed.

        Raises:
            LogdirInUseError: another live process has taken it meanwhile.
        """
        try:
            there = os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            there = False
        if not there:
            self._file.close()
            self._take()

    def _take(self) -> None:
        self._file = safe_files.open_in_place(self._path)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            owner = self._file.read(LONGEST_ID).decode("ascii", errors="replace").strip() or "unknown"
            self._file.close()
            raise LogdirInUseError(
                f"{self._path.parent} is in use by process {owner};"
                " give another --logdir, or stop that process and start again"
            ) from error
        self._file.truncate(0)
        # The process id is only for people to read: the lock holds without it, on a full disk, too.
        with contextlib.suppress(OSError):
            os.write(self._file.fileno(), f"{os.getpid()}\n".encode())

    def release(self) -> None:
        """Let the next process in, and leave no process id behind, since another process may get the same one."""
        with contextlib.suppress(OSError):
            self._file.truncate(0)
        self._file.close()


class SilentLock(RunLock):
    """The lock of a rank: another one holds the folder for it."""

    def __init__(self) -> None:
        """Take nothing."""

    def hold(self) -> None:
        """The first rank does."""

    def release(self) -> None:
        """Nothing is held."""
