"""A log of trips as a run learns from it: moves as tensors, some trips held out, and an evaluation on those."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from checkpoint import CheckpointError
from config import UserError
from parts.moves import Moves
from routing.cost_world import Costs
from routing.frame import Frame
from routing.places import Places
from routing.rules import each_part
from routing.trips import Log, PlaceTable, read_places, read_trips
from settings.run import TaskSettings
from tools import Bounds
from training.agent import Student, Trained
from training.evaluation import Evaluator, Report

# So many moves are left to learn from, at least, when some trips are held out.
LEAST_LEARNT = 50
# The share of trips that nothing is learnt from, and the seed that chooses them, whatever the run's.
HELD_OUT, HELD_OUT_SEED = 0.1, 4321


class TripLog:
    """The moves of a log, in the units that models learn in.

    Attributes:
        learnt: the moves to learn from.
        held_out: those of some whole trips, to judge by.
        held_out_trip: of which trip each of these is a part.
        rewards: the least and the largest that a move to learn from has earned, 0-d.
        frame: between the log's units and the model's; None where the log is of a world that is known, in its units.
        faults: why rows of the file were left out, a line each.
    """

    def __init__(self, log: Log, *, world: Costs | None, frame: Frame | None, device: torch.device) -> None:
        """Bring the moves to the device.

        Args:
            log: as it was read.
            world: that the log is of; None where nobody knows.
            frame: of the run so far; None: the log's own, where nobody knows the world.
            device: where the agent learns.

        Raises:
            UserError: nothing can be learnt from it, or it lies outside the world.
        """
        held_out = _held_out(log.trip)
        if (left := int((~held_out).sum())) < LEAST_LEARNT:
            raise UserError(
                f"only {left:,} moves are left to learn from, of {LEAST_LEARNT} that it takes: some whole trips are"
                " held out; give more trips, or leave the column out"
            )
        if world is None:
            frame = frame or Frame.around(log, learnt=~held_out)
            unit = frame.unit
        else:
            _require_inside(log, world)
            unit = world.unit
        self.frame, self.faults, self.device = frame, log.faults, device
        self.checksum = zlib.crc32(np.concatenate((log.origin, log.target, log.cost[:, None]), 1).tobytes())
        moves = self._moves(log, unit)
        rows = torch.from_numpy(held_out).to(device)
        self.learnt: Moves = each_part(moves, lambda part: part[~rows])
        self.held_out: Moves = each_part(moves, lambda part: part[rows])
        self.held_out_trip: Int64[np.ndarray, " M"] = log.trip[held_out]
        self.rewards = Bounds(self.learnt.reward.amin(), self.learnt.reward.amax())
        self.trips = len(np.unique(log.trip))

    def _moves(self, log: Log, unit: float) -> Moves:
        origin, target = log.origin, log.target
        if self.frame is not None:
            origin, target = self.frame.inside(origin), self.frame.inside(target)

        def tensor(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values.astype(np.float32)).to(self.device)

        places = None if log.ends is None else torch.from_numpy(log.ends).to(self.device)
        reward = tensor(-log.cost / unit)
        return Moves(tensor(origin), tensor(target), reward, torch.ones_like(reward), places)

    def __len__(self) -> int:
        """Moves to learn from."""
        return len(self.learnt.reward)

    def sample(self, count: int, *, generator: torch.Generator) -> Moves:
        """Moves to learn from, drawn uniformly with repetition."""
        rows = torch.randint(len(self), (count,), generator=generator, device=self.device)
        return each_part(self.learnt, lambda part: part[rows])

    def facts(self) -> dict[str, Any]:
        """What a checkpoint tells of it: how many moves of which content, and the frame."""
        facts = {"moves": len(self) + len(self.held_out.reward), "checksum": self.checksum}
        return facts if self.frame is None else {**facts, "frame": self.frame.state_dict()}

    def require_same(self, facts: Mapping[str, Any], source: Path) -> None:
        """Check that this is the log that a checkpoint tells of.

        Raises:
            CheckpointError: it is another.
        """
        if facts["checksum"] != self.checksum:
            raise CheckpointError(
                f"{source} has learnt from another log, of {facts['moves']:,} moves; give that one, or begin with its"
                " weights in another --logdir: --init"
            )


def read_log(settings: TaskSettings, *, world: Costs | None, frame: Frame | None, device: torch.device) -> TripLog:
    """The log that the settings name.

    Args:
        settings: they name it.
        world: that it is of; None where nobody knows.
        frame: of the run so far; None in a new one.
        device: where the agent learns.

    Raises:
        UserError: it cannot be read, or nothing can be learnt from it.
    """
    path = Path(settings.trips)
    if world is None:
        table = read_places(Path(settings.places)) if settings.places else None
    else:
        if settings.places:
            raise UserError(f"places is {settings.places!r}, and cost {world.name} says itself where nodes lie")
        if world.hidden:
            raise UserError(f"costs of {world.name} depend on what no log shows; give a log of another world")
        table = _numbered_places(world)
    try:
        return TripLog(read_trips(path, table), world=world, frame=frame, device=device)
    except UserError as error:
        named = str(error).startswith(str(path))
        raise error if named else UserError(f"{path}: {error}") from error


def frame_of(facts: Mapping[str, Any] | None) -> Frame | None:
    """The frame that a checkpoint tells of, if it tells of one.

    Raises:
        UserError: it is none.
    """
    return Frame.of(facts["frame"]) if facts and "frame" in facts else None


def _held_out(trip: Int64[np.ndarray, " M"]) -> Bool[np.ndarray, " M"]:
    """Which moves are of trips that are held out."""
    trips = np.unique(trip)
    count = max(1, round(HELD_OUT * len(trips)))
    return np.isin(trip, np.random.RandomState(HELD_OUT_SEED).permutation(trips)[:count])


def _numbered_places(world: Costs) -> PlaceTable | None:
    """The places of a world, called by their numbers; None where nodes lie anywhere."""
    if not isinstance(world, Places):
        return None
    return PlaceTable(tuple(map(str, range(world.num_places))), world.coords.double().numpy(), on_earth=False)


def _require_inside(log: Log, world: Costs) -> None:
    """Check that the positions of a log may be a world's.

    Raises:
        UserError: one is not in the unit square.
    """
    ends = np.concatenate((log.origin, log.target))
    if log.on_earth or ends.min() < 0 or ends.max() > 1:
        raise UserError(
            f"a position lies outside the unit square, where all of cost {world.name} is; leave --cost out for a log of"
            " your own"
        )


class TripEvaluator:
    """How well an agent knows what held-out trips cost; and its tours, where the world is known."""

    def __init__(self, log: TripLog, player: Evaluator | None) -> None:
        """Take what to judge by.

        Args:
            log: some of its trips are held out.
            player: judges tours by true costs; None where nobody knows them.
        """
        self.log, self.player = log, player

    def validate(self, agent: Trained) -> Report:
        """On the held-out trips, and by validation tours where there are any."""
        return self._with_errors(agent, None if self.player is None else self.player.validate(agent))

    def test(self, agent: Trained) -> Report:
        """On the held-out trips, and by test tours where there are any."""
        return self._with_errors(agent, None if self.player is None else self.player.test(agent))

    def _with_errors(self, agent: Trained, played: Report | None) -> Report:
        assert isinstance(agent, Student), "others learn from no log"
        moves = self.log.held_out
        expected = agent.expected(moves)
        wrong, spread = (expected.mean(0) - moves.reward).abs(), expected.std(0, correction=0)
        # Held-out moves may all be free, where those to learn from are not.
        cost = float(-moves.reward.mean()) or float(-self.log.learnt.reward.mean())
        values = {"move_error": 100 * float(wrong.mean()) / cost}
        summary = f"costs of {len(wrong):,} held-out moves are wrong by {values['move_error']:.2f} % of their mean"
        if len(expected) > 1:
            values["move_spread"] = 100 * float(spread.mean()) / cost
            values["move_spread_rank"] = _rank_correlation(spread, wrong)
        if played is None:
            return Report(values, {}, summary)
        return played._replace(values=played.values | values, summary=f"{played.summary}; {summary}")


def _rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's: 1 where both put moves in the same order, 0 where neither tells of the other, or of less than two."""
    if len(one) < 2:
        return 0.0
    ranks = torch.stack([each.argsort().argsort().double() for each in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])
