"""SUMO's traffic as logs, and a vehicle that is driven from outside. One short log serves all tests that read one."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from driving import maps, packages
from driving.frames import assemble
from driving.scene import Kind, Light, Log
from driving.simulator import TICKS, Simulation, record
from system.errors import UserError

SECONDS = 30


@pytest.fixture
def simulation() -> Iterator[Callable[..., Simulation]]:
    """Begins simulations, and ends them."""
    pytest.importorskip("libsumo")
    begun = []

    def begin(name: str = "ingolstadt", start: float = 100.0) -> Simulation:
        begun.append(Simulation(name, seed=1, start=start))
        return begun[-1]

    yield begin
    for one in begun:
        one.close()


def test_a_log_holds_a_frame_every_half_second(ingolstadt: Log):
    assert ingolstadt.frames == 2 * SECONDS + 1 and ingolstadt.seconds == SECONDS
    assert ingolstadt.map_name == "ingolstadt" and ingolstadt.name == "ingolstadt_1_100"
    assert (np.diff(ingolstadt.id)[np.diff(ingolstadt.frame) == 0] > 0).all()


def test_speeds_and_positions_of_a_log_agree(ingolstadt: Log):
    apart = []
    for agent in ingolstadt.ids:
        rows = ingolstadt.track(int(agent))
        moved = np.hypot(np.diff(ingolstadt.x[rows]), np.diff(ingolstadt.y[rows]))
        apart.append(moved - 0.25 * (ingolstadt.speed[rows][1:] + ingolstadt.speed[rows][:-1]))
    # Speeds are at the ends of half a second, and where a vehicle turns its middle takes a way of its own.
    assert np.median(np.abs(np.concatenate(apart))) < 0.02
    assert np.quantile(np.abs(np.concatenate(apart)), 0.9) < 0.3


def test_cars_of_a_log_are_on_the_lanes_of_the_map(ingolstadt: Log):
    road_map = maps.road_map("ingolstadt")
    cars = np.flatnonzero(ingolstadt.kind == Kind.CAR)
    points = np.stack((ingolstadt.x, ingolstadt.y), 1)[cars]
    found = road_map.nearest(points, ingolstadt.heading[cars], within=3.0, least_cosine=0.0)
    assert (found.lane >= 0).mean() > 0.99
    # The middle of a car may lie on another lane than its front, which SUMO goes by.
    assert (found.lane == ingolstadt.lane[cars]).mean() > 0.7


def test_kinds_lengths_and_lights_of_a_log(ingolstadt: Log):
    assert set(ingolstadt.kind.tolist()) >= {Kind.CAR, Kind.HEAVY}
    assert ingolstadt.length[ingolstadt.kind == Kind.HEAVY].min() > 7 > ingolstadt.length[ingolstadt.kind == 0].max()
    road_map = maps.road_map("ingolstadt")
    shown = {(int(lane), int(light)) for lane, light in zip(ingolstadt.light_lane, ingolstadt.light, strict=True)}
    assert {light for _, light in shown} >= {Light.RED}
    assert all(road_map.lanes[lane].in_junction for lane, _ in shown)


def test_lights_are_those_of_the_simulation(simulation: Callable[..., Simulation]):
    one = simulation()
    lights, lanes = one._sumo.trafficlight, one.road_map.lanes
    red = {
        via
        for name in lights.getIDList()
        for letter, links in zip(lights.getRedYellowGreenState(name), lights.getControlledLinks(name), strict=True)
        for _, _, via in links
        if letter in "ru"
    }
    shown = one.frame().lights
    names = {lanes[lane].name for lane in shown["light_lane"][shown["light"] == Light.RED]}
    # Lanes for pedestrians and bicycles are none of the map's.
    assert names == red & {lane.name for lane in lanes} and len(names) > 5


def test_nobody_passes_a_red_light(ingolstadt: Log):
    """Of those that come to a junction's lane in some frame, hardly any does so while the lane is closed."""
    road_map = maps.road_map("ingolstadt")
    entered, passed = 0, 0
    for frame in range(1, ingolstadt.frames):
        lanes, lights = ingolstadt.lights(frame)
        red = set(lanes[lights == Light.RED].tolist())
        rows = np.arange(*ingolstadt.rows(frame).indices(len(ingolstadt.id)))
        before = ingolstadt.find(ingolstadt.id[rows], np.full(len(rows), frame - 1))
        for row, earlier in zip(rows[before >= 0], before[before >= 0], strict=True):
            lane = int(ingolstadt.lane[row])
            if lane >= 0 and lane != ingolstadt.lane[earlier] and road_map.lanes[lane].in_junction:
                entered, passed = entered + 1, passed + (lane in red)
    assert entered > 10 and passed <= entered / 10


def test_the_same_seed_gives_the_same_log(ingolstadt: Log):
    again = record("ingolstadt", 1, 5.0, start=100.0)
    other = record("ingolstadt", 2, 5.0, start=100.0)
    rows = len(again.id)
    assert (again.x == ingolstadt.x[:rows]).all() and (again.id == ingolstadt.id[:rows]).all()
    assert len(other.id) != rows or (other.x != again.x).any()


def test_a_vehicle_goes_where_it_is_put(simulation: Callable[..., Simulation]):
    one = simulation()
    name, agent, _ = one.cars()[0]
    frame = one.frame().agents
    row = int(np.flatnonzero(frame["id"] == agent)[0])
    x, y, heading = (float(frame[key][row]) for key in ("x", "y", "heading"))
    ways = [0.3 * tick for tick in range(1, TICKS + 1)]
    poses = [(x + way * math.cos(heading), y + way * math.sin(heading), heading + way / 15, 3.0) for way in ways]
    later = one.drive(name, poses)
    assert later is not None
    after = later.agents
    row = int(np.flatnonzero(after["id"] == agent)[0])
    assert after["x"][row] == pytest.approx(x + 0.3 * TICKS * math.cos(heading), abs=0.02)
    assert after["y"][row] == pytest.approx(y + 0.3 * TICKS * math.sin(heading), abs=0.02)
    assert after["heading"][row] == pytest.approx(heading + 0.02 * TICKS, abs=1e-3)
    assert after["speed"][row] == pytest.approx(3.0, abs=0.1)


def test_nobody_stands_askew_in_a_lane(ingolstadt: Log):
    road_map = maps.road_map("ingolstadt")
    on_roads = [lane >= 0 and not road_map.lanes[lane].in_junction for lane in ingolstadt.lane]
    points = np.stack((ingolstadt.x, ingolstadt.y), 1)[on_roads]
    heading = ingolstadt.heading[on_roads]
    nearest = road_map.nearest(points, heading, within=3.0, least_cosine=0.0)
    turned = np.arctan2(np.sin(heading - nearest.heading), np.cos(heading - nearest.heading))[nearest.lane >= 0]
    assert np.quantile(np.abs(turned), 0.995) < 0.16


def test_a_vehicle_whose_route_goes_on_stays_on_the_map(simulation: Callable[..., Simulation]):
    one = simulation()
    name, _, metres = one.cars()[0]
    before = one._sumo.vehicle.getRoute(name)
    one.take(name)
    after = one._sumo.vehicle.getRoute(name)
    index = one._sumo.vehicle.getRouteIndex(name)
    assert len(after) > len(before) - index and set(before[index:]) <= set(after)
    assert one.cars()[0][2] > metres


def test_a_second_simulation_in_a_process_is_refused(simulation: Callable[..., Simulation]):
    first = simulation()
    with pytest.raises(UserError, match="SUMO simulates once in a process: close the other"):
        simulation()
    first.close()
    assert simulation().cars()


@pytest.mark.parametrize("name", ["braunschweig", "motorway"])
def test_other_maps_have_traffic(name: str, simulation: Callable[..., Simulation]):
    one = simulation(name, start=25.0)
    log = assemble("short", name, [one.frame()])
    assert len(log.id) > 5 and len(one.cars()) > 3


def test_bicycles_and_persons_come_once(tmp_path):
    pytest.importorskip("sumo")
    bicycles, persons, cars = (path.read_text() for path in maps.write_reworded("braunschweig", tmp_path))
    assert bicycles.count("<trip id=") == 152 and "flow" not in bicycles
    assert persons.count("<person id=") == persons.count("</person>") == 10 and "Flow" not in persons
    assert cars.count("<trip id=") == cars.count('departSpeed="max"') == 2325


def test_trips_of_a_seed_are_the_same(tmp_path):
    pytest.importorskip("sumo")
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        maps.write_trips("ingolstadt", tmp_path / name, seed=seed)
    one, two, three = ((tmp_path / name).read_text() for name in ("one", "two", "three"))
    assert one == two != three and one.count("<trip") > 800


@pytest.mark.parametrize(
    ("name", "start", "fault"),
    [
        ("atlantis", 0.0, "there is no map 'atlantis'; there are ingolstadt, braunschweig, motorway, town"),
        ("ingolstadt", 3600.0, "begins at 0 and ends after 3600 s, and not at 3600"),
        ("ingolstadt", -1.0, "and not at -1"),
    ],
)
def test_what_cannot_be_simulated_is_told_in_a_line(name: str, start: float, fault: str):
    pytest.importorskip("libsumo")
    with pytest.raises(UserError, match=fault):
        Simulation(name, seed=0, start=start)


@pytest.mark.parametrize(
    ("package", "ask"),
    [
        ("libsumo", packages.import_libsumo),
        ("sumolib", packages.import_sumolib),
        ("sumo", packages.maps_folder),
    ],
)
def test_a_missing_package_is_told_in_a_line(package: str, ask: Callable[[], object], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r'driving needs the package .* pip install -e "\.\[driving\]"'):
        ask()
