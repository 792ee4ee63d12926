"""What a learner and its collectors send one another, and what the learner makes of those that are no good or gone."""

from __future__ import annotations

import os
import pickle
import re
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
from torch import Tensor, nn

from config import ConfigError
from system import sockets
from system.sockets import Hub, Link, Spoke
from tests.scenes import debug_config
from tests.test_pieces import SPACES, column
from training import messages
from training.gatherer import QUIET, REFRESH, Gatherer
from training.messages import MessageFault

KEY = "Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID"


@pytest.fixture
def hub() -> Iterator[Hub]:
    found = Hub("127.0.0.1:0", key=KEY)
    yield found
    found.close()


def spoke_of(hub: Hub, *, key: str = KEY, name: bytes = b"one") -> Spoke:
    return Spoke(f"127.0.0.1:{hub.port}", key=key, name=name)


def test_messages_reach_both_ends(hub: Hub):
    spoke = spoke_of(hub)
    assert spoke.receive(5.0) is Link.MADE
    assert spoke.send([b"a", b""]) and hub.receive(5.0) == (b"one", [b"a", b""])
    # What only asks whether somebody is there is no message.
    assert hub.reaches(b"one") and not hub.reaches(b"other")
    assert hub.send(b"one", [b"b", b"c"]) and spoke.receive(5.0) == [b"b", b"c"]
    assert spoke.receive(0.0) is None
    spoke.close()
    begin = time.monotonic()
    while hub.reaches(b"one"):
        assert time.monotonic() - begin < 5
    assert not hub.send(b"one", [b"d"])


def test_link_is_lost_and_found_again(hub: Hub):
    spoke, port = spoke_of(hub), hub.port
    assert spoke.receive(5.0) is Link.MADE
    hub.close()
    assert spoke.receive(5.0) is Link.LOST
    assert not spoke.send([b"a"])
    again = Hub(f"127.0.0.1:{port}", key=KEY)
    assert spoke.receive(10.0) is Link.MADE
    spoke.close()
    again.close()
    hub.__init__("127.0.0.1:0", key=KEY)  # type: ignore[misc]


def test_another_key_is_refused(hub: Hub):
    spoke = spoke_of(hub, key=sockets.new_key())
    begin, found = time.monotonic(), None
    while found is not Link.REFUSED and time.monotonic() - begin < 10:
        found = spoke.receive(1.0)
        assert found is not Link.MADE
    spoke.close()
    assert found is Link.REFUSED and hub.receive(0.0) is None


@pytest.mark.parametrize("knows", ["all", "the public part"])
def test_public_part_of_the_key_is_not_enough(hub: Hub, knows: str):
    public = zmq.curve_public(KEY.encode())
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        own = (public, KEY.encode()) if knows == "all" else zmq.curve_keypair()
        stranger.curve_publickey, stranger.curve_secretkey = own
        stranger.curve_serverkey, stranger.linger = public, 0
        stranger.connect(f"tcp://127.0.0.1:{hub.port}")
        stranger.send(b"let me in")
        arrived = hub.receive(5.0 if knows == "all" else 0.5)
    assert (arrived is not None) == (knows == "all")


def test_key_is_kept_for_its_owner_alone(tmp_path: Path):
    path = tmp_path / "key"
    key = sockets.kept_key(path)
    assert sockets.kept_key(path) == sockets.read_key(path) == key
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600 and [*tmp_path.iterdir()] == [path]
    path.write_text("nothing of the kind")
    with pytest.raises(ConfigError, match="holds no key; copy"):
        sockets.read_key(path)
    with pytest.raises(ConfigError, match="cannot read the key .*No such file"):
        sockets.read_key(tmp_path / "other")


@pytest.mark.parametrize("address", ["host", "host:", ":80", "host:x", "host:99999"])
def test_address_without_host_and_port_is_refused(address: str):
    with pytest.raises(ConfigError, match="is no HOST:PORT"):
        sockets.parts_of(address)


def test_port_that_is_taken_is_refused(hub: Hub):
    with pytest.raises(ConfigError, match=f"cannot listen at 127.0.0.1:{hub.port} .*give another --listen"):
        Hub(f"127.0.0.1:{hub.port}", key=KEY)


def test_message_comes_out_as_it_went_in():
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.tensor([True]),
        "c": torch.zeros((0, 2), dtype=torch.uint8),
    }
    message = messages.unpack(messages.pack("pieces", messages.pack_tensors(tensors), lengths=[1, 2], notices=["x"]))
    assert message.kind == "pieces" and message.facts == {"lengths": [1, 2], "notices": ["x"]}
    assert message.tensors.keys() == tensors.keys()
    assert all(torch.equal(message.tensors[name], value) for name, value in tensors.items())


class Harmful:
    def __reduce__(self) -> Any:
        return os.abort, ()


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b"{}"],
        [b"{}", b""],
        [b"[1]", b""],
        [b'{"kind": 1}', b""],
        [b"[" * 100_000, b""],
        [pickle.dumps(Harmful()), b""],
        [b'{"kind": "go"}', pickle.dumps(Harmful())],
        [b'{"kind": "go"}', messages.pack_tensors({"a": torch.ones(9)})[:-1]],
        [b"\xff", b""],
    ],
)
def test_message_of_others_is_refused_and_nothing_in_it_is_run(frames: list[bytes]):
    with pytest.raises(MessageFault):
        messages.unpack(frames)


class Someone:
    pass


CONFIG = debug_config()


def facts(**changes: Any) -> dict[str, Any]:
    return messages.facts_of(CONFIG.replace(**changes), SPACES, agent=Someone())


def test_collector_may_differ_in_what_it_does_not_read():
    other = facts(
        seed=3, envs=64, logdir="elsewhere", device="cuda", steps=7, eval_every=3, env_processes=True, threads=9
    )
    assert messages.difference_of(facts(), other) is None


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (facts(nodes=7), "the learner has nodes 6, the collector 7"),
        (facts(reward_scale=2.0), "the learner has reward_scale 1.0, the collector 2.0"),
        ({**facts(), "version": 99}, "version 1, the collector 99"),
        ({**facts(), "agent": "SAC"}, "trains a Someone, and the collector is started for a SAC"),
        ({**facts(), "rows": {**facts()["rows"], "time": [[2], "torch.int64"]}}, "time is .*int64.* for the learner"),
        ({**facts(), "settings": None}, "does not tell its settings"),
        ({}, "version 1, the collector None"),
    ],
)
def test_collector_of_another_kind_is_told_why_it_is_refused(other: dict[str, Any], reason: str):
    assert re.search(reason, messages.difference_of(facts(), other) or "")


def test_weights_of_other_modules_are_refused():
    layer, other = nn.Linear(2, 3, device="cpu"), nn.Linear(2, 3, device="cpu")
    messages.take_weights({"a": other}, messages.weights_of({"a": layer}))
    assert torch.equal(layer.weight, other.weight) and torch.equal(layer.bias, other.bias)
    for strange in ({"b": layer}, {"a": nn.Linear(2, 4, device="cpu")}):
        with pytest.raises(MessageFault, match="other weights"):
            messages.take_weights({"a": other}, messages.weights_of(strange))
    assert torch.equal(layer.weight, other.weight)


class Exchange(Hub):
    """A hub without a network: what comes is put into `arriving`, and `sent` is what went to whom."""

    def __init__(self) -> None:
        self.port = 0
        self.arriving: list[tuple[bytes, list[bytes]]] = []
        self.sent: list[tuple[bytes, messages.Message]] = []
        self.gone: set[bytes] = set()

    def receive(self, seconds: float) -> tuple[bytes, list[bytes]] | None:
        return self.arriving.pop(0) if self.arriving else None

    def send(self, name: bytes, frames: Sequence[bytes]) -> bool:
        if name in self.gone:
            return False
        self.sent.append((name, messages.unpack(frames)))
        return True

    def reaches(self, name: bytes) -> bool:
        return name not in self.gone


class Scene:
    """A gatherer, time that passes when it is told to, and collectors that say what they are told to."""

    def __init__(self) -> None:
        self.now, self.exchange = 0.0, Exchange()
        self.layer = nn.Linear(1, 1, device="cpu")
        self.gatherer = Gatherer(
            self.exchange,
            facts=facts(),
            spaces=SPACES,
            longest=4,
            modules={"layer": self.layer},
            clock=lambda: self.now,
        )

    def hear(self, *said: tuple[bytes, list[bytes]], update: int = 0) -> list[Any]:
        self.exchange.arriving += said
        self.exchange.sent.clear()
        return self.gatherer.poll(0.0, update=update, prefill=False)

    def lines(self) -> list[str]:
        found = list(self.gatherer.notices)
        self.gatherer.notices.clear()
        return found


def hello(name: str = "one") -> list[bytes]:
    return messages.pack(messages.HELLO, name=name, **facts())


def piece(flags: str = "F.L") -> dict[str, Tensor]:
    rows = [column((time, flag)) for time, flag in enumerate(flags)]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def pieces(*found: dict[str, Tensor], **changes: Any) -> list[bytes]:
    rows = {name: torch.cat([each[name] for each in found]) for name in found[0]}
    given = {"lengths": [len(each["time"]) for each in found], "finished": [[3.0, 2]], "update": 5}
    given = {**given, "notices": [], "counters": {"env_restarts": 1}, **changes}
    return messages.pack(messages.PIECES, messages.pack_tensors(rows), **given)


BEAT = messages.pack(messages.BEAT)


def test_gatherer_takes_what_a_collector_brings():
    scene = Scene()
    (brought,) = scene.hear((b"a", hello()), (b"a", pieces(piece(), piece("FL"), notices=["look\nhere"])))
    assert brought.origin.name == "one" and brought.origin.update == 5
    assert [each["time"].tolist() for each in brought.pieces] == [[0, 1, 2], [0, 1]]
    assert brought.finished == [(3.0, 2)] and scene.gatherer.counters == {"env_restarts": 1}
    assert scene.lines() == ["collector one has come; there is 1", "collector one: look here"]
    (_, welcome) = scene.exchange.sent[0]
    assert welcome.kind == messages.WELCOME and torch.equal(welcome.tensors["layer.weight"], scene.layer.weight)


def test_gatherer_lets_a_collector_go_on_when_it_is_told_to():
    scene = Scene()
    scene.hear((b"a", hello()), (b"a", pieces(piece())))
    scene.exchange.sent.clear()
    assert scene.exchange.sent == []
    scene.gatherer.release(update=0, prefill=True)
    ((name, message),) = scene.exchange.sent
    assert (name, message.kind, message.facts) == (b"a", messages.GO, {"update": 0, "prefill": True})
    scene.gatherer.release(update=0, prefill=True)
    assert len(scene.exchange.sent) == 1


def test_gatherer_sends_new_weights_now_and_then():
    scene = Scene()
    scene.hear((b"a", hello()))

    def answer(update: int, after: float) -> messages.Message:
        scene.now += after
        scene.hear((b"a", pieces(piece())), update=update)
        scene.gatherer.release(update=update, prefill=False)
        return scene.exchange.sent[-1][1]

    too_early, in_time, unchanged = answer(3, REFRESH / 2), answer(4, REFRESH), answer(4, 9 * REFRESH)
    assert not too_early.tensors and too_early.facts["update"] == 0
    assert in_time.tensors and in_time.facts["update"] == 4
    assert not unchanged.tensors and unchanged.facts["update"] == 4


def test_gatherer_refuses_who_does_not_fit():
    scene = Scene()
    other = messages.pack(messages.HELLO, name="far", **{**facts(), "version": 99})
    assert scene.hear((b"a", other), (b"a", pieces(piece()))) == []
    ((_, answer),) = scene.exchange.sent
    assert answer.kind == messages.REFUSED and "version 1" in answer.facts["reason"]
    assert len(scene.gatherer) == 0 and scene.lines()[0].startswith("a collector far is refused: the learner has")


@pytest.mark.parametrize(
    "bad",
    [
        [b"x", b""],
        pieces(piece("FFL")),
        pieces(piece(), lengths=[2]),
        pieces(piece(), lengths=[1, 1, 1]),
        pieces(piece("F...L")),
        pieces({**piece(), "more": torch.zeros(3)}),
        pieces({**piece(), "reward": torch.zeros(3).double()}),
        pieces(piece(), finished=[1]),
        pieces(piece(), update=None),
    ],
)
def test_gatherer_takes_nothing_more_from_who_brings_what_is_none(bad: list[bytes]):
    scene = Scene()
    assert scene.hear((b"a", hello()), (b"a", bad), (b"a", pieces(piece()))) == []
    assert scene.exchange.sent[-1][1].kind == messages.REFUSED and len(scene.gatherer) == 0
    assert len(scene.lines()) == 2


def test_gatherer_tells_once_of_who_is_silent_and_when_he_is_back():
    scene = Scene()
    scene.hear((b"a", hello("one")), (b"b", hello("two")))
    scene.lines()
    for _ in range(4):
        scene.now += QUIET / 3
        scene.hear((b"b", BEAT))
    assert scene.lines() == ["warning: collector one has not been heard of for 30 s; the run goes on, and there is 1"]
    assert scene.gatherer.lost == 1
    scene.hear((b"a", BEAT))
    assert scene.lines() == ["collector one is back"] and len(scene.gatherer) == 2


def test_gatherer_notices_who_is_gone():
    scene = Scene()
    scene.hear((b"a", hello("one")))
    scene.exchange.gone.add(b"a")
    scene.now += 2
    scene.lines()
    scene.hear()
    assert scene.lines() == ["warning: collector one is gone; the run goes on, and there are none"]
    # Who comes again is another, of the same name.
    scene.hear((b"c", hello("one")), (b"d", hello("one")))
    assert scene.lines() == ["collector one has come; there is 1", "collector one-2 has come; there are 2"]


def test_gatherer_knows_who_comes_again_or_in_the_place_of_one_that_is_gone():
    scene = Scene()
    scene.hear((b"a", hello("one")), (b"a", hello("one")))
    assert len(scene.gatherer) == 1 and scene.lines() == ["collector one has come; there is 1"] * 2
    scene.exchange.gone.add(b"a")
    scene.hear((b"b", hello("one")))
    gone, come = scene.lines()
    assert gone.startswith("warning: collector one is gone") and come == "collector one has come; there is 1"


def test_gatherer_reminds_now_and_then_that_nobody_is_there():
    scene = Scene()
    found = []
    for _ in range(5):
        scene.now += 31
        scene.hear()
        found.append(scene.gatherer.is_time_to_remind())
    assert found == [False, True, False, True, False]
