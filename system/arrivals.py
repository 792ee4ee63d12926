"""A few numbers on their way from a device to the host, which goes on meanwhile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Arrival:
    """A small tensor that the host will read: at once on a CPU, and once it has come from another device.

    Work that the device is given after the copy delays neither of the two.
    """

    def __init__(self, values: Tensor) -> None:
        """Send them off."""
        # On the way to the host such a copy goes to pinned memory, without which the host would wait for its end.
        self._values = values if values.device.type == "cpu" else values.to("cpu", non_blocking=True)
        self._mark = None if values.device.type == "cpu" else mark(values.device)

    @property
    def is_immediate(self) -> bool:
        """Whether the values are there from the beginning."""
        return self._mark is None

    def is_there(self) -> bool:
        """Whether the values can be read without waiting."""
        return self._mark is None or self._mark.query()

    def read(self) -> Any:
        """The values as numbers, in lists as deep as the tensor; waits until they are there, and for nothing else."""
        if self._mark is not None:
            self._mark.synchronize()
        return self._values.tolist()


def mark(device: torch.device) -> Any:
    """An event at the end of what `device` has been asked to do so far, that says when it has come there.

    The stream is named: an event that is recorded without one marks whatever device is the current one.
    """
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
