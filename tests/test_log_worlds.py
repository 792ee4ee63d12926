"""Maps of the world that a log is of, as a run sees them that knows the log alone; and worlds that it cannot be of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import config
from benchmarks import intervals
from benchmarks.log_worlds import SAME_METRES, as_seen, draw_maps, known_log, named_world
from benchmarks.trips import random_tours
from config import ConfigError
from dreamer import Dreamer
from routing.cost_world import Costs
from routing.costs import find_costs
from routing.frame import Frame
from routing.trips import Log, PlaceTable
from streets.network import EARTH_METRES
from tests.run_scenes import CPU, NODES
from tests.scenes import CONFIG_PATH, place_costs
from tests.trip_scenes import study, write_log, write_places
from training import loading

RUN = Path("run")
MOVES = 400


def log_of(positions: np.ndarray, *, on_earth: bool = False, names: list[str] | None = None) -> Log:
    """Moves that cost 1 each from positions to the next ones; between places where these have names."""
    ends = np.stack((np.arange(len(positions)), np.roll(np.arange(len(positions)), -1)), 1)
    table = None if names is None else PlaceTable(tuple(names), positions, on_earth)
    cost = np.ones(len(positions))
    origin, target = positions[ends[:, 0]], positions[ends[:, 1]]
    return Log(origin, target, cost, ends[:, 0], on_earth, table, None if table is None else ends, ())


def frame_of(log: Log) -> Frame:
    return Frame.around(log, learnt=np.ones(len(log.cost), dtype=bool))


def anywhere() -> np.ndarray:
    return np.random.RandomState(0).uniform(size=(MOVES, 2))


def degrees_of(world: Costs) -> np.ndarray:
    """Longitudes and latitudes of the places of streets."""
    network = world.network  # type: ignore[attr-defined]
    shrunk = np.array([np.cos(np.radians(network.middle[1])), 1.0])
    return network.middle + np.degrees(network.points[network.places] / EARTH_METRES) / shrunk


def test_maps_of_positions_are_seen_in_the_log_s_frame():
    positions = anywhere() * 0.98 + 0.01
    frame, maps = frame_of(log_of(positions)), draw_maps(find_costs("lanes"), 30, NODES, seed=3)
    seen = as_seen(maps.drawn, find_costs("lanes"), frame, RUN)
    corner, side = positions.min(0), np.ptp(positions, axis=0).max()
    np.testing.assert_allclose(seen.coords, (maps.drawn.coords.numpy() - corner) / side, atol=1e-6)
    assert seen.coords.dtype == torch.float32 and seen.place is None


def test_maps_of_places_are_seen_by_the_log_s_own_numbers():
    world, order = place_costs(), np.random.RandomState(1).permutation(15)
    positions = world.coords.double().numpy()
    frame, maps = (
        frame_of(log_of(positions[order], names=[str(each) for each in order])),
        draw_maps(world, 9, 6, seed=3),
    )
    seen = as_seen(maps.drawn, world, frame, RUN)
    assert seen.place is not None and maps.drawn.place is not None
    assert np.array_equal(order[seen.place], maps.drawn.place)
    expected = frame.inside(positions[maps.drawn.place.numpy()])
    np.testing.assert_allclose(seen.coords, expected, atol=1e-6)


def test_log_in_degrees_may_be_of_streets_on_earth(town: Path):
    world = find_costs("streets", streets=str(town))
    degrees, names = degrees_of(world), [str(number) for number in range(world.num_places)]
    frame, maps = frame_of(log_of(degrees, on_earth=True, names=names)), draw_maps(world, 4, 6, seed=3)
    seen = as_seen(maps.drawn, world, frame, RUN)
    assert seen.place is not None and torch.equal(seen.place, maps.drawn.place)  # type: ignore[arg-type]
    # Both are the box of the same places.
    np.testing.assert_allclose(seen.coords, maps.drawn.coords, atol=1e-3)
    away = degrees + np.array([0.0, np.degrees(1.5 * SAME_METRES / EARTH_METRES)])
    with pytest.raises(ConfigError, match=r"^run has place \d+ at .*, and streets has it elsewhere"):
        as_seen(maps.drawn, world, frame_of(log_of(away, on_earth=True, names=names)), RUN)


PLACES = place_costs().coords.double().numpy()
NUMBERS = [str(number) for number in range(15)]
REFUSED = {
    "degrees": ("lanes", log_of(anywhere(), on_earth=True), "in longitudes and latitudes, and lanes is no part of the"),
    "degrees of places": ("places", log_of(PLACES, on_earth=True, names=NUMBERS), "places is no part of the earth"),
    "large": (
        "lanes",
        log_of(10 * anywhere()),
        r"positions from \(0.\d+, 0.\d+\) to \(9.\d+, 9.\d+\), and all of lanes",
    ),
    "negative": ("lanes", log_of(anywhere() - 0.5), r"from \(-0.4\d+, -0.4\d+\) to .* lies in the unit square"),
    "part": ("lanes", log_of(anywhere() / 2), r"knows a part of lanes alone: a map has a node at \(0\.\d+, 0\.\d+\)"),
    "places": ("lanes", log_of(PLACES, names=NUMBERS), "knows 15 places, and lanes has 0$"),
    "positions": ("places", log_of(anywhere()), "knows 0 places, and places has 15$"),
    "names": (
        "places",
        log_of(PLACES, names=[f"no {each}" for each in NUMBERS]),
        "by numbers from 0: place '0' is none",
    ),
    "elsewhere": (
        "places",
        log_of(PLACES[::-1].copy(), names=NUMBERS),
        r"has place \d+ at .*, and places has it elsewhere",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_world_that_a_log_cannot_be_of_is_refused(kind: str):
    name, log, cause = REFUSED[kind]
    world = place_costs() if name == "places" else find_costs(name)
    maps = draw_maps(world, 30, 6, seed=3)
    with pytest.raises(ConfigError, match=rf"^run .*{cause}"):
        as_seen(maps.drawn, world, frame_of(log), RUN)


def test_log_of_streets_of_the_plane_is_in_no_degrees(town: Path):
    world = find_costs("streets", streets=str(town.with_name("town.net.xml")))
    positions, names = world.coords.double().numpy(), [str(number) for number in range(world.num_places)]  # type: ignore[attr-defined]
    maps = draw_maps(world, 4, 6, seed=3)
    as_seen(maps.drawn, world, frame_of(log_of(positions, names=names)), RUN)
    with pytest.raises(ConfigError, match="streets is no part of the earth"):
        as_seen(maps.drawn, world, frame_of(log_of(positions, on_earth=True, names=names)), RUN)


def test_named_world_hides_nothing():
    assert named_world("lanes", streets="").name == "lanes"
    with pytest.raises(ConfigError, match="costs of veering depend on what no log shows; name a world that hides not"):
        named_world("veering", streets="")


def test_maps_have_nodes_enough_for_a_tour():
    with pytest.raises(ConfigError, match="nodes is 2; a tour takes 3 at least"):
        draw_maps(find_costs("lanes"), 4, 2, seed=3)


@pytest.mark.run
def test_bounds_of_a_log_of_places_are_judged_in_its_own_unit(tmp_path: Path):
    # A cost of 1 is a minute, and the log counts seconds; the model learns in units of two minutes.
    plain = place_costs()
    world = replace(plain, tables=2 * plain.tables, unit=60.0)
    log, places = write_log(tmp_path, world, tours=1000), write_places(tmp_path, world.coords)
    study(tmp_path / "run", log, "--places", str(places), "--model.move_heads", "2", updates=60)
    defaults = config.load_defaults(CONFIG_PATH)
    run = loading.load_run(tmp_path / "run", make_agent=Dreamer, device=CPU, defaults=defaults)
    agent, frame = known_log(run, tmp_path)
    assert frame.unit == pytest.approx(120, rel=0.1)
    maps = draw_maps(world, 500, NODES, seed=5)
    seen = as_seen(maps.drawn, world, frame, tmp_path)
    found = intervals.log_coverage(agent, frame, world, maps, seen=seen)
    assert found.keys() == {"random drivers", "nearest drivers", "plan"}
    assert 0.8 < found["random drivers"].inside < 0.97 and abs(found["random drivers"].bias - 1) < 0.1
    # Who always goes where it is cheapest pays less than the model expects that knows little.
    assert found["nearest drivers"].bias < 0.95


@pytest.mark.run
def test_log_of_another_problem_is_judged_by_nobody(tmp_path: Path):
    study(
        tmp_path / "run",
        write_log(tmp_path),
        "--task",
        "cvrp",
        "--imag_first",
        "stored",
        "--model.move_heads",
        "2",
        updates=2,
    )
    defaults = config.load_defaults(CONFIG_PATH)
    run = loading.load_run(tmp_path / "run", make_agent=Dreamer, device=CPU, defaults=defaults)
    with pytest.raises(ConfigError, match="^run is of task cvrp, and a log's tours are judged as those of tsp"):
        known_log(run, RUN)


def test_orders_of_drivers_are_not_made_of_what_maps_are_made_of():
    drawn = draw_maps(find_costs("lanes"), 1, 20, seed=intervals.TEST_SEED).drawn
    by_position = np.argsort(drawn.coords.flatten()[:19].numpy()) + 1
    tour = random_tours(1, 20, seed=intervals.ORDER_SEED)[0, 1:]
    assert not np.array_equal(tour, by_position)
