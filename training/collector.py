"""A collector: it steps environments for a learner elsewhere, and acts by the weights that this sends."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from config import CommandLine, Config, ConfigError, UserError
from envs.crashes import EnvironmentCrashed
from guard import Guard
from settings.run import RunSettings
from system.processes import end_with_parent, leave_interrupts
from system.sockets import Link, Spoke, read_key
from system.terminal import one_line_errors, tell
from training import messages
from training.agent import AgentClass, Portable
from training.devices import make_generators, prepare_torch
from training.messages import MessageFault
from training.pieces import LONGEST, Cutter, joined
from training.ring import REWARD_AND_ENDS, Spaces
from training.setup import Setup, require_players, require_task, telling_of_crashes
from training.stepping import Stepper
from training.stopping import StopRequests

KEY_FILE = "collectors.key"
# Seconds between two signs of life, the least between two messages with pieces, and what it waits for a message where
# there is nothing else to do.
BEAT_EVERY, FLUSH, IDLE = 1.0, 0.2, 0.2
# Seconds that a learner which is gone is waited for.
PATIENCE = 600.0


class Collector:
    """Environments, an agent that acts in them, and the connection to who learns from that."""

    def __init__(
        self, stepper: Stepper, *, spaces: Spaces, facts: dict[str, Any], spoke: Spoke, name: str, local: bool
    ) -> None:
        """Take the parts together; `run` begins.

        Args:
            stepper: acts.
            spaces: of all that a row has.
            facts: what it must have in common with the learner; see `messages.facts_of`.
            spoke: leads to the learner.
            name: for the learner's log.
            local: whether the learner has started it, and takes it along wherever it goes.
        """
        self.stepper, self.spoke, self.name, self.local = stepper, spoke, name, local
        self.modules = portable(stepper.agent).acting_modules
        self.facts = facts
        self.cutter = Cutter(spaces, num_envs=stepper.env.num_envs, longest=longest_piece(stepper.task))
        self.pieces: list[dict[str, torch.Tensor]] = []
        self.update, self.prefill = 0, True
        # Whether a learner has taken it in, and whether that has answered what it was sent last.
        self.welcome = self.answered = False
        self.over: str | None = None
        self.sent = self.flushed = self.alone_since = time.monotonic()

    def run(self, stop: StopRequests) -> str:
        """Collect until the learner needs no more; why that is.

        Raises:
            UserError: the learner refuses this collector, or stays away; or as environments do.
            EnvironmentCrashed: an environment crashed too often.
        """
        try:
            while self.over is None and stop.signal is None:
                self._hear(0.0 if self.welcome and not self._blocked else IDLE)
                if not self.welcome:
                    self._wait()
                elif not self._blocked:
                    self._step()
                if self.welcome:
                    self._send()
        except (UserError, EnvironmentCrashed) as error:
            self._leave(str(error))
            raise
        if self.over is None:
            self.over = f"stopped by {stop.signal}"
            # Whoever stops the learner stops those that it has started, too.
            if not self.local:
                self._leave(self.over)
        return self.over

    @property
    def _blocked(self) -> bool:
        """Whether there is as much in hand as there are environments, which the learner has to take first."""
        return not self.answered and len(self.pieces) >= self.stepper.env.num_envs

    def _wait(self) -> None:
        if time.monotonic() - self.alone_since > PATIENCE:
            raise UserError(f"no learner at {self.spoke.address} for {PATIENCE / 60:g} minutes; start it first")

    def _step(self) -> None:
        """One step of every environment."""
        if not self.stepper.row:
            self.stepper.meet()
        self.pieces += self.cutter.add(self.stepper.step(prefill=self.prefill).stored)

    def _send(self) -> None:
        """Send what there is, if it is time and allowed, or a sign of life."""
        now, env = time.monotonic(), self.stepper.env
        if self.pieces and self.answered and now - self.flushed >= FLUSH:
            rows = messages.pack_tensors(joined(self.pieces))
            sent = self.spoke.send(
                messages.pack(
                    messages.PIECES,
                    rows,
                    lengths=[len(piece["is_last"]) for piece in self.pieces],
                    finished=self.cutter.finished,
                    update=self.update,
                    notices=env.notices,
                    counters=env.counters(),
                )
            )
            if sent:
                self.pieces, self.answered = [], False
                self.cutter.finished, self.sent, self.flushed = [], now, now
                for crash in env.crashes:
                    tell(crash.trace.rstrip())
                env.notices.clear()
                env.crashes.clear()
        elif now - self.sent >= BEAT_EVERY:
            self.spoke.send(messages.pack(messages.BEAT))
            self.sent = now

    def _leave(self, reason: str) -> None:
        if self.welcome:
            self.spoke.send(messages.pack(messages.BYE, reason=reason))

    def _hear(self, seconds: float) -> None:
        """Do what the learner says, or what the connection needs."""
        heard = self.spoke.receive(seconds)
        if heard is Link.MADE:
            self.spoke.send(messages.pack(messages.HELLO, name=self.name, **self.facts))
        elif heard is Link.REFUSED:
            raise ConfigError(f"the learner at {self.spoke.address} has another key; give its own with --key FILE")
        elif heard is Link.LOST:
            self._lose("is gone")
        elif heard is not None:
            assert not isinstance(heard, Link)
            try:
                self._obey(messages.unpack(heard))
            except (MessageFault, LookupError, TypeError, ValueError) as error:
                if isinstance(error, UserError):
                    raise
                raise UserError(f"the learner at {self.spoke.address} sends what cannot be read ({error})") from error

    def _obey(self, message: messages.Message) -> None:
        facts = message.facts
        if message.kind == messages.REFUSED:
            raise ConfigError(f"the learner at {self.spoke.address} refuses this collector: {facts['reason']}")
        if message.kind == messages.STOP:
            if facts["finished"] or self.local:
                self.over = str(facts["reason"])
            else:
                self._lose(f"is no longer there ({facts['reason']})")
        if message.kind in (messages.WELCOME, messages.GO):
            if message.tensors:
                messages.take_weights(self.modules, message.tensors)
            self.update, self.prefill = int(facts["update"]), bool(facts["prefill"])
            self.welcome = self.answered = True

    def _lose(self, how: str) -> None:
        """Wait for a learner that is not there any more."""
        if not self.welcome:
            return
        if self.local:
            self.over = f"the learner {how}"
            return
        self.welcome, self.alone_since = False, time.monotonic()
        tell(f"the learner at {self.spoke.address} {how}; waiting for it for {PATIENCE / 60:g} minutes")


def longest_piece(task: Any) -> int:
    """The most rows of a piece: those of a whole episode, where none may be cut."""
    return int(task.sequence(LONGEST)[0])


def portable(agent: Any) -> Portable:
    """The agent, for which other processes can act.

    Raises:
        ConfigError: they cannot.
    """
    if not isinstance(agent, Portable):
        raise ConfigError(f"nobody acts for a {type(agent).__name__} elsewhere; leave the flags of collectors out")
    return agent


def collect(
    command: CommandLine,
    *,
    make_agent: AgentClass,
    make_setup: Callable[[Config, torch.device], Setup],
    address: str,
    key: str,
    name: str,
    local: bool,
) -> str:
    """Be a collector until the learner needs no more; why that is.

    Args:
        command: of the learner, but for what may differ.
        make_agent: as for `launch.train`.
        make_setup: likewise.
        address: HOST:PORT of the learner.
        key: the learner's.
        name: for its log.
        local: whether the learner has started it.

    Raises:
        UserError: as `Collector.run`, or a mistake in the command.
        EnvironmentCrashed: as there.
    """
    messages.require_packages()
    # Episodes that were played before are not played again, whoever comes back.
    config = command.config.replace(seed=secrets.randbits(62), compile="none")
    settings, device = RunSettings.of(config), prepare_torch(config)
    with telling_of_crashes():
        setup = make_setup(config, device)
    require_task(setup.task, make_agent, config)
    generators = make_generators(config.seed, device)
    guard = Guard(device, settings.guard)
    agent = portable(make_agent.of(setup.task, config, device=device, generators=generators, guard=guard))
    require_players(settings, agent)
    env = setup.make_env(generators)
    stop = StopRequests()
    with closing(env), stop.taken():
        if local:
            leave_interrupts()
        spaces = {**setup.task.stored(env), **REWARD_AND_ENDS, **agent.memory_spaces}
        facts = messages.facts_of(command.config, spaces, agent=agent)
        stepper = Stepper(agent, setup.task, env, settings=settings.loop, generators=generators, device=device)
        with closing(Spoke(address, key=key, name=secrets.token_bytes(8))) as spoke:
            collector = Collector(stepper, spaces=spaces, facts=facts, spoke=spoke, name=name, local=local)
            return collector.run(stop)


def collect_from_here(
    command: CommandLine,
    *,
    make_agent: AgentClass,
    make_setup: Callable[[Config, torch.device], Setup],
    logdir: Path,
) -> None:
    """What `--collect HOST:PORT` does.

    Args:
        command: with the address, and maybe the file of the key.
        make_agent: as for `launch.train`.
        make_setup: likewise.
        logdir: the learner's, where this machine sees it.

    Raises:
        UserError, EnvironmentCrashed: as `collect`.
    """
    messages.require_packages()
    address, key = str(command.entry["collect"]), read_key(Path(command.entry["key"] or logdir / KEY_FILE))
    tell(f"collects for the learner at {address}")
    name = socket.gethostname()
    tell(
        collect(command, make_agent=make_agent, make_setup=make_setup, address=address, key=key, name=name, local=False)
    )


def help_learner(
    address: str,
    number: int,
    *,
    program: str,
    command: CommandLine,
    make_agent: AgentClass,
    make_setup: Callable[[Config, torch.device], Setup],
    key: str,
    errors: tuple[type[Exception], ...],
) -> None:
    """What a process does that the learner has started: collect, and end with the learner however that ends."""
    end_with_parent()
    with one_line_errors(f"{program} collector {number}", *errors):
        # The learner has the accelerator for itself.
        own = command._replace(config=command.config.replace(device="cpu"))
        collect(
            own,
            make_agent=make_agent,
            make_setup=make_setup,
            address=address,
            key=key,
            name=str(number),
            local=True,
        )
