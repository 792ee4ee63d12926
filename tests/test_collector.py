"""What a collector does by itself: it greets, brings pieces, waits where it has to, and knows when it is over."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from config import UserError
from system.sockets import Link, Spoke
from tests.test_pieces import SPACES, column
from training import collector as module
from training import messages
from training.collector import PATIENCE, Collector
from training.stopping import StopRequests

ENVS = 2


class Line(Spoke):
    """A connection on which what is to come is scripted; once it is at its end, the program is asked to stop."""

    def __init__(self, stop: StopRequests, *coming: Any) -> None:
        self.address, self.coming, self.stop = "there:1", list(coming), stop
        self.sent: list[messages.Message] = []

    def receive(self, seconds: float) -> list[bytes] | Link | None:
        if not self.coming:
            self.stop.signal = "SIGINT"
            return None
        return self.coming.pop(0)

    def send(self, frames: Sequence[bytes]) -> bool:
        self.sent.append(messages.unpack(frames))
        return True

    @property
    def kinds(self) -> list[str]:
        return [message.kind for message in self.sent]


class Agent:
    def __init__(self) -> None:
        self.layer = nn.Linear(1, 1, device="cpu")

    @property
    def acting_modules(self) -> dict[str, nn.Module]:
        return {"layer": self.layer}


class Env:
    num_envs = ENVS

    def __init__(self) -> None:
        self.notices: list[str] = []
        self.crashes: list[Any] = []

    def counters(self) -> dict[str, int]:
        return {"env_restarts": 0}


class Stepped:
    def __init__(self, stored: dict[str, Tensor]) -> None:
        self.stored = stored


class Steps:
    """Stands for a `Stepper`: episodes of two rows in each environment."""

    def __init__(self) -> None:
        self.env, self.agent, self.task, self.count = Env(), Agent(), self, 0
        self.row: dict[str, Tensor] = {}
        self.prefills: list[bool] = []

    def sequence(self, length: int) -> tuple[int, bool]:
        return 4, True

    def meet(self) -> None:
        self.row = {"time": torch.zeros(ENVS)}

    def step(self, *, prefill: bool) -> Stepped:
        flag = "FL"[self.count % 2]
        self.count += 1
        self.prefills.append(prefill)
        return Stepped(column(*[(self.count, flag)] * ENVS))


class Scene:
    """A collector, whose time passes by a second with each look at the clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *coming: Any, local: bool = False) -> None:
        self.told: list[str] = []
        self.clock = itertools.count(0.0, 1.0)
        monkeypatch.setattr(module, "tell", self.told.append)
        monkeypatch.setattr(module.time, "monotonic", lambda: next(self.clock))
        monkeypatch.setattr(module, "portable", lambda agent: agent)
        self.stop, self.steps = StopRequests(), Steps()
        self.line = Line(self.stop, *coming)
        parts: Any = self.steps
        self.collector = Collector.__new__(Collector)
        unchecked = getattr(Collector.__init__, "__wrapped__", Collector.__init__)
        unchecked(self.collector, parts, spaces=SPACES, facts={"version": 1}, spoke=self.line, name="me", local=local)

    def run(self) -> str:
        return self.collector.run(self.stop)


def welcome(**changes: Any) -> list[bytes]:
    return messages.pack(messages.WELCOME, **{"update": 3, "prefill": False, **changes})


OTHERS = messages.pack_tensors({"a": torch.ones(1)})
GO = messages.pack(messages.GO, update=4, prefill=False)


def test_collector_greets_and_steps_when_it_is_welcome(monkeypatch: pytest.MonkeyPatch):
    scene = Scene(monkeypatch, Link.MADE, None, welcome(prefill=True), None)
    assert scene.run() == "stopped by SIGINT"
    assert scene.line.sent[0].kind == messages.HELLO and scene.line.sent[0].facts == {"name": "me", "version": 1}
    assert scene.steps.prefills and all(scene.steps.prefills)
    assert scene.line.kinds[-1] == messages.BYE


def test_collector_brings_whole_pieces_with_the_update_that_acted(monkeypatch: pytest.MonkeyPatch):
    scene = Scene(monkeypatch, Link.MADE, welcome(), None)
    scene.run()
    brought = next(message for message in scene.line.sent if message.kind == messages.PIECES)
    assert brought.facts["lengths"] == [2, 2] and brought.facts["update"] == 3
    # The second row of an episode has its time for a reward.
    assert brought.facts["finished"] == [[2.0, 1]] * ENVS
    assert brought.tensors["is_first"].tolist() == [True, False] * ENVS


def test_collector_waits_for_an_answer_with_as_many_pieces_as_environments_in_hand(monkeypatch: pytest.MonkeyPatch):
    scene = Scene(monkeypatch, Link.MADE, welcome(), *[None] * 20)
    scene.run()
    # Two steps were sent, two are in hand, and then it waits.
    assert scene.steps.count == 4 and scene.line.kinds.count(messages.PIECES) == 1
    # Meanwhile it is heard of.
    assert scene.line.kinds.count(messages.BEAT) > 5
    again = Scene(monkeypatch, Link.MADE, welcome(), *[None] * 6, GO, *[None] * 20)
    again.run()
    assert again.steps.count == 6 and again.line.kinds.count(messages.PIECES) == 2


def test_collector_takes_the_weights_that_it_is_sent(monkeypatch: pytest.MonkeyPatch):
    other = nn.Linear(1, 1, device="cpu")
    weights = messages.pack_tensors(messages.weights_of({"layer": other}))
    scene = Scene(monkeypatch, Link.MADE, messages.pack(messages.WELCOME, weights, update=9, prefill=False))
    scene.run()
    assert torch.equal(scene.steps.agent.layer.weight, other.weight) and scene.collector.update == 9


def test_collector_waits_for_a_learner_that_is_gone_and_greets_it_again(monkeypatch: pytest.MonkeyPatch):
    stop = messages.pack(messages.STOP, finished=True, reason="the run has ended at step 9")
    scene = Scene(monkeypatch, Link.MADE, welcome(), Link.LOST, *[None] * 9, Link.MADE, welcome(), stop)
    assert scene.run() == "the run has ended at step 9"
    assert scene.line.kinds.count(messages.HELLO) == 2 and messages.BYE not in scene.line.kinds
    assert scene.told == ["the learner at there:1 is gone; waiting for it for 10 minutes"]
    # Meanwhile nothing is done, for which nobody would ask.
    assert scene.steps.count == 3


def test_collector_gives_a_learner_up_that_stays_away(monkeypatch: pytest.MonkeyPatch):
    scene = Scene(monkeypatch, *[None] * int(PATIENCE + 20))
    with pytest.raises(UserError, match="no learner at there:1 for 10 minutes; start it first"):
        scene.run()


@pytest.mark.parametrize("last", ["lost", "stop"])
def test_collector_of_a_learner_ends_with_it(last: str, monkeypatch: pytest.MonkeyPatch):
    stop = messages.pack(messages.STOP, finished=False, reason="the learner has stopped at step 9")
    scene = Scene(monkeypatch, Link.MADE, welcome(), Link.LOST if last == "lost" else stop, None, local=True)
    assert scene.run() == ("the learner is gone" if last == "lost" else "the learner has stopped at step 9")
    assert scene.told == []


def test_collector_of_another_host_waits_for_a_learner_that_was_stopped(monkeypatch: pytest.MonkeyPatch):
    stop = messages.pack(messages.STOP, finished=False, reason="the learner has stopped at step 9")
    scene = Scene(monkeypatch, Link.MADE, welcome(), stop, None)
    assert scene.run() == "stopped by SIGINT"
    assert "is no longer there (the learner has stopped at step 9); waiting" in scene.told[0]


@pytest.mark.parametrize(
    ("sent", "line"),
    [
        (Link.REFUSED, "has another key"),
        (messages.pack(messages.REFUSED, reason="nodes differ"), "refuses this collector: nodes differ"),
        ([b"x", b""], "sends what cannot be read"),
        (messages.pack(messages.WELCOME, update=None, prefill=True), "sends what cannot be read"),
        (
            messages.pack(messages.GO, messages.pack_tensors({"a": torch.ones(1)}), update=1, prefill=True),
            "other weights",
        ),
    ],
)
def test_collector_ends_in_one_line_where_nothing_will_come_of_it(
    sent: Any, line: str, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(UserError, match=line):
        Scene(monkeypatch, Link.MADE, sent).run()
