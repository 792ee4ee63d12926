"""The learner's end of its collectors: who is there, what they bring, and what they get for it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from system.sockets import Hub
from system.terminal import one_line
from training import messages
from training.messages import Message, MessageFault
from training.pieces import Finished, Origin, fault_of, split
from training.ring import Spaces

# Seconds: after which a silent collector counts as lost, between two looks at who has gone, between two lines about
# waiting for somebody, and between two times that a collector gets new weights.
QUIET, LOOK, REMIND, REFRESH = 30.0, 1.0, 60.0, 1.0
LONGEST_NAME = 60


@dataclass
class Peer:
    """A collector that was taken in.

    Attributes:
        name: for the log and its lines.
        heard: when it was heard last.
        update: whose weights it has.
        refreshed: when it got them.
        waits: whether it has brought something and may not yet bring more.
        silent: whether it counts as lost until it is heard again.
        counters: what has gone wrong in its environments so far.
    """

    name: str
    heard: float
    update: int = -1
    refreshed: float = -1e9
    waits: bool = False
    silent: bool = False
    counters: dict[str, int] = field(default_factory=dict)


class Brought(NamedTuple):
    """What a collector has brought.

    Attributes:
        origin: whose it is, and the update whose weights acted last.
        pieces: of episodes.
        finished: episodes that have ended.
    """

    origin: Origin
    pieces: list[dict[str, Tensor]]
    finished: list[Finished]


class Gatherer:
    """Takes collectors in, takes what they bring, and gives them weights.

    Attributes:
        hub: where they come to.
        lost: how many times one was lost.
        notices: lines that the user should read. Whoever prints them empties the list.
    """

    def __init__(
        self,
        hub: Hub,
        *,
        facts: Mapping[str, Any],
        spaces: Spaces,
        longest: int,
        modules: Mapping[str, nn.Module],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Wait for collectors.

        Args:
            hub: where they come to.
            facts: what they must have in common with the learner; see `messages.facts_of`.
            spaces: of all that a row has.
            longest: rows of the longest piece.
            modules: what they act by.
            clock: seconds.
        """
        self.hub, self.lost = hub, 0
        self.notices: list[str] = []
        self._facts, self._spaces, self._longest, self._modules = facts, spaces, longest, modules
        self._clock = clock
        self._peers: dict[bytes, Peer] = {}
        self._weights: tuple[int, bytes] = (-1, b"")
        self._looked = self._reminded = clock()

    def __len__(self) -> int:
        """How many collectors there are that have been heard of lately."""
        return sum(not peer.silent for peer in self._peers.values())

    @property
    def counters(self) -> dict[str, int]:
        """What has gone wrong in the environments of all that are there."""
        total: dict[str, int] = {}
        for peer in self._peers.values():
            for name, count in peer.counters.items():
                total[name] = total.get(name, 0) + count
        return total

    def poll(self, seconds: float, *, update: int, prefill: bool) -> list[Brought]:
        """Take in all that has come, or wait so long for the first of it.

        Args:
            seconds: how long.
            update: how many updates there were.
            prefill: whether replay is still filled by `prefill_policy`.
        """
        brought = []
        wait = seconds
        while (arrived := self.hub.receive(wait)) is not None:
            wait = 0.0
            sender, frames = arrived
            try:
                message = messages.unpack(frames)
                if message.kind == messages.HELLO:
                    self._greet(sender, message, update=update, prefill=prefill)
                elif sender in self._peers:
                    brought += self._hear(sender, message)
            except MessageFault as fault:
                peer = self._peers.pop(sender, None)
                self._refuse(sender, "" if peer is None else peer.name, f"a message {fault}")
        self._look()
        return brought

    def _greet(self, sender: bytes, message: Message, *, update: int, prefill: bool) -> None:
        # Who comes again, or in the place of one that is gone, has the same name.
        self._peers.pop(sender, None)
        self._miss_gone()
        name = self._named(message.facts.get("name"))
        if reason := messages.difference_of(self._facts, message.facts):
            self._refuse(sender, name, reason)
            return
        peer = Peer(name, heard=self._clock())
        self._peers[sender] = peer
        self.notices.append(f"collector {name} has come; there {_are(len(self))}")
        self._answer(sender, peer, messages.WELCOME, update=update, prefill=prefill)

    def _named(self, wish: Any) -> str:
        """A name that no other has."""
        name = one_line(str(wish or "collector"))[:LONGEST_NAME]
        taken = {peer.name for peer in self._peers.values()}
        others = (f"{name}-{number}" for number in itertools.count(2))
        return next(each for each in itertools.chain([name], others) if each not in taken)

    def _refuse(self, sender: bytes, name: str, reason: str) -> None:
        self.hub.send(sender, messages.pack(messages.REFUSED, reason=reason))
        self.notices.append(f"a collector{name and ' '}{name} is refused: {one_line(reason)}")

    def _hear(self, sender: bytes, message: Message) -> list[Brought]:
        peer = self._peers[sender]
        peer.heard = self._clock()
        if peer.silent:
            peer.silent = False
            self.notices.append(f"collector {peer.name} is back")
        if message.kind == messages.BYE:
            del self._peers[sender]
            self._miss(f"collector {peer.name} has ended ({one_line(str(message.facts.get('reason', '')))})")
        if message.kind != messages.PIECES:
            return []
        peer.waits = True
        try:
            return [self._opened(peer, message)]
        except (LookupError, TypeError, ValueError) as error:
            raise MessageFault(f"cannot be read ({type(error).__name__}: {error})") from error

    def _opened(self, peer: Peer, message: Message) -> Brought:
        """What a message of pieces holds, which is checked."""
        facts, rows = message.facts, message.tensors
        lengths = [int(length) for length in facts["lengths"]]
        total = sum(lengths)
        given = {name: (tuple(value.shape), value.dtype) for name, value in rows.items()}
        needed = {name: ((total, *shape), dtype) for name, (shape, dtype) in self._spaces.items()}
        if given != needed:
            raise MessageFault("has other rows than its collector said")
        pieces = split(rows, lengths)
        if fault := next(filter(None, (fault_of(piece, longest=self._longest) for piece in pieces)), None):
            raise MessageFault(f"has a piece that {fault}")
        for line in facts["notices"]:
            self.notices.append(f"collector {peer.name}: {one_line(str(line))}")
        peer.counters = {str(name): int(count) for name, count in facts["counters"].items()}
        finished = [Finished(float(returned), int(length)) for returned, length in facts["finished"]]
        return Brought(Origin(peer.name, int(facts["update"])), pieces, finished)

    def release(self, *, update: int, prefill: bool) -> None:
        """Let those that wait bring more."""
        for sender, peer in [*self._peers.items()]:
            if peer.waits and self._answer(sender, peer, messages.GO, update=update, prefill=prefill):
                peer.waits = False

    def _answer(self, sender: bytes, peer: Peer, kind: str, *, update: int, prefill: bool) -> bool:
        """Let a collector go on, with new weights where it is time. Whether that could be sent."""
        now, weights, version = self._clock(), b"", peer.update
        if update != peer.update and now - peer.refreshed >= REFRESH:
            if self._weights[0] != update:
                self._weights = update, messages.pack_tensors(messages.weights_of(self._modules))
            version, weights = self._weights
        if not self.hub.send(sender, messages.pack(kind, weights, update=version, prefill=prefill)):
            return False
        if weights:
            peer.update, peer.refreshed = version, now
        return True

    def _look(self) -> None:
        """Now and then, see who has gone."""
        now = self._clock()
        if now - self._looked < LOOK:
            return
        self._looked = now
        self._miss_gone()
        for peer in self._peers.values():
            if not peer.silent and now - peer.heard > QUIET:
                peer.silent = True
                self._miss(f"collector {peer.name} has not been heard of for {QUIET:g} s")
        if len(self):
            self._reminded = now

    def _miss_gone(self) -> None:
        """Forget those that are not connected any more."""
        for sender, peer in [*self._peers.items()]:
            if not self.hub.reaches(sender):
                del self._peers[sender]
                if not peer.silent:
                    self._miss(f"collector {peer.name} is gone")

    def _miss(self, line: str) -> None:
        self.lost += 1
        self.notices.append(f"warning: {line}; the run goes on, and there {_are(len(self))}")

    def is_time_to_remind(self) -> bool:
        """Whether nobody has been there for so long that it is worth a line, again."""
        now = self._clock()
        if len(self) or now - self._reminded < REMIND:
            return False
        self._reminded = now
        return True

    def dismiss(self, *, finished: bool, reason: str) -> None:
        """Tell all that nothing more is needed: for good, or until the run goes on.

        Args:
            finished: whether it is for good.
            reason: what they should say.
        """
        for sender in self._peers:
            self.hub.send(sender, messages.pack(messages.STOP, finished=finished, reason=reason))
        self._peers.clear()


def _are(count: int) -> str:
    return "is 1" if count == 1 else f"are {count or 'none'}"
