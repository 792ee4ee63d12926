"""Planners in the closed loop: what they make of episodes of driving, and SUMO's own driver of the same."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from driving.baselines import Planner
from envs.driving import DriveEnv


@runtime_checkable
class Remembering(Protocol):
    """A planner that remembers its episode."""

    def begin(self) -> None:
        """Forget everything: the next observation is the first of an episode."""


class Outcome(NamedTuple):
    """One episode.

    Attributes:
        seed: of its reset.
        map_name: where it was.
        steps: half seconds.
        metres: along the road.
        end: why it ended, as `DriveEnv` tells it.
        own_fault: whether it ended by contact of its own fault.
        discomfort: from 0 to 1, on average.
        total: the sum of rewards.
        seconds: that the planner took for a decision, on average.
    """

    seed: int
    map_name: str
    steps: int
    metres: float
    end: str
    own_fault: bool
    discomfort: float
    total: float
    seconds: float


class Summary(NamedTuple):
    """Many episodes; shares are of all of them.

    Attributes:
        progress: all metres, as a share of those that SUMO's own driver makes from the same starts.
        own_fault: share that ended by contact of the ego's own fault.
        other_contact: share that ended by any other contact.
        off_road: share that ended off the road.
        discomfort: mean.
        total: mean sum of rewards.
        milliseconds: mean, for a decision of the planner.
    """

    progress: float
    own_fault: float
    other_contact: float
    off_road: float
    discomfort: float
    total: float
    milliseconds: float


def play(env: DriveEnv, planner: Planner | None, seed: int) -> Outcome:
    """Drive one episode.

    Args:
        env: to drive in.
        planner: decides; None: the action that any step has, as where SUMO drives itself.
        seed: of the episode.
    """
    obs, _ = env.reset(seed=seed)
    if isinstance(planner, Remembering):
        planner.begin()
    total, discomfort, taken = 0.0, 0.0, 0.0
    while True:
        before = time.perf_counter()
        decision = np.int64(env.action_masks().argmax()) if planner is None else planner(obs)
        taken += time.perf_counter() - before
        drive = env.drive if np.ndim(decision) else env.step
        obs, reward, terminated, truncated, info = drive(decision)
        total, discomfort = total + reward, discomfort + info["discomfort"]
        if terminated or truncated:
            steps = env.ride.step
            return Outcome(
                seed,
                env.map_name,
                steps,
                info["metres"],
                info["end"],
                info["own_fault"],
                discomfort / max(steps, 1),
                total,
                taken / max(steps, 1),
            )


def play_all(
    planner: Planner | None, seeds: Iterable[int], *, maps: Sequence[str], window: Sequence[float]
) -> list[Outcome]:
    """Drive an episode for each seed, all in one environment.

    Args:
        planner: decides; None: SUMO drives itself.
        seeds: of the episodes.
        maps: as `DriveEnv` takes them.
        window: likewise.

    Raises:
        UserError: SUMO is not installed, maps or window are none, or there is no car to drive.
    """
    env = DriveEnv(maps=maps, window=window, simulated_driver=planner is None)
    try:
        return [play(env, planner, seed) for seed in seeds]
    finally:
        env.close()


def summary(outcomes: Sequence[Outcome], own_driver: Sequence[Outcome]) -> Summary:
    """What episodes come to, beside those of SUMO's own driver from the same seeds."""
    assert [one.seed for one in outcomes] == [one.seed for one in own_driver], "other episodes"

    def share(flags: Iterable[bool]) -> float:
        return float(np.mean([*flags]))

    return Summary(
        progress=sum(one.metres for one in outcomes) / max(sum(one.metres for one in own_driver), 1e-6),
        own_fault=share(one.own_fault for one in outcomes),
        other_contact=share(one.end == "contact" and not one.own_fault for one in outcomes),
        off_road=share(one.end == "off_road" for one in outcomes),
        discomfort=float(np.mean([one.discomfort for one in outcomes])),
        total=float(np.mean([one.total for one in outcomes])),
        milliseconds=1000 * float(np.mean([one.seconds for one in outcomes])),
    )
