"""The collectors that a learner asks for: what the command line says of them, and the company that comes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from config import CommandLine, Config, ConfigError
from system.ranks import Ranks
from system.sockets import Hub, kept_key, new_key, parts_of
from training import messages
from training.agent import Portable
from training.collector import KEY_FILE, longest_piece
from training.gatherer import Gatherer
from training.helpers import Helpers
from training.messages import facts_of
from training.ring import Spaces

COLLECTORS, LISTEN = "collectors", "listen"
MOST = 1024
HERE, EVERYWHERE = "127.0.0.1", ("0.0.0.0", "*")
# What takes environments of the learner's own, with its other value.
OWN = {"curriculum": (), "log_regret": False, "eval_env": "own", "replay": "", "trips": ""}


class Company(NamedTuple):
    """Who is there: the learner's end of all collectors, and those on its own machine."""

    gatherer: Gatherer
    helpers: Helpers


class Invitation(NamedTuple):
    """The collectors that a learner asks for.

    Attributes:
        number: how many are started on its machine.
        listen: HOST:PORT where others may come; None where none may.
        target: what one on this machine does, with the address, its number and the key.
    """

    number: int
    listen: str | None
    target: Callable[..., None]

    @property
    def lines(self) -> list[str]:
        """What a run says of them before it begins."""
        found = [f"{self.number} on this machine"] if self.number else []
        if self.listen is not None:
            found.append(f"others at {self.listen}, by --collect HOST:PORT --key FILE; the key is logdir/{KEY_FILE}")
        return found

    @contextmanager
    def opened(self, agent: Portable, config: Config, *, task: Any, spaces: Spaces, logdir: Path) -> Iterator[Company]:
        """Let collectors come; at the end all on this machine are ended, and the port is free again.

        Args:
            agent: learns.
            config: of the run.
            task: what is to be solved.
            spaces: of all that a row has.
            logdir: of the run.

        Raises:
            ConfigError: it cannot listen there.
        """
        key = new_key() if self.listen is None else kept_key(logdir / KEY_FILE)
        with closing(Hub(self.listen or f"{HERE}:0", key=key)) as hub:
            gatherer = Gatherer(
                hub,
                facts=facts_of(config, spaces, agent=agent),
                spaces=spaces,
                longest=longest_piece(task),
                modules=agent.acting_modules,
            )
            host = HERE if self.listen is None else parts_of(self.listen)[0]
            address = f"{HERE if host in EVERYWHERE else host}:{hub.port}"
            others = self.listen is not None
            target = partial(self.target, key=key)
            with closing(Helpers(self.number, target=target, address=address, others=others)) as helpers:
                yield Company(gatherer, helpers)


def invitation(command: CommandLine, ranks: Ranks, *, target: Callable[..., None]) -> Invitation | None:
    """The collectors that a command line asks for; None where it asks for none.

    Args:
        command: the command line.
        ranks: of the run.
        target: see `Invitation`.

    Raises:
        ConfigError: what it asks for cannot be, or needs packages that are missing.
    """
    asked, listen = command.entry.get(COLLECTORS), command.entry.get(LISTEN)
    if asked is None and listen is None:
        return None
    number = int(asked) if asked is not None and asked.isdecimal() and len(asked) < 5 else -1
    if asked is None:
        number = 0
    elif not 0 <= number <= MOST:
        raise ConfigError(f"--collectors is {asked}; it takes a number from 0 to {MOST}")
    if not number and listen is None:
        raise ConfigError("--collectors is 0, so that nobody collects; give more, or --listen HOST:PORT for others")
    if listen is not None:
        parts_of(listen)
    messages.require_packages()
    if ranks.count > 1:
        raise ConfigError(
            "ranks step their own environments; leave --collectors and --listen out, or start without torchrun"
        )
    for name, value in OWN.items():
        if command.config[name] != value:
            raise ConfigError(f"{name} is {command.config[name]!r}; collectors need it at {value!r}")
    return Invitation(number, listen, target)
