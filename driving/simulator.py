"""SUMO as a library: traffic on its maps, recorded as logs, and one vehicle of it driven from outside."""

from __future__ import annotations

import math
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from driving import maps
from driving.frames import Frame, assemble
from driving.packages import import_libsumo, maps_folder
from driving.roads import RoadMap
from driving.scene import COLUMNS, LIGHT_COLUMNS, STEP, Kind, Light, Log
from system.errors import UserError

# Seconds of a step of the simulation, and how many of them a frame of a log is.
TICK = 0.1
TICKS = round(STEP / TICK)
# Seconds that go by before anything is recorded: a map begins empty.
WARM_UP = 60.0
# Classes of SUMO's that are no cars, and the length that a car has at most, in metres.
LONGEST_CAR = 7.0
KINDS = {
    **dict.fromkeys(("bicycle", "moped", "motorcycle", "scooter"), Kind.BICYCLE),
    "pedestrian": Kind.PEDESTRIAN,
}
# On a road a vehicle is turned no farther than this from the direction of its lane, in radians: as it stands, more for
# each m/s, and at most. The lane is so near, in metres.
ASKEW_STANDING, ASKEW_MOVING, ASKEW_MOST, ASIDE = 0.03, 0.015, 0.15, 4.0
# Routes that are made longer are so long, in streets.
MOST_STREETS = 40
LIGHTS = {"r": Light.RED, "R": Light.RED, "u": Light.RED, "y": Light.AMBER, "Y": Light.AMBER}
# Vehicles go where they are put, whatever lane, street or junction that is.
ANYWHERE = 2
# In SUMO's answers: no such thing, as of a vehicle that is not on the road.
NOWHERE = ""


class Simulation:
    """Traffic on a map from a moment of its demand on. There is one in a process: SUMO keeps it in global variables.

    The same map, seed and moment give the same traffic.

    Attributes:
        road_map: its lanes.
        start: the second of the demand that the first frame is of.
    """

    _running: weakref.ref[Simulation] | None = None
    _begun = False

    def __init__(self, map_name: str, *, seed: int, start: float | None = None) -> None:
        """Begin, and let `WARM_UP` seconds go by.

        Args:
            map_name: one of `maps.MAPS`.
            seed: of the drivers, and of what is drawn here.
            start: second of the map's demand, from 0; drawn, if None.

        Raises:
            UserError: there is no such map, SUMO is not installed, or another simulation runs in this process.
        """
        source = maps.source_of(map_name)
        opens, closes = source.opens
        last = closes - opens - WARM_UP
        if start is None:
            start = float(np.random.default_rng(seed).uniform(0, max(last, 0.0)))
        if not 0 <= start < closes - opens:
            raise UserError(
                f"traffic of {map_name} begins at 0 and ends after {closes - opens:g} s, and not at {start:g}"
            )
        self.road_map: RoadMap = maps.road_map(map_name)
        self.start = start
        self._sumo = import_libsumo()
        other = Simulation._running and Simulation._running()
        if other is not None:
            raise UserError(
                "SUMO simulates once in a process: close the other first, or take a SimulationProcess for each"
            )
        self._folder = tempfile.TemporaryDirectory(prefix="driving-")
        Simulation._running = weakref.ref(self)
        self._begun = True
        try:
            # What begins less than the warm-up after the demand does begins with an empty map.
            begin = opens + max(0.0, start - WARM_UP)
            self._sumo.start(["sumo", *self._options(map_name, source, begin, seed)])
            self._lanes = {lane.name: index for index, lane in enumerate(self.road_map.lanes)}
            self._is_road = [not lane.in_junction for lane in self.road_map.lanes]
            self._links = self._controlled_lanes()
            self._numbers: dict[str, int] = {}
            self._sizes: dict[str, tuple[Kind, float, float]] = {}
            # At the frame before, and at the one that is being made.
            self._speeds: dict[str, float] = {}
            self._now: dict[str, float] = {}
            self._persons: set[str] = set()
            while self.second < opens + start - TICK / 2:
                self.tick()
        except BaseException:
            self.close()
            raise

    @property
    def second(self) -> float:
        """Of the day."""
        return float(self._sumo.simulation.getTime())

    def close(self) -> None:
        """End it, so that another can begin in this process."""
        running = Simulation._running
        if running is not None and running() is self:
            Simulation._running = None
            self._sumo.close()
        self._folder.cleanup()

    def __del__(self) -> None:
        # One that is dropped without `close` leaves the library running; the next start would fail.
        running = Simulation._running
        if self._begun and running is not None and running() in (None, self):
            Simulation._running = None
            self._sumo.close()
            self._folder.cleanup()

    def tick(self) -> None:
        """Let `TICK` seconds go by."""
        self._sumo.simulationStep()
        self._persons.update(self._sumo.simulation.getDepartedPersonIDList())
        self._persons.difference_update(self._sumo.simulation.getArrivedPersonIDList())

    def frame(self) -> Frame:
        """Who is where now. To be called once every `STEP` seconds: accelerations are over the time between calls."""
        vehicle, person = self._sumo.vehicle, self._sumo.person
        rows = [self._row(vehicle, name) for name in vehicle.getIDList()]
        rows += [self._row(person, name) for name in sorted(self._persons) if person.getRoadID(name) != NOWHERE]
        rows.sort()
        # Those that have left are forgotten.
        self._speeds, self._now = self._now, {}
        names = ("id", "kind", "x", "y", "heading", "speed", "acceleration", "length", "width", "lane")
        table = np.array(rows, np.float64).reshape(-1, len(names))
        self._straighten(table)
        agents = {name: table[:, column].astype(COLUMNS[name]) for column, name in enumerate(names)}
        return Frame(agents, self._lights())

    def agent(self, name: str) -> int:
        """The number of a vehicle in logs, by its name in the simulation."""
        return self._numbers.setdefault(name, len(self._numbers))

    def cars(self) -> list[tuple[str, int, float]]:
        """The cars on lanes of the map: name here, number in logs, and metres to the last street of the route."""
        vehicle = self._sumo.vehicle
        return [
            (name, self.agent(name), self._metres_left(name))
            for name in sorted(vehicle.getIDList())
            if self._size(vehicle, name)[0] == Kind.CAR and vehicle.getLaneID(name) in self._lanes
        ]

    def advance(self) -> Frame:
        """Let `STEP` seconds go by, and see who is where then."""
        for _ in range(TICKS):
            self.tick()
        return self.frame()

    def drive(self, name: str, poses: Sequence[tuple[float, float, float, float]] = ()) -> Frame | None:
        """The same with a vehicle that is driven from outside.

        Args:
            name: of the vehicle.
            poses: where to put it in each tick, as `move` has it; empty: its own driver drives.

        Returns:
            None where the vehicle has left the map.
        """
        for tick in range(TICKS):
            if name not in self._sumo.vehicle.getIDList():
                return None
            if poses:
                self.move(name, *poses[tick])
            self.tick()
        return self.frame() if name in self._sumo.vehicle.getIDList() else None

    def take(self, name: str) -> None:
        """Let the route of a vehicle go on to where the map ends: its trip may end before, and it would vanish."""
        route = list(self._sumo.vehicle.getRoute(name))
        here = route[self._sumo.vehicle.getRouteIndex(name) :]
        leads = self._streets()
        while len(here) < MOST_STREETS and leads.get(here[-1]):
            here.append(leads[here[-1]])
        self._sumo.vehicle.setRoute(name, here)

    def move(self, name: str, x: float, y: float, heading: float, speed: float) -> None:
        """Put a vehicle somewhere in the next tick, whatever its own driver would do.

        Args:
            name: of the vehicle.
            x: of the middle of its footprint, metres.
            y: likewise.
            heading: radians, counter-clockwise from the x axis.
            speed: m/s, as others are to see it.
        """
        length = self._size(self._sumo.vehicle, name)[1]
        front = x + length / 2 * math.cos(heading), y + length / 2 * math.sin(heading)
        angle = (90 - math.degrees(heading)) % 360
        self._sumo.vehicle.moveToXY(name, "", -1, *front, angle=angle, keepRoute=ANYWHERE)
        self._sumo.vehicle.setPreviousSpeed(name, speed)

    def _streets(self) -> dict[str, str]:
        """The street that each street leads to first."""
        lanes, leads = self.road_map.lanes, dict[str, str]()
        for lane in lanes:
            after = list(lane.successors)
            while after and lanes[after[0]].in_junction:
                after = list(lanes[after[0]].successors)
            if after and not lane.in_junction:
                leads.setdefault(_street(lane.name), _street(lanes[after[0]].name))
        return leads

    def _metres_left(self, name: str) -> float:
        """How far it is along the route to the beginning of its last street."""
        last = self._sumo.vehicle.getRoute(name)[-1]
        # SUMO gives a large negative number where there is no way.
        return max(0.0, float(self._sumo.vehicle.getDrivingDistance(name, last, 0.0)))

    def _options(self, map_name: str, source: maps.Source, begin: float, seed: int) -> list[str]:
        folder = maps_folder()
        own = Path(self._folder.name)
        demand = [folder / name for name in source.demand] + maps.write_reworded(map_name, own)
        if not demand:
            demand = [own / "trips.rou.xml"]
            maps.write_trips(map_name, demand[0], seed=seed)
        options = {
            "net-file": str(folder / source.network),
            "route-files": ",".join(map(str, demand)),
            "begin": str(begin),
            # SUMO's seeds are of 32 bits with a sign.
            "seed": str(seed % 2**31),
            "step-length": str(TICK),
            "time-to-teleport": "-1",
            "collision.action": "none",
            # Without parts of lanes a change of lanes is a jump to the side.
            "lateral-resolution": "0.8",
            "xml-validation": "never",
            "no-step-log": "true",
            "no-warnings": "true",
            **source.options,
        }
        if source.additional:
            options["additional-files"] = ",".join(str(folder / name) for name in source.additional)
        return [word for name, value in options.items() for word in (f"--{name}", value)]

    def _controlled_lanes(self) -> dict[str, list[list[int]]]:
        """For each traffic light, and each letter of its state, the lanes in the junction that it opens and closes."""
        lights = self._sumo.trafficlight
        return {
            name: [
                [self._lanes[via] for _, _, via in links if via in self._lanes]
                for links in lights.getControlledLinks(name)
            ]
            for name in lights.getIDList()
        }

    def _lights(self) -> dict[str, np.ndarray]:
        rows = []
        for name, lanes in self._links.items():
            state = self._sumo.trafficlight.getRedYellowGreenState(name)
            for letter, closed in zip(state, lanes, strict=True):
                rows += [(lane, LIGHTS[letter]) for lane in closed if letter in LIGHTS]
        table = np.array(sorted(rows), np.int64).reshape(-1, 2)
        return {
            "light_lane": table[:, 0].astype(LIGHT_COLUMNS["light_lane"]),
            "light": table[:, 1].astype(LIGHT_COLUMNS["light"]),
        }

    def _row(self, domain: Any, name: str) -> tuple[int | float, ...]:
        """The columns of an agent in a frame."""
        kind, length, width = self._size(domain, name)
        x, y = domain.getPosition(name)
        heading = math.radians(90 - domain.getAngle(name))
        heading = math.atan2(math.sin(heading), math.cos(heading))
        speed = domain.getSpeed(name)
        before = self._speeds.get(name, speed)
        self._now[name] = speed
        # SUMO's position is that of the front bumper.
        x, y = x - length / 2 * math.cos(heading), y - length / 2 * math.sin(heading)
        lane = self._lanes.get(domain.getLaneID(name), -1)
        return self.agent(name), kind, x, y, heading, speed, (speed - before) / STEP, length, width, lane

    def _straighten(self, table: Float[np.ndarray, "N 10"]) -> None:
        """Turn those who stand askew in a lane into its direction, about the middle of their front.

        SUMO takes as heading where a vehicle moves. One that stops as it changes lanes would stand across them.
        """
        places = [place for place, lane in enumerate(table[:, 9].astype(int)) if lane >= 0 and self._is_road[lane]]
        if not places:
            return
        x, y, heading, speed, length = (table[places, column] for column in (2, 3, 4, 5, 7))
        nearest = self.road_map.nearest(np.stack((x, y), 1), heading, within=ASIDE, least_cosine=0.0)
        turned = np.arctan2(np.sin(heading - nearest.heading), np.cos(heading - nearest.heading))
        askew = np.minimum(ASKEW_STANDING + ASKEW_MOVING * speed, ASKEW_MOST)
        straight = np.where(nearest.lane >= 0, nearest.heading + np.clip(turned, -askew, askew), heading)
        table[places, 2] = x + length / 2 * (np.cos(heading) - np.cos(straight))
        table[places, 3] = y + length / 2 * (np.sin(heading) - np.sin(straight))
        table[places, 4] = np.arctan2(np.sin(straight), np.cos(straight))

    def _class(self, domain: Any, name: str) -> str:
        return "pedestrian" if domain is self._sumo.person else domain.getVehicleClass(name)

    def _size(self, domain: Any, name: str) -> tuple[Kind, float, float]:
        if name not in self._sizes:
            length, width = float(domain.getLength(name)), float(domain.getWidth(name))
            kind = KINDS.get(self._class(domain, name), Kind.HEAVY if length > LONGEST_CAR else Kind.CAR)
            self._sizes[name] = kind, length, width
        return self._sizes[name]


def record(map_name: str, seed: int, seconds: float, *, start: float | None = None) -> Log:
    """Let traffic go on for some time, and keep what happens.

    Args:
        map_name: one of `maps.MAPS`.
        seed: of the drivers, and of the moment where none is given.
        seconds: how long; the log has a frame every `STEP` seconds, the first and the last moment included.
        start: second of the map's demand, from 0; drawn, if None.

    Raises:
        UserError: there is no such map, SUMO is not installed, or another simulation runs in this process.
    """
    simulation = Simulation(map_name, seed=seed, start=start)
    try:
        frames = [simulation.frame()]
        for _ in range(int(seconds / STEP)):
            frames.append(simulation.advance())
    finally:
        simulation.close()
    return assemble(f"{map_name}_{seed}_{simulation.start:.0f}", map_name, frames)


def _street(lane: str) -> str:
    """The street that a lane is of, in SUMO's names."""
    return lane.rpartition("_")[0]
