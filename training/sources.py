"""What a run learns from: environments and the replay that they fill, a log of trips, or samples drawn each time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from config import Config, ConfigError
from envs.gym_vector import GymVectorEnv
from envs.tasks import ObservationTask, Task
from envs.vector import RoutingVectorEnv
from parts.observations import readings
from settings.run import RunSettings
from system.memory import readable_bytes
from training.agent import Practitioner
from training.collecting import Collecting
from training.collector import longest_piece
from training.company import Invitation
from training.gathering import Gathering
from training.loop import Loop
from training.offline import OfflineTrainer
from training.pieces import Slots
from training.practice import Practice
from training.recorded import Record
from training.replay import Replay
from training.replay_room import rows_when_full
from training.resharing import take_replay
from training.resuming import GATHERED, PRACTICE, RECORDED, RUN, STUDY, require
from training.ring import REWARD_AND_ENDS, Spaces
from training.study import Study
from training.trainer import Trainer
from training.trips import TripLog

# The most faults of a log that are told one by one.
MOST_FAULTS = 10


@runtime_checkable
class Source(Protocol):
    """What a run learns from.

    Attributes:
        needed: what a checkpoint has to hold for a run on it to go on; see `resuming.require`.
    """

    needed: Mapping[str, Any]

    def take(self, state: Mapping[str, Any], path: Path) -> None:
        """Go on from its part of the checkpoint at `path`.

        Raises:
            CheckpointError, ConfigError: it does not fit.
        """

    def facts(self, settings: RunSettings, device: torch.device) -> dict[str, list[str]]:
        """What a run says of it before it begins: lines by their headings."""

    def ends(self, settings: RunSettings) -> str:
        """When a run on it ends."""

    def warnings(self, settings: RunSettings) -> list[str]:
        """What looks wrong before it begins."""

    def loop(self, agent: Any, **shared: Any) -> Loop:
        """The loop of a run on it, with what all loops take."""


class Collected:
    """Environments that an agent acts in, and the replay that it fills."""

    needed: Mapping[str, Any] = RUN
    # Rows that others have lived through.
    recorded: int = 0

    def __init__(self, task: Task, env: RoutingVectorEnv | GymVectorEnv, replay: Replay) -> None:
        """Take both.

        Args:
            task: what is to be solved.
            env: where the agent acts.
            replay: empty so far.
        """
        self.task, self.env, self.replay = task, env, replay

    def take(self, state: Mapping[str, Any], path: Path) -> None:
        if "slots" in state:
            raise ConfigError(f"{path} is of a run with collectors; give --collectors or --listen again, or --init")
        take_replay(self.replay, path.parent, state)

    def facts(self, settings: RunSettings, device: torch.device) -> dict[str, list[str]]:
        replay, observations = self.replay, settings.observations
        if isinstance(self.task, ObservationTask):
            seen = readings(self.task, encode_keys=observations.encode_keys, decode_keys=observations.decode_keys)
        else:
            shown = sorted({*replay.rows} - {*REWARD_AND_ENDS})
            seen = [f"{settings.task.task} of {settings.task.nodes} nodes: {', '.join(shown)}"]
        # Only a CPU gives memory as it is written to.
        rows, taken = rows_when_full(settings, recorded=self.recorded), "when full, taken as it fills"
        if replay.device != device:
            taken += ", in the host's memory"
        if replay.device.type != "cpu":
            rows, taken = replay.length * replay.num_envs, "taken at once"
        held = f", of which {len(replay):,} are there" if len(replay) else ""
        size = f"{readable_bytes(rows * replay.row_bytes)} {taken}"
        return {"sees": seen, "replay": [f"{rows:,} rows of {readable_bytes(replay.row_bytes)}{held}; {size}"]}

    def ends(self, settings: RunSettings) -> str:
        return f"to step {settings.loop.steps:,}"

    def warnings(self, settings: RunSettings) -> list[str]:
        loop = settings.loop
        if loop.prefill < loop.steps:
            return []
        return [f"prefill ({loop.prefill:,}) lasts to the end: nothing is learnt; give more --steps"]

    def loop(self, agent: Any, **shared: Any) -> Collecting:
        return Trainer(agent, self.task, env=self.env, replay=self.replay, **shared)


class Gathered(Collected):
    """Environments that collectors step, and the replay that these fill; one environment is here to ask."""

    def __init__(
        self,
        task: Task,
        env: RoutingVectorEnv | GymVectorEnv,
        replay: Replay,
        *,
        invitation: Invitation,
        config: Config,
        spaces: Spaces,
    ) -> None:
        """Take them.

        Args:
            task: what is to be solved.
            env: of the task.
            replay: empty so far.
            invitation: to collectors.
            config: of the run.
            spaces: of all that a row has.
        """
        super().__init__(task, env, replay)
        self.invitation, self.config, self.spaces = invitation, config, spaces

    def take(self, state: Mapping[str, Any], path: Path) -> None:
        if "slots" not in state:
            raise ConfigError(f"{path} is of a run without collectors; leave them out, or take its weights: --init")
        require(state, GATHERED, path)
        take_replay(self.replay, path.parent, state)

    def facts(self, settings: RunSettings, device: torch.device) -> dict[str, list[str]]:
        return {**super().facts(settings, device), "collect": self.invitation.lines}

    def loop(self, agent: Any, **shared: Any) -> Gathering:
        slots = Slots(self.spaces, count=self.replay.num_envs, longest=longest_piece(self.task))
        of_task: dict[str, Any] = {"task": self.task, "spaces": self.spaces}
        company = partial(self.invitation.opened, agent, self.config, logdir=shared["logdir"], **of_task)
        return Gathering(agent, self.task, replay=self.replay, slots=slots, company=company, **shared)


class Recorded(Collected):
    """Episodes that others have recorded, in replay from the start, and the environments that a run may go on in."""

    needed: Mapping[str, Any] = RECORDED

    def __init__(self, task: Task, env: RoutingVectorEnv | GymVectorEnv, replay: Replay, *, record: Record) -> None:
        """Take them.

        Args:
            task: what is to be solved.
            env: where the agent acts afterwards.
            replay: with the episodes in it.
            record: what there is to know of them.
        """
        super().__init__(task, env, replay)
        self.record, self.recorded = record, len(replay)

    def take(self, state: Mapping[str, Any], path: Path) -> None:
        self.record.require_same(state["record"], path)
        super().take(state, path)

    def facts(self, settings: RunSettings, device: torch.device) -> dict[str, list[str]]:
        record, returns = self.record, np.array(self.record.returns)
        then = f"{settings.loop.steps:,} env steps follow" if settings.loop.steps else "no env step is made"
        learnt = (
            f"{len(record):,} episodes of {record.rows:,} rows in {record.episodes}, mean return {returns.mean():.4g},"
            f" from {returns.min():.4g} to {returns.max():.4g}; {then}"
        )
        return {**super().facts(settings, device), "learns": [learnt]} | _bad(record.faults, what="episodes")

    def ends(self, settings: RunSettings) -> str:
        loop = settings.loop
        then = f", then to step {loop.offline + loop.steps:,} in the environment" if loop.steps else ""
        return f"to update {loop.offline:,}{then}"

    def warnings(self, settings: RunSettings) -> list[str]:
        return []

    def loop(self, agent: Any, **shared: Any) -> OfflineTrainer:
        return OfflineTrainer(agent, self.task, env=self.env, replay=self.replay, record=self.record, **shared)


class Logged:
    """A log of trips."""

    needed: Mapping[str, Any] = STUDY

    def __init__(self, log: TripLog) -> None:
        """Take the log."""
        self.log = log

    def take(self, state: Mapping[str, Any], path: Path) -> None:
        self.log.require_same(state["log"], path)

    def facts(self, settings: RunSettings, device: torch.device) -> dict[str, list[str]]:
        log, task = self.log, settings.task
        held_out = len(log.held_out.reward)
        seen = f"{len(log):,} moves of {task.trips}; {held_out:,} of other trips are held out; no env step is made"
        facts = {"sees": [seen]}
        if log.frame is not None:
            facts["unit"] = [f"a cost of 1 is {log.frame.unit:.4g} of the log's; its box is the unit square"]
        return facts | _bad(log.faults)

    def ends(self, settings: RunSettings) -> str:
        return f"to update {settings.loop.updates:,}"

    def warnings(self, settings: RunSettings) -> list[str]:
        return []

    def loop(self, agent: Any, **shared: Any) -> Study:
        return Study(agent, self.log, **shared)


class Practised:
    """Samples that an agent draws with each update, and that nothing is kept of."""

    needed: Mapping[str, Any] = PRACTICE

    def __init__(self, agent: Practitioner) -> None:
        """Take who draws them."""
        self.agent = agent

    def take(self, state: Mapping[str, Any], path: Path) -> None:
        """The agent is all that there is."""

    def facts(self, settings: RunSettings, device: torch.device) -> dict[str, list[str]]:
        return {"sees": self.agent.sees} | _bad(self.agent.faults)

    def ends(self, settings: RunSettings) -> str:
        return f"to step {settings.loop.steps:,}"

    def warnings(self, settings: RunSettings) -> list[str]:
        return []

    def loop(self, agent: Any, **shared: Any) -> Practice:
        return Practice(agent, **shared)


def _bad(faults: Sequence[str], *, what: str = "rows") -> dict[str, list[str]]:
    """What cannot be used: the first of it, and how much more there is."""
    if not faults:
        return {}
    told = list(faults[:MOST_FAULTS])
    rest = len(faults) - len(told)
    return {"bad": told + ([f"and {rest:,} bad {what} more, which are left out, too"] if rest else [])}
