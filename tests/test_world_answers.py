"""Answers by plans in a run's model, and of runs that had to learn what moves cost: what is solved, chosen and told."""

from __future__ import annotations

import json
import shutil
from typing import Any

import numpy as np
import pytest
import torch

import checkpoint
import config
import dreamer
import export
import solve
from benchmarks import intervals
from config import UserError
from routing.costs import find_costs
from routing.instances import field_test_coords
from routing.metrics import GREAT_CIRCLE, PAID
from routing.tsp import TSPInstance, TSPRules
from solving.calibrating import calibrate
from solving.decoding import Decoding
from solving.forecasts import Forecaster
from solving.worlds import in_world
from tests.answer_scenes import (
    COUNT,
    CPU,
    NODES,
    answers,
    cases,
    cheapest,
    lanes_cost,
    make_agent,
    refusal,
    solved,
    write_csv,
)

LANES, STREETS = TSPRules.under(find_costs("lanes")), {"cost": "streets", "streets": "helsinki"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that plans in lanes, trained to its end."""
    logdir = tmp_path_factory.mktemp("answers") / "lanes"
    plans = ["--act", "plan", "--eval_by", "plan", "--imag_policy", "0", "--model.move_heads", "3"]
    arguments = ["--configs", "debug", "--cost", "lanes", *plans, "--valid_instances", str(COUNT), "--device", "cpu"]
    dreamer.main([*arguments, "--logdir", str(logdir)])
    return logdir


# Plans.


# Worlds.


def test_answers_of_a_world_are_expected_bounded_and_true(run, tmp_path, capsys):
    np.save(tmp_path / "own.npy", field_test_coords(NODES, 3))
    for row, coords in zip(answers(capsys, run, tmp_path / "own.npy"), field_test_coords(NODES, 3), strict=True):
        assert row["length"] == pytest.approx(lanes_cost(coords, row["tour"]))
        low, high = row["interval"]
        assert row["interval_of"] == "chosen tours"
        assert low < row["expected"] < high and row["by_model"] and row["chosen_by"] == "exact search"


def test_answers_of_a_world_are_compared_with_the_best_by_true_costs(run, capsys):
    rows = answers(capsys, run, "--random", 3, "--reference", "lkh")
    for row, instance in zip(rows, cases(3), strict=True):
        coords = np.random.RandomState(0).uniform(size=(3, NODES, 2))[rows.index(row)]
        truth = in_world(LANES, instance._replace(coords=coords)).cost_matrix()
        assert row["reference"] == pytest.approx(cheapest(truth)) and row["gap_percent"] > -1e-6


def test_table_of_a_world_shows_bounds(run, capsys):
    solve.main([str(run), "--random", "2", "--device", "cpu"])
    head, first, *_, mean = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert "expected" in head and "90 % within" in head and "in truth" in head and "length" not in head
    assert " to " in first and first.endswith("exact search by the model's costs") and mean.startswith("mean of 2")


def test_bounds_of_other_sizes_are_told_of(run, capsys):
    solve.main([str(run), "--random", "2", "--nodes", "8", "--device", "cpu"])
    assert "2 of 2 with other than the 6 nodes for which it was found out" in capsys.readouterr().err


def test_answers_of_a_run_that_does_not_know_how_wrong_it_is_have_no_bounds(run, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / "run")
    state = checkpoint.load(other / "latest.pt", CPU)
    del state["agent"]["calibration"]
    checkpoint.save(other / "latest.pt", state)
    solve.main([str(other), "--random", "1", "--device", "cpu", "--json"])
    captured = capsys.readouterr()
    assert json.loads(captured.out)["instances"][0]["interval"] == [None, None]
    assert "nothing says how far costs may be from those expected" in captured.err


def test_damaged_calibration_is_refused_in_one_line(run, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / "run")
    state = checkpoint.load(other / "latest.pt", CPU)
    state["agent"]["calibration"] = {"plan": {"bias": 1.0}}
    checkpoint.save(other / "latest.pt", state)
    assert "does not fit this config" in refusal(capsys, other, "--random", 1)


def test_run_that_goes_on_forgets_how_wrong_it_was(run, tmp_path, monkeypatch):
    other = shutil.copytree(run, tmp_path / "run")
    assert "calibration" in checkpoint.load(other / "latest.pt", CPU)["agent"]
    arguments = ["--configs", "debug", "--steps", "500", "--device", "cpu"]
    settings = config.read(other / "config.yaml").flat()
    kept = ("cost", "act", "eval_by", "imag_policy", "model.move_heads")
    arguments += [part for key in kept for part in (f"--{key}", str(settings[key]))]
    monkeypatch.setattr(dreamer, "calibrate_at_end", lambda *_: None)
    dreamer.main([*arguments, "--logdir", str(other)])
    assert "calibration" not in checkpoint.load(other / "latest.pt", CPU)["agent"]


def test_exported_weights_keep_bounds_and_are_measured_by_plans(run, tmp_path, capsys):
    path = tmp_path / "lanes.pt"
    export.main([str(run), str(path), "--instances", "4", "--device", "cpu"])
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["gaps"].keys() == {"plan"} and record["gaps"]["plan"] > -1e-6
    capsys.readouterr()
    (row,) = answers(capsys, path, "--random", 1)
    assert row["interval"][0] < row["interval"][1]


def test_run_without_a_policy_plans_and_refuses_to_decode(run, capsys):
    assert "trained no policy (imag_policy: 0) for greedy; --decode plan" in refusal(
        capsys, run, "--random", 1, "--decode", "greedy"
    )


def test_processes_are_refused_where_no_solver_looks(reference, capsys):
    line = refusal(capsys, reference.logdir, "--random", 1, "--processes", 2)
    assert "--processes is of solvers, and --decode greedy asks none" in line


def test_benchmark_of_intervals_prints_how_often_bounds_hold(run, capsys):
    intervals.main([str(run), "--instances", "50"])
    *_, row = capsys.readouterr().out.splitlines()
    _, name, method, inside, width, _, _ = (cell.strip() for cell in row.split("|"))
    assert (name, method) == (str(run), "plan") and 50 <= float(inside) <= 100 and float(width) > 0


@pytest.mark.parametrize(
    "changes",
    [{"cost": "lanes"}, STREETS, {"cost": "stretch", "imag_start": "rows", "model.belief": True}],
    ids=("lanes", "streets", "stretch"),
)
@pytest.mark.parametrize("method", ["plan", "greedy"])
def test_bounds_of_validation_instances_hold_in_nine_cases_of_ten_on_the_test_set(changes: dict[str, Any], method: str):
    # However little a model knows.
    agent = make_agent(**{"model.move_heads": 3, **changes})
    asked = agent.forecaster
    assert asked is not None
    agent.calibration = calibrate(agent.behavior, asked, nodes=NODES, instances=512, methods=[method])
    found = intervals.coverage(agent, method, instances=1000, nodes=NODES)
    assert 0.85 <= found.inside <= 0.95


def test_policy_answers_in_a_world(capsys):
    agent = make_agent(cost="lanes")
    for solution in solved(agent, cases(2), Decoding()):
        assert solution.length == pytest.approx(lanes_cost(solution.instance.coords, solution.tour.tolist()))
        assert solution.instance.metric == PAID and solution.nearest is None


def test_sampled_tours_of_a_world_are_chosen_by_what_is_expected(monkeypatch):
    agent, instances = make_agent(cost="lanes"), cases(3, 8)
    truth = np.stack([in_world(LANES, each).cost_matrix() for each in instances])
    lengths = {}
    for name, costs in (("cheap", truth), ("dear", -truth)):
        monkeypatch.setattr(Forecaster, "matrices", lambda self, instance, costs=costs: costs)
        lengths[name] = [each.length for each in solved(agent, instances, Decoding(method="sample", samples=64))]
    assert all(cheap < dear for cheap, dear in zip(lengths["cheap"], lengths["dear"], strict=True))


def test_symmetries_are_refused_in_a_world_without_any():
    (refused,) = solve.solve(make_agent(cost="lanes"), cases(1), Decoding(method="augment"))
    assert "costs of lanes have no symmetries" in str(refused)


def test_hidden_costs_are_told_on_average():
    (instance,) = cases(1)
    world = find_costs("stretch")
    found = in_world(TSPRules.under(world), instance)
    matrix = world.mean_matrix(TSPInstance(torch.from_numpy(instance.coords)[None]))[0].numpy()
    np.testing.assert_allclose(found.cost_matrix(), matrix)
    (solution,) = solved(make_agent(cost="stretch", imag_start="rows", **{"model.belief": True}), [instance])
    assert solution.length == pytest.approx(matrix[solution.tour, np.roll(solution.tour, -1)].sum())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coords": np.array([[0.1, 0.2], [0.5, 1.5], [0.3, 0.3]])}, r"a node at \(0.5, 1.5\).*in the unit square"),
        ({"metric": GREAT_CIRCLE}, "by latitude and longitude; costs of lanes take x and y"),
        ({"coords": np.zeros((3, 0)), "place": np.arange(3)}, "by places; costs of lanes take x and y"),
        ({"coords": np.zeros((3, 3))}, "by three coordinates"),
        ({"metric": "GEO"}, "degrees and minutes"),
    ],
)
def test_instances_outside_of_a_world_are_refused(change: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        in_world(LANES, cases(1)[0]._replace(**change))


def test_places_are_refused_where_moves_cost_distances(tmp_path, capsys, reference):
    path = write_csv(tmp_path / "own.csv", "place", [[1], [2], [3]])
    for run in ("none", reference.logdir):
        line = refusal(capsys, run, path)
        assert line.endswith("names places of a cost world; give a run that learnt what moves between them cost")


# Streets.
