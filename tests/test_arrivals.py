"""Numbers on their way to the host: who reads them waits for them and for nothing else."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch

from benchmarks.operators import PAPER, Recorder
from system import arrivals
from system.arrivals import Arrival


def test_arrival_on_a_cpu_is_there_at_once():
    arrival = Arrival(torch.tensor([1.0, 2.0]))
    assert arrival.is_there() and arrival.read() == [1.0, 2.0]
    assert Arrival(torch.tensor(3)).read() == 3


def test_arrival_from_another_device_is_there_when_its_mark_says_so(monkeypatch: pytest.MonkeyPatch):
    event = Mock(query=Mock(side_effect=[False, True]))
    monkeypatch.setattr(arrivals, "mark", lambda device: event if device == PAPER else None)
    with Recorder():
        arrival = Arrival(torch.zeros(2, device=PAPER))
    assert [arrival.is_there(), arrival.is_there()] == [False, True]
    event.synchronize.assert_not_called()
    assert arrival.read() == [0.0, 0.0]
    event.synchronize.assert_called_once_with()


def test_mark_is_recorded_on_the_stream_of_the_device_that_it_is_asked_of(monkeypatch: pytest.MonkeyPatch):
    streams = {0: "of the current device", 1: "of the agent's"}
    monkeypatch.setattr(torch.cuda, "Event", Mock)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device=None: streams[0 if device is None else device.index]
    )
    event = arrivals.mark(torch.device("cuda", 1))
    event.record.assert_called_once_with("of the agent's")
