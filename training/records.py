"""The files that a run's log grows in, by whole records only: metrics.jsonl and TensorBoard's event file.

Where a record cannot be written, its file stays as it was. Where somebody else has changed or removed a file in the
meantime, this is noticed, said, and made good as far as it can be.
"""

from __future__ import annotations

import itertools
import math
import os
import socket
import time
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from comparing import runs
from system import safe_files

# What TensorBoard expects in the first event of a file.
EVENT_FORMAT = "brain.Event:2"
_numbers = itertools.count()


class GrowingFile:
    """A file that is appended to, a whole record or nothing, without any buffer in this process."""

    def __init__(self, path: Path) -> None:
        """Open the file, or make it.

        Raises:
            OSError: that cannot be done.
        """
        self.path = path
        self._file = safe_files.open_in_place(path)

    @property
    def size(self) -> int:
        """Bytes in the file, whoever wrote them."""
        return os.fstat(self._file.fileno()).st_size

    @property
    def changed_at(self) -> int:
        """When the file was last written to, by anybody, in nanoseconds."""
        return os.fstat(self._file.fileno()).st_mtime_ns

    def is_in_place(self) -> bool:
        """Whether the path still leads to this file; a folder that is gone as a whole is another matter."""
        own = os.fstat(self._file.fileno())
        try:
            named = os.lstat(self.path)
        except FileNotFoundError:
            return not self.path.parent.exists()
        return (named.st_dev, named.st_ino) == (own.st_dev, own.st_ino)

    def read(self) -> bytes:
        """All that is in the file, also where its path is gone."""
        return os.pread(self._file.fileno(), self.size, 0)

    def write(self, record: bytes) -> None:
        """Append a record.

        Raises:
            OSError: it cannot be written; the file is as it was.
        """
        descriptor, size = self._file.fileno(), self.size
        left = memoryview(record)
        try:
            while left:
                left = left[os.write(descriptor, left) :]
        except OSError:
            os.ftruncate(descriptor, size)
            raise

    def cut(self, size: int) -> None:
        """Take away all but the first bytes."""
        os.ftruncate(self._file.fileno(), size)

    def sync(self) -> None:
        """Force what is written to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close it."""
        self._file.close()


class MetricsFile:
    """The rows of metrics.jsonl, with a count and a checksum to tell whether they are what this run has written.

    Attributes:
        notices: lines that the user should read. Whoever prints them empties the list.
    """

    def __init__(self, path: Path, *, resume_step: int | None) -> None:
        """Open the file; rows of a run that came to no checkpoint are kept aside where another one begins.

        Args:
            path: in an existing folder.
            resume_step: as for `Logger`.

        Raises:
            OSError: that cannot be done.
        """
        self.notices: list[str] = []
        self._path = path
        self._resume_step = resume_step
        self._file = GrowingFile(self._path)
        self._rows = self._bytes = self._checksum = 0
        self._pending = b""
        self._failing = False
        if resume_step is None:
            self._begin("of an earlier run, which came to no checkpoint")
        self._changed_at = self._file.changed_at

    def add(self, row: bytes) -> None:
        """Append a row. One that cannot be written waits for the next."""
        self._pending += row + b"\n"
        try:
            self._look_after()
            self._file.write(self._pending)
        except OSError as error:
            if not self._failing:
                self._say(f"cannot be written ({error.strerror}): rows wait until it can be")
            self._failing = True
            return
        self._failing = False
        self._rows += self._pending.count(b"\n")
        self._bytes += len(self._pending)
        self._checksum = zlib.crc32(self._pending, self._checksum)
        self._changed_at = self._file.changed_at
        self._pending = b""

    def state_dict(self) -> dict[str, Any]:
        """What tells later whether the rows up to here are still there, and those that could not be written yet.

        Rows are forced to the disk, so that no checkpoint ever counts some that a power cut can still take.
        """
        try:
            self._look_after()
            self._file.sync()
        except OSError as error:
            self._say(f"may lose its last rows ({error.strerror})")
        return {
            "bytes": self._bytes,
            "rows": self._rows,
            "checksum": self._checksum,
            "pending": self._pending.decode(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, elsewhere: bool = False) -> None:
        """Cut the file where the checkpoint was made, so that no row is repeated.

        Args:
            state: from `state_dict`, or of older runs the bytes alone.
            elsewhere: the checkpoint is from another folder, and rows begin here.

        Raises:
            OSError: the file cannot be changed.
        """
        self._pending = str(state.get("pending", "")).encode()
        if elsewhere:
            self._begin("of an earlier run")
            return
        head = self._file.read()[: state["bytes"]]
        if len(head) == state["bytes"] and zlib.crc32(head) == state.get("checksum", zlib.crc32(head)):
            self._file.cut(len(head))
            self._count(head)
        else:
            self._write_anew(was=state.get("rows"), up_to=self._resume_step or 0)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _look_after(self) -> None:
        """Notice that the file is not what this run has written, and write it anew.

        Raises:
            OSError: that cannot be done.
        """
        unchanged = self._file.size == self._bytes and (
            self._file.changed_at == self._changed_at or zlib.crc32(self._file.read()) == self._checksum
        )
        if not (unchanged and self._file.is_in_place()):
            self._write_anew(was=self._rows)
        self._changed_at = self._file.changed_at

    def _write_anew(self, *, was: int | None, up_to: float | int = math.inf) -> None:
        """Keep what is there aside and begin again with the rows up to a step that can be read."""
        content = self._file.read()
        if len(content) != self._bytes or zlib.crc32(content) != self._checksum:
            rows = ((line, runs.metric_row(line)) for line in content.split(b"\n"))
            content = b"".join(line + b"\n" for line, row in rows if row is not None and row["step"] <= up_to)
        aside = None
        with safe_files.replacing(self._path) as temporary:
            temporary.write_bytes(content)
            if self._path.exists() and self._path.stat().st_size:
                aside = self._set_aside()
        self._file.close()
        self._file = GrowingFile(self._path)
        self._count(content)
        kept = f"{self._rows} of {was}" if was is not None else f"{self._rows}"
        self._say(
            f"was damaged, cut, replaced or deleted by somebody else: {kept} rows are kept"
            + (f", and what was there is {aside.name}" if aside else "")
        )

    def _begin(self, whose: str) -> None:
        """Begin with no row, and keep those aside that are there."""
        if self._file.size:
            self._file.close()
            self._say(f"{whose} is kept as {self._set_aside().name}")
            self._file = GrowingFile(self._path)

    def _set_aside(self) -> Path:
        free = (self._path.with_name(f"{self._path.name}.damaged-{number}") for number in itertools.count(1))
        aside = next(path for path in free if not os.path.lexists(path))
        os.replace(self._path, aside)
        return aside

    def _count(self, content: bytes) -> None:
        self._rows, self._bytes, self._checksum = content.count(b"\n"), len(content), zlib.crc32(content)
        self._changed_at = self._file.changed_at

    def _say(self, what: str) -> None:
        self.notices.append(f"warning: {self._path} {what}")


class EventFile:
    """TensorBoard's file.

    It is written where it is logged to, not from a thread, so that a full disk is met by whoever logs.

    Attributes:
        notices: lines that the user should read. Whoever prints them empties the list.
    """

    def __init__(self, logdir: Path, *, purge_step: int) -> None:
        """Begin a file.

        Args:
            logdir: an existing folder.
            purge_step: TensorBoard hides what files before this one have at this step or later.

        Raises:
            OSError: it cannot be written.
        """
        self.notices: list[str] = []
        self._logdir = logdir
        self._failing = False
        self._file = self._begin()
        self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, summary: Summary, step: int | None) -> None:
        """Append a summary; what cannot be written is left out."""
        try:
            if not self._file.is_in_place():
                self._file.close()
                self._file = self._begin()
                self.notices.append(f"warning: TensorBoard's file in {self._logdir} is gone: another one is begun")
            self._write(Event(step=step or 0, summary=summary))
        except OSError as error:
            if not self._failing:
                self.notices.append(
                    f"warning: TensorBoard's file in {self._logdir} cannot be written ({error.strerror}): it lacks"
                    f" what is logged until it can be; {runs.METRICS} has all numbers"
                )
            self._failing = True
        else:
            self._failing = False

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _begin(self) -> GrowingFile:
        # Readers take the files of a folder in the order of their names. The end of the name is random, so that no link
        # can be put there beforehand.
        process = f"{socket.gethostname()}.{os.getpid()}.{next(_numbers):09d}.{uuid.uuid4().hex[:12]}"
        file = GrowingFile(self._logdir / f"events.out.tfevents.{int(time.time()):010d}.{process}")
        _append(file, Event(file_version=EVENT_FORMAT))
        return file

    def _write(self, event: Event) -> None:
        _append(self._file, event)


def _append(file: GrowingFile, event: Event) -> None:
    event.wall_time = time.time()
    RecordWriter(file).write(event.SerializeToString())
