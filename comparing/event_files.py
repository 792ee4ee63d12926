"""Reads the scalars in TensorBoard's event files, whoever wrote them."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.util import tensor_util

from system import safe_files

# A record of an event file: its length, that number's checksum, the event, and the event's checksum.
HEADER, FOOTER = struct.Struct("<QI"), struct.Struct("<I")
# Larger ones, pictures and the like, hold no scalars, and a checksum takes a second for every four megabytes.
LARGEST_CHECKED = 2**16
# The most bytes of one event.
LARGEST_EVENT = 2**28


def scalars(files: Sequence[Path], *, name_of: Callable[[str], str]) -> tuple[list[dict[str, Any]], list[str]]:
    """The scalars of event files as rows in order of their steps, and notes on what is broken.

    Args:
        files: of one run, from the oldest on.
        name_of: the metric that a tag of TensorBoard stands for.
    """
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    begin, end, pauses = 0.0, 0.0, 0.0
    for file in files:
        events = list(_events(file, notes))
        if not events:
            continue
        if not end:
            begin = end = events[0].wall_time
        pauses += max(0.0, events[0].wall_time - end)
        end = max(end, events[-1].wall_time)
        for event in events:
            # A run that was taken up again at a checkpoint writes anew what it had logged after it.
            if event.session_log.status == SessionLog.START:
                rows = [row for row in rows if row["step"] < event.step]
            try:
                values = {
                    name_of(value.tag): number
                    for value in event.summary.value
                    if (number := _scalar(value)) is not None
                }
            except (TypeError, ValueError) as error:
                notes.append(f"{file.name} is broken at step {event.step} ({_first_line(error)})")
                continue
            if values:
                rows.append({**values, "step": event.step, "seconds": event.wall_time - begin - pauses})
    rows.sort(key=lambda row: row["step"])
    return rows, notes if rows or notes else ["its event files hold no scalars"] if files else []


def _events(file: Path, notes: list[str]) -> Iterator[Event]:
    """The events of a file up to the first broken one, which is noted."""
    try:
        with safe_files.open_to_read(file) as content:
            place = 0
            while header := content.read(HEADER.size):
                try:
                    event, size = _event(header, content)
                except (DecodeError, struct.error):
                    notes.append(f"{file.name} is broken from byte {place} on")
                    return
                place += size
                yield event
    except OSError as error:
        notes.append(f"{file.name} cannot be read ({error.strerror})")


def _event(header: bytes, content: BinaryIO) -> tuple[Event, int]:
    """The event behind a header, and the bytes that its record takes.

    Raises:
        DecodeError, struct.error: it is broken, or the file ends before it does.
    """
    (length, _) = HEADER.unpack(header)
    # A damaged length may be huge, and must not be read.
    record = content.read(min(length, LARGEST_EVENT))
    (checksum,) = FOOTER.unpack(content.read(FOOTER.size))
    if len(record) < length or (length <= LARGEST_CHECKED and masked_crc32c(record) != checksum):
        raise DecodeError
    event = Event.FromString(record)
    if not math.isfinite(event.wall_time):
        raise DecodeError
    return event, HEADER.size + length + FOOTER.size


def _scalar(value: Summary.Value) -> float | None:
    """The number in either of the two forms that writers use; None for pictures, text and the like.

    Raises:
        TypeError, ValueError: it is a tensor that contradicts itself.
    """
    kind = value.WhichOneof("value")
    if kind == "simple_value":
        return value.simple_value
    is_one = math.prod(dim.size for dim in value.tensor.tensor_shape.dim) == 1
    if kind == "tensor" and is_one and not value.tensor.string_val:
        array = tensor_util.make_ndarray(value.tensor)
        if array.dtype.kind in "iuf":
            return float(array.reshape(()))
    return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
