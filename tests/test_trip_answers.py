"""Answers of runs that have learnt from a log alone: new days, in the log's own units and by its own names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import solve
from config import UserError
from dreamer import Dreamer
from imagining.routing_model import RoutingModel
from routing.files import read_instances
from routing.logged_costs import LoggedCosts, LoggedPlaces
from routing.trips import read_trips
from solving.answers import Solution
from solving.decoding import Decoding
from tests.run_scenes import CPU
from tests.scenes import place_costs
from tests.trip_scenes import study, write_log, write_places

PLAN = Decoding(method=Decoding.PLAN)
METRES, SECONDS = 1000.0, 60.0


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learnt from moves between positions in metres, which cost seconds."""
    folder = tmp_path_factory.mktemp("town")
    lines = write_log(folder).read_text(encoding="utf-8").splitlines()
    rows = [line.split(",") for line in lines[1:]]
    scaled = [[*(str(METRES * float(cell)) for cell in row[:4]), str(SECONDS * float(row[4])), row[5]] for row in rows]
    (folder / "trips.csv").write_text("\n".join([lines[0], *map(",".join, scaled)]) + "\n", encoding="utf-8")
    study(folder / "run", folder / "trips.csv", "--model.move_heads", "2", "--valid_instances", "30")
    return folder / "run"


@pytest.fixture(scope="module")
def shops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learnt from moves between places with names."""
    folder, world = tmp_path_factory.mktemp("shops"), place_costs()
    log, places = write_log(folder, world), write_places(folder, world.coords)
    for path, columns in ((log, (0, 1)), (places, (0,))):
        rows = [line.split(",") for line in path.read_text(encoding="utf-8").splitlines()]
        named = [[f"shop {cell}" if index in columns else cell for index, cell in enumerate(row)] for row in rows[1:]]
        path.write_text("\n".join(map(",".join, [rows[0], *named])) + "\n", encoding="utf-8")
    study(folder / "run", log, "--places", str(places), "--plan.pessimism", "0")
    return folder / "run"


def answer(run: Path, text: str, folder: Path) -> tuple[Dreamer, Solution]:
    path = folder / "day.csv"
    path.write_text(text, encoding="utf-8")
    agent = solve.load_agent(run, CPU)
    (outcome,) = solve.solve(agent, read_instances(path), PLAN)
    if not isinstance(outcome, Solution):
        raise outcome
    return agent, outcome


def expected_cost(agent: Dreamer, solution: Solution) -> float:
    """What the model expects the tour's moves to cost, in the log's unit."""
    instance, costs = solution.instance, solve.rules_of(agent).costs
    coords = torch.from_numpy(instance.coords).float()
    begin, end = solution.tour, np.roll(solution.tour, -1)
    places = (
        None if instance.place is None else torch.from_numpy(np.stack((instance.place[begin], instance.place[end]), 1))
    )
    model = agent.model
    assert isinstance(model, RoutingModel)
    return -costs.unit * float(model.predict_move(coords[begin], coords[end], None, places).detach().sum())


@pytest.mark.run
def test_answer_of_positions_is_in_the_logs_units(town: Path, tmp_path: Path):
    agent, solution = answer(town, "x,y\n100,200\n900,250\n500,700\n200,850\n", tmp_path)
    costs = solve.rules_of(agent).costs
    assert isinstance(costs, LoggedCosts) and costs.unit > 10
    assert solution.instance.coords.min() >= 0 and solution.instance.coords.max() <= 1
    assert solution.length is None and sorted(solution.tour) == [0, 1, 2, 3]
    (told,) = solve.with_forecasts(agent.forecaster, [solution], None)
    assert told.forecast is not None
    assert told.forecast.cost == pytest.approx(expected_cost(agent, solution), rel=1e-5)


@pytest.mark.run
def test_answer_finds_places_by_name(shops: Path, tmp_path: Path):
    agent, solution = answer(shops, "place\nshop 3\nshop 11\nshop 0\nshop 7\n", tmp_path)
    assert solution.instance.place is not None and solution.instance.place.tolist() == [3, 11, 0, 7]
    (told,) = solve.with_forecasts(agent.forecaster, [solution], None)
    assert told.forecast is not None
    assert told.forecast.cost == pytest.approx(expected_cost(agent, solution), rel=1e-5)


@pytest.mark.run
def test_answer_takes_a_node_at_no_place_for_an_unknown_one(shops: Path, tmp_path: Path):
    world = place_costs()
    x, y = world.coords[5].tolist()
    _, solution = answer(shops, f"x,y\n{x},{y}\n{x + 0.02},{y}\n0.5,0.5\n", tmp_path)
    assert solution.instance.place is not None and solution.instance.place.tolist() == [5, -1, -1]


@pytest.mark.run
@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("x,y\n100,200\n900,250\n5000,700\n", r"\(5000, 700\), outside of the box"),
        ("lat,lon\n60,25\n60.1,25\n60,25.1\n", "give x and y"),
        ("place\n0\n1\n2\n", "give x and y"),
    ],
)
def test_answer_of_positions_refuses(text: str, cause: str, town: Path, tmp_path: Path):
    with pytest.raises(UserError, match=cause):
        answer(town, text, tmp_path)


@pytest.mark.run
def test_answer_refuses_places_that_the_log_does_not_know(shops: Path, tmp_path: Path):
    with pytest.raises(UserError, match="place 'shop 15' is none of the 15"):
        answer(shops, "place\nshop 3\nshop 15\nshop 0\n", tmp_path)


@pytest.mark.run
@pytest.mark.parametrize("run", ["town", "shops"])
def test_random_days_lie_where_the_log_does(run: str, request: pytest.FixtureRequest):
    agent = solve.load_agent(request.getfixturevalue(run), CPU)
    costs = solve.rules_of(agent).costs
    for instance in solve.random_instances(agent, 4, 6, seed=0, method=Decoding.PLAN):
        assert not instance.is_priced and instance.coords.max() <= 1
        if isinstance(costs, LoggedPlaces):
            assert instance.place is not None
            assert np.allclose(costs.frame.places[instance.place], instance.coords, atol=1e-6)


@pytest.mark.run
def test_answer_tells_what_is_expected_and_that_nobody_knows_more(
    town: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "day.csv").write_text("x,y\n100,200\n900,250\n500,700\n200,850\n", encoding="utf-8")
    solve.main([str(town), str(tmp_path / "day.csv"), "--json", "--out", str(tmp_path / "out")])
    told = capsys.readouterr()
    (row,) = json.loads(told.out)["instances"]
    assert row["length"] is None and row["expected"] > 0 and row["interval"] == [None, None]
    assert "of a log that is found out when training ends, by held-out trips" in told.err
    assert "COMMENT : expected cost" in (tmp_path / "out" / "day.tour").read_text(encoding="utf-8")


@pytest.mark.run
def test_answer_refuses_a_reference_that_nobody_knows(town: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        solve.main([str(town), "--random", "2", "--reference", "lkh"])
    assert "knows a log alone" in capsys.readouterr().err


@pytest.mark.run
def test_seconds_of_the_log_are_those_of_the_answers(town: Path, tmp_path: Path):
    """Learnt well enough to be told apart from other units, after some seconds of training."""
    log = read_trips(town.parent / "trips.csv", None)
    agent, solution = answer(town, "x,y\n100,200\n900,250\n500,700\n200,850\n", tmp_path)
    assert 0.4 < expected_cost(agent, solution) / (4 * log.cost.mean()) < 2.5
