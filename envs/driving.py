"""Driving on real maps among SUMO's simulated drivers: by a candidate or any trajectory, every half a second."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from jaxtyping import Bool, Float, UInt8

from driving.candidates import ACTIONS, STEPS, candidates
from driving.drawing import draw
from driving.features import EGO, FEATURES, MOMENTS, features
from driving.frames import Frame, assemble
from driving.lines import lane_of
from driving.maps import MAPS, road_map, source_of
from driving.processes import SimulationCrashed, SimulationProcess
from driving.reward import Reward, rewards
from driving.roads import RoadMap
from driving.scene import STEP, Log
from driving.simulator import TICK, TICKS, WARM_UP
from driving.vehicle import Car, Path
from envs.legal_actions import LegalActions
from envs.tasks import NOTICE
from system.errors import UserError

# Seconds that an episode lasts at most.
SECONDS = 20.0
# An ego drives, at so many m/s, has so many metres of its route before it, and lines, when it begins; else the next
# half a second is tried, so often at most, and then another moment of the demand.
DRIVES, ROUTE, TRIES = 1.0, 80.0, 40
# How often traffic is begun anew for an episode, where there is no such car or SUMO crashes.
BEGINNINGS = 20
# An episode ends where the map does: so many metres, and what is driven in so many seconds, before it.
END_METRES, END_SECONDS = 4.0, 0.6
# Beyond all that is observed: metres, metres a second and the like.
LARGEST = 1000.0
# The ends after which nothing more can be earned.
TERMINAL = ("contact", "off_road")


class Ride(NamedTuple):
    """An episode.

    Attributes:
        name: of the ego in the simulation.
        agent: its id in logs.
        car: where it is, and how it steers.
        frames: the last ones, now at the end.
        step: how many have been driven.
        metres: driven along the road.
        obs: what is observed now.
    """

    name: str
    agent: int
    car: Car
    frames: tuple[Frame, ...]
    step: int
    metres: float
    obs: dict[str, np.ndarray]


class DriveEnv(gymnasium.Env):
    """Drive a car for 20 s among simulated drivers. Registered as `Drive-v0`.

    The action is the index of a candidate (`driving.candidates`), which a car with limited acceleration and steering
    follows for half a second; `drive` takes any trajectory instead. The observation is `driving.features.FEATURES`,
    with the `action_mask` of candidates, and the reward `driving.reward`.

    An episode is terminated by contact with another agent and by leaving the road; it is truncated after 20 s, and
    where the map ends. `info["end"]` says which it was, "contact", "off_road", "time" or "map", and "" before;
    `info["own_fault"]` whose fault a contact was, and `info["metres"]` how far the ego has come along the road.

    SUMO runs in a process of its own. Where it crashes, the episode is truncated (`info["end"]` is "crash"), and the
    next one begins in a new process.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": round(1 / STEP)}

    def __init__(
        self,
        *,
        maps: Sequence[str] = ("ingolstadt", "braunschweig"),
        window: Sequence[float] = (0.0, 1.0),
        simulated_driver: bool = False,
        render_mode: str | None = None,
    ) -> None:
        """Prepare an environment; the simulation begins with the first `reset`.

        Args:
            maps: names of `driving.maps.MAPS`; each episode is on one of them.
            window: the part of a map's demand, as shares of its time, in which episodes begin.
            simulated_driver: whether SUMO drives the ego itself, whatever the action is: what its own driver would make
                of an episode is measured by the same seed with and without.
            render_mode: None or "rgb_array".

        Raises:
            UserError: SUMO is not installed, or an argument is none of these.
        """
        if isinstance(maps, str) or not maps or any(name not in MAPS for name in maps):
            raise UserError(f"maps is {maps!r}; a list of some of {', '.join(MAPS)} is needed")
        try:
            low, high = map(float, window)
        except (TypeError, ValueError):
            low, high = 1.0, 0.0
        if not 0 <= low < high <= 1:
            raise UserError(f"window is {window}; two shares of the time are needed, from 0 to 1, in order")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise UserError(f"render_mode is {render_mode!r}; None or 'rgb_array' is needed")
        self.maps, self.window = tuple(maps), (low, high)
        self.simulated_driver, self.render_mode = simulated_driver, render_mode
        self.action_space = LegalActions(
            ACTIONS, action_masks=self.action_masks, first_masks=lambda: np.ones(ACTIONS, bool)
        )
        self.observation_space = spaces.Dict({name: _space(*feature) for name, feature in FEATURES.items()})
        self._simulation = SimulationProcess()
        self._road_map: RoadMap | None = None
        self._ride: Ride | None = None
        self._over = False
        self._shown: Float[np.ndarray, "T 3"] | None = None

    @property
    def ride(self) -> Ride:
        """The episode that runs or has just ended; ResetNeeded where none has begun."""
        if self._ride is None:
            raise ResetNeeded("no episode has begun: call reset()")
        return self._ride

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin an episode: another map, another moment of its demand, another car. There are no options.

        Raises:
            ValueError: there are options.
            SimulationCrashed: SUMO does so again and again.
            UserError: there is no car to drive, however often another moment is tried.
        """
        if options:
            raise ValueError(f"reset() has no options, got {sorted(options)}")
        super().reset(seed=seed)
        self._ride, self._shown, self._over = None, None, False
        for left in reversed(range(BEGINNINGS)):
            try:
                self._begin()
            except SimulationCrashed:
                if not left:
                    raise
            if self._ride is not None:
                return self.ride.obs, self._info("")
        raise UserError(
            f"no car can be driven on {' or '.join(self.maps)} in window {list(self.window)}; take another map, or a"
            " later or wider window"
        )

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Drive along a candidate for half a second.

        Raises:
            ResetNeeded: no episode runs.
            ValueError: there is no such candidate now.
        """
        ride = self.ride
        index = np.asarray(action)
        if index.shape or not 0 <= index < ACTIONS or index != int(index) or not ride.obs["action_mask"][int(index)]:
            legal = np.flatnonzero(ride.obs["action_mask"]).tolist()
            raise ValueError(f"action {action} is no candidate now; there are {legal}")
        return self.drive(self.candidates()[int(index)])

    def drive(self, trajectory: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Drive along any trajectory for half a second.

        Args:
            trajectory: [16, 3]: (x, y, heading) after each of the next half seconds, in the ego's frame.

        Raises:
            ResetNeeded: no episode runs.
            ValueError: the trajectory has another shape, or is not finite.
        """
        trajectory = np.asarray(trajectory, np.float64)
        if trajectory.shape != (STEPS, 3) or not np.isfinite(trajectory).all():
            raise ValueError(f"a trajectory is {STEPS} x 3 finite numbers, and not of shape {trajectory.shape}")
        ride = self.ride
        if self._over:
            raise ResetNeeded("the episode is over: call reset()")
        self._shown = trajectory
        car, path, poses = dataclasses.replace(ride.car), Path(ride.car, trajectory), []
        for tick in range(TICKS):
            car.follow(path, tick * TICK, TICK)
            poses.append((car.x, car.y, car.heading, car.speed))
        try:
            frame = self._simulation.drive(ride.name, () if self.simulated_driver else poses)
        except SimulationCrashed as crash:
            cut = self._cut(ride, "crash")
            line = str(crash).strip().rpartition("\n")[2]
            cut[-1][NOTICE] = ("crash", f"SUMO has crashed, and begins anew: {line}")
            return cut
        if frame is None:
            return self._cut(ride, "map")
        return self._arrive(ride._replace(car=car, frames=(*ride.frames, frame)[-MOMENTS:], step=ride.step + 1))

    def action_masks(self) -> Bool[np.ndarray, " A"]:
        """Which candidates there are."""
        return self.ride.obs["action_mask"]

    def candidates(self) -> Float[np.ndarray, "A T 3"]:
        """The trajectories that the actions stand for now, in the ego's frame."""
        obs = self.ride.obs
        return candidates(obs["lines"][None], obs["lines_valid"][None], obs["ego"][None])[0]

    def render(self) -> UInt8[np.ndarray, "H W 3"] | None:
        """The scene around the ego, the candidates, and the one that was driven last."""
        if self.render_mode is None:
            return None
        ride = self.ride
        there = ride.obs["action_mask"]
        return draw(self._log(ride), self._map, ride.agent, self.candidates()[there], self._shown)

    def close(self) -> None:
        """End the simulation."""
        self._ride = None
        self._simulation.close()

    @property
    def map_name(self) -> str:
        """Where the episode is."""
        return self._map.name

    @property
    def _map(self) -> RoadMap:
        assert self._road_map is not None, "an episode without a map"
        return self._road_map

    def _begin(self) -> None:
        """Begin traffic somewhere, and take the first car that can be driven; there may be none."""
        name = str(self.np_random.choice(self.maps))
        opens, closes = source_of(name).opens
        low, high = ((closes - opens) * share for share in self.window)
        latest = max(low, min(high, closes - opens - TRIES * STEP - SECONDS))
        start = float(self.np_random.uniform(max(low, min(WARM_UP, latest)), latest))
        self._road_map = road_map(name)
        self._simulation.begin(name, seed=int(self.np_random.integers(2**31)), start=start)
        frames = [self._simulation.frame()]
        for _ in range(TRIES):
            frames = [*frames, self._simulation.advance()][-MOMENTS:]
            cars = self._eligible(frames) if len(frames) == MOMENTS else []
            if cars:
                car = cars[self.np_random.integers(len(cars))]
                self._simulation.take(car[0])
                self._ride = self._first_ride(*car, tuple(frames))
                return

    def _eligible(self, frames: Sequence[Frame]) -> list[tuple[str, int]]:
        """The cars that have been seen long enough, drive, and have enough road before them: names, and ids."""
        log = assemble("now", self._map.name, frames)
        cars = [(name, agent) for name, agent, metres in self._simulation.cars() if metres >= ROUTE]
        moments = np.broadcast_to(np.arange(MOMENTS), (len(cars), MOMENTS))
        ids = np.array([agent for _, agent in cars], np.int64)
        seen = (log.find(np.broadcast_to(ids[:, None], moments.shape), moments) >= 0).all(1)
        cars = [cars[place] for place in np.flatnonzero(seen)]
        if not cars:
            return []
        seen_now = features(log, self._map, ids[seen], MOMENTS - 1, targets=False)
        drives = seen_now["ego"][:, EGO.index("speed")] > DRIVES
        free = ~rewards(log, self._map, ids[seen], MOMENTS - 1).contact
        return [cars[place] for place in np.flatnonzero(seen_now["lines_valid"].any((1, 2)) & drives & free)]

    def _first_ride(self, name: str, agent: int, frames: tuple[Frame, ...]) -> Ride:
        now = frames[-1].agents
        row = int(np.searchsorted(now["id"], agent))
        x, y, heading, speed, length = (float(now[key][row]) for key in ("x", "y", "heading", "speed", "length"))
        ride = Ride(name, agent, Car(x, y, heading, speed, length), frames, 0, 0.0, {})
        return ride._replace(obs=self._observe(ride))

    def _arrive(self, ride: Ride) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """What the step has come to."""
        self._settle(ride)
        reward = rewards(self._log(ride), self._map, np.array([ride.agent]), MOMENTS - 1)
        ride = ride._replace(metres=ride.metres + float(reward.metres[0]), obs=self._observe(ride))
        end = self._end_of(ride, reward)
        self._ride, self._over = ride, bool(end)
        info = self._info(end) | {"own_fault": bool(reward.own_fault[0]), "discomfort": float(reward.discomfort[0])}
        return ride.obs, float(reward.total[0]), end in TERMINAL, bool(end) and end not in TERMINAL, info

    def _settle(self, ride: Ride) -> None:
        """Make the car and its row in the last frame agree."""
        before, now = (frame.agents for frame in ride.frames[-2:])
        earlier, row = (int(np.searchsorted(agents["id"], ride.agent)) for agents in (before, now))
        for key in ("x", "y", "heading", "speed"):
            if self.simulated_driver:
                setattr(ride.car, key, float(now[key][row]))
            else:
                # SUMO keeps the car where it is put, and tells its speed a tick later.
                now[key][row] = getattr(ride.car, key)
        now["acceleration"][row] = (now["speed"][row] - before["speed"][earlier]) / STEP

    def _cut(self, ride: Ride, end: str) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """The end of an episode of whose ego nothing new is known: what was observed last stands for it."""
        self._over = True
        return ride.obs, 0.0, False, True, self._info(end) | {"own_fault": False, "discomfort": 0.0}

    def _end_of(self, ride: Ride, reward: Reward) -> str:
        """Why the episode ends; empty, where it goes on."""
        if reward.contact[0]:
            return "contact"
        car = ride.car
        nearest = lane_of(self._map, np.array([[car.x, car.y]]), np.array([car.heading]))
        lane = int(nearest.lane[0])
        left = float(self._map.lengths[lane] - nearest.arc[0])
        if lane >= 0 and not self._map.lanes[lane].successors and left < END_METRES + END_SECONDS * car.speed:
            return "map"
        if reward.off_road[0]:
            return "off_road"
        return "time" if ride.step >= SECONDS / STEP else ""

    def _observe(self, ride: Ride) -> dict[str, np.ndarray]:
        found = features(self._log(ride), self._map, np.array([ride.agent]), MOMENTS - 1, targets=False)
        return {name: value[0] for name, value in found.items()}

    def _info(self, end: str) -> dict[str, Any]:
        ride = self.ride
        return {"action_mask": ride.obs["action_mask"], "metres": ride.metres, "end": end}

    def _log(self, ride: Ride) -> Log:
        return assemble("now", self._map.name, ride.frames)


def _space(shape: tuple[int, ...], dtype: type) -> spaces.Space:
    """Flags, or numbers."""
    if dtype is np.bool_:
        return spaces.MultiBinary(shape)
    return spaces.Box(-LARGEST, LARGEST, shape, np.float32)
