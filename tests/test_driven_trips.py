"""Bounds of what tours cost by the trips of a log: how they are found out, told of, and how often they hold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import solve
from benchmarks import intervals
from solving.driven_trips import calibrate_by_trips
from solving.intervals import Calibration, least_tours
from tests.run_scenes import CPU, NODES, ROOT
from tests.trip_scenes import study, write_log

TOURS = 1000


def logged(lengths: list[int], *, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Expected and paid costs of the moves of trips: each trip has an error of its own, and each move another."""
    random = np.random.RandomState(seed)
    trip = np.repeat(np.arange(len(lengths)), lengths)
    paid = random.uniform(0.2, 1.0, len(trip))
    wrong = 1 + 0.1 * random.standard_normal(len(lengths))[trip] + 0.05 * random.standard_normal(len(trip))
    return (0.8 * paid * wrong)[None] + 0.01 * random.standard_normal((3, len(trip))), paid, trip


def found(lengths: list[int]) -> Calibration:
    calibration = calibrate_by_trips(*logged(lengths))
    assert calibration is not None
    return calibration


def test_bounds_by_trips_hold_in_nine_trips_of_ten():
    calibration = found([20] * 400)
    expected, paid, trip = logged([20] * 400, seed=1)
    whole = np.stack([np.bincount(trip, weights=each) for each in expected])
    truth = np.bincount(trip, weights=paid)
    inside = [each.low <= cost <= each.high for each, cost in zip(calibration.forecast(whole), truth, strict=True)]
    assert 0.85 < np.mean(inside) < 0.95


def test_calibration_is_of_whole_trips_in_whatever_order_their_moves_stand():
    expected, paid, trip = logged([5] * 30)
    mixed = np.random.RandomState(2).permutation(len(trip))
    again = calibrate_by_trips(expected[:, mixed], paid[mixed], trip[mixed] + 7)
    assert again is not None and again == pytest.approx(found([5] * 30))
    assert (again.nodes, again.instances, again.driven) == (5, 30, 30)
    assert again.bias == pytest.approx(paid.sum() / expected.mean(0).sum())


def test_moves_alone_are_no_trips():
    few = least_tours() - 1
    assert calibrate_by_trips(*logged([1] * 500)) is None
    assert calibrate_by_trips(*logged([3] * few + [1] * 500)) is None
    calibration = found([3] * (few + 1) + [1] * 500)
    assert (calibration.nodes, calibration.driven) == (3, few + 1)


def test_model_that_is_not_finite_has_no_calibration():
    expected, paid, trip = logged([5] * 30)
    expected[1, 3] = np.nan
    assert calibrate_by_trips(expected, paid, trip) is None


def test_calibration_of_old_checkpoints_is_of_no_trips():
    kept = found([5] * 30)._asdict()
    assert Calibration.read(kept).driven == 30
    del kept["driven"]
    assert Calibration.read(kept).driven == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learnt from the tours of drivers who go anywhere."""
    folder = tmp_path_factory.mktemp("driven")
    study(folder / "run", write_log(folder, tours=TOURS), "--model.move_heads", "3", updates=200)
    return folder / "run"


@pytest.mark.run
def test_bounds_of_a_log_hold_for_new_tours_of_its_drivers(run: Path, capsys: pytest.CaptureFixture[str]):
    agent = solve.load_agent(run, CPU)
    forecaster, calibration = agent.forecaster, agent.calibration["plan"]
    assert forecaster is not None and (calibration.nodes, calibration.driven) == (NODES, TOURS // 10)
    capsys.readouterr()
    intervals.main([str(run), "--cost", "lanes", "--instances", "300"])
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.startswith("| run | tours by | costs within the bounds, % | mean width, %")
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert {name for name, *_ in cells} == {str(run)}
    shares = {by: [float(share) for share in found] for _, by, *found in cells}
    assert [*shares] == ["random drivers", "nearest drivers", "plan"]
    inside, width, bias = shares["random drivers"]
    assert 80 < inside < 98 and abs(bias) < 2
    # They are of use, too.
    assert 0 < width < 50


@pytest.mark.run
def test_answers_of_a_log_have_bounds_and_say_by_what(run: Path, capsys: pytest.CaptureFixture[str]):
    solve.main([str(run), "--random", "3", "--json", "--device", "cpu"])
    told = capsys.readouterr()
    for row in json.loads(told.out)["instances"]:
        assert row["interval_of"] == "driven trips"
        assert row["length"] is None and 0 < row["interval"][0] < row["expected"] < row["interval"][1]
    (line,) = told.err.splitlines()
    assert "bounds are by 100 held-out trips of the log, as they were driven" in line
    solve.main([str(run), "--random", "3", "--device", "cpu"])
    assert "90 % of trips within" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.run
@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (
            (),
            "knows a log alone, and nobody knows what its tours truly cost; if it is of a world with a name, add that",
        ),
        (("--streets", "helsinki"), "--streets is of a world that --cost names; give both"),
        (("--cost", "stretch"), "costs of stretch depend on what no log shows"),
        (("--cost", "streets", "--streets", "helsinki"), "knows 0 places, and streets has 36"),
        (("--cost", "lanes", "--nodes", "2"), "--nodes is 2; a tour takes 3 at least"),
    ],
)
def test_bounds_of_a_log_are_judged_in_the_world_that_it_is_of(
    arguments: tuple[str, ...], cause: str, run: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        intervals.main([str(run), "--instances", "4", *arguments])
    told = capsys.readouterr()
    assert cause in told.err and told.err.count("\n") == 1


@pytest.mark.run
def test_run_of_no_log_is_judged_in_its_own_world(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        intervals.main([str(ROOT / "checkpoints" / "tsp20.pt"), "--instances", "4", "--cost", "lanes"])
    assert "has learnt from no log of a world that it does not know" in capsys.readouterr().err


@pytest.mark.run
def test_log_that_says_nothing_of_trips_gives_no_bounds_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = write_log(tmp_path, tours=60)
    rows = [line.rpartition(",")[0] for line in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    study(tmp_path / "run", path, "--model.move_heads", "2", updates=10)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        intervals.main([str(tmp_path / "run"), "--instances", "4", "--cost", "lanes"])
    assert "validation instances of a known world or held-out trips of a log" in capsys.readouterr().err
    solve.main([str(tmp_path / "run"), "--random", "1", "--json", "--device", "cpu"])
    told = capsys.readouterr()
    assert json.loads(told.out)["instances"][0]["interval"] == [None, None]
    assert "takes 19 of two moves or more, which a column `trip` tells" in told.err


@pytest.mark.run
def test_log_of_a_known_world_is_calibrated_by_true_costs(tmp_path: Path):
    log = write_log(tmp_path, tours=60)
    study(tmp_path / "run", log, "--cost", "lanes", "--valid_instances", "20", updates=10)
    assert solve.load_agent(tmp_path / "run", CPU).calibration["plan"].driven == 0
