"""Logs that are written from known worlds, and plans that are judged by their true costs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import trip_plans, trips
from routing.trips import read_places, read_trips
from tests.run_scenes import ROOT
from tests.scenes import place_costs, routing
from tests.trip_scenes import study, write_log


def test_nearest_tours_go_where_it_costs_least_and_is_open():
    costs = np.array([[[0.0, 3.0, 1.0, 2.0], [9.0, 0.0, 9.0, 9.0], [1.0, 3.0, 0.0, 2.0], [1.0, 4.0, 1.0, 0.0]]])
    assert trips.nearest_tours(costs).tolist() == [[0, 2, 3, 1]]


def test_random_tours_visit_every_node_once():
    tours = trips.random_tours(50, 6, seed=0)
    assert np.array_equal(np.sort(tours, 1), np.tile(np.arange(6), (50, 1)))
    assert (tours[:, 0] == 0).all() and len(np.unique(tours, axis=0)) > 30


def test_logged_moves_follow_on_from_each_other_and_lead_home():
    _, rows = trips.logged(routing("lanes").rules.costs, nodes=5, tours=2, drivers="random", seed=0)
    assert [row[-1] for row in rows] == [0] * 5 + [1] * 5
    for begin in (0, 5):
        tour = rows[begin : begin + 5]
        assert [row[2:4] for row in tour] == [row[:2] for row in [*tour[1:], tour[0]]]


def test_logged_moves_cost_what_the_world_says():
    world = routing("lanes").rules.costs
    _, rows = trips.logged(world, nodes=5, tours=20, drivers="nearest", seed=0)
    table = torch.tensor([[float(str(value)) for value in row] for row in rows])
    paid = world.function(table[:, :2], table[:, 2:4], torch.zeros(len(table), 0))  # type: ignore[attr-defined]
    torch.testing.assert_close(table[:, 4], paid, atol=2e-6, rtol=0)


def test_log_of_places_is_read_as_it_was_written(tmp_path: Path):
    world = place_costs()
    path = write_log(tmp_path, world)
    trips.write(tmp_path / "places.csv", ["place", "x", "y"], [[k, *at] for k, at in enumerate(world.coords.tolist())])
    log = read_trips(path, read_places(tmp_path / "places.csv"))
    assert log.faults == () and log.ends is not None
    expected = world.tables[0][log.ends[:, 0], log.ends[:, 1]]
    torch.testing.assert_close(torch.from_numpy(log.cost), expected.double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (("--drivers", "fast"), "choose random or nearest"),
        (("--tours", "1"), "--tours is '1'"),
        (("--cost", "stretch"), "depend on what no log shows"),
    ],
)
def test_trips_refuses(arguments: tuple[str, ...], cause: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        trips.main([*arguments, "--out", str(tmp_path / "trips.csv")])
    assert cause in capsys.readouterr().err
    assert not (tmp_path / "trips.csv").exists()


@pytest.mark.run
def test_trip_plans_judges_by_true_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    log = write_log(tmp_path, tours=200)
    study(tmp_path / "run", log, "--model.move_heads", "3", updates=150)
    capsys.readouterr()
    trip_plans.main([str(tmp_path / "run"), "--cost", "lanes", "--nodes", "6", "--instances", "16"])
    header, _, row = capsys.readouterr().out.splitlines()
    plan, drivers, saved, seen, unseen = (float(cell) for cell in row.strip("| ").split(" | ")[1:])
    assert header.count("|") == 7 and 0 <= plan < drivers
    assert saved == pytest.approx(100 * (1 - (100 + plan) / (100 + drivers)), abs=0.02)
    assert seen > 0 and unseen > 0


@pytest.mark.run
@pytest.mark.parametrize(
    ("positions", "cause"),
    [
        ("from_lon,from_lat,to_lon,to_lat", "a log in longitudes and latitudes, and lanes is no part of the earth"),
        ("from_x,from_y,to_x,to_y", "and all of lanes lies in the unit square"),
    ],
)
def test_trip_plans_refuses_a_log_of_elsewhere(
    positions: str, cause: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    _, rows = trips.logged(routing("lanes").rules.costs, nodes=5, tours=40, drivers="random", seed=0)
    moved = [[25 + 0.01 * float(str(value)) for value in row[:4]] + row[4:] for row in rows]
    trips.write(tmp_path / "trips.csv", [*positions.split(","), "cost", "trip"], moved)
    study(tmp_path / "run", tmp_path / "trips.csv", "--model.move_heads", "2", updates=2)
    with pytest.raises(SystemExit):
        trip_plans.main([str(tmp_path / "run"), "--cost", "lanes", "--nodes", "6", "--instances", "4"])
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("trip_plans: ") and cause in line


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (("--cost", "lanes", "--nodes", "6"), "has learnt from no log"),
        (("--nodes", "6"), "--cost is not given"),
        (("--cost", "stretch"), "name a world that hides nothing"),
        (("--cost", "lanes", "--task", "cvrp"), "as tours (task: tsp)"),
        (("--cost", "lanes", "--nodes", "1"), "a tour takes 3 at least"),
    ],
)
def test_trip_plans_refuses(arguments: tuple[str, ...], cause: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        trip_plans.main([str(ROOT / "checkpoints" / "tsp20.pt"), "--instances", "2", *arguments])
    assert cause in capsys.readouterr().err
