"""Answers by plans in a run's model, and of runs that had to learn what moves cost: what is solved, chosen and told."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
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
from guard import Guard
from routing.costs import find_costs
from routing.cvrp import CVRPRules
from routing.files import RoutingInstance, read_instances
from routing.instances import field_test_coords
from routing.metrics import EXACT, GREAT_CIRCLE, PAID, SECONDS
from routing.tsp import TSPInstance, TSPRules
from solving import forecasts, writing
from solving.answers import Solution
from solving.calibrating import calibrate
from solving.decoding import Decoding
from solving.forecasts import Forecaster
from solving.intervals import Forecast
from solving.plans import planned
from solving.worlds import in_world
from streets.network import projected
from training import setup
from training.devices import make_generators

CPU = torch.device("cpu")
NODES = 6
COUNT = 24
LANES, STREETS = TSPRules.under(find_costs("lanes")), {"cost": "streets", "streets": "helsinki"}
PLAN = Decoding(method="plan")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that plans in lanes, trained to its end."""
    logdir = tmp_path_factory.mktemp("answers") / "lanes"
    plans = ["--act", "plan", "--eval_by", "plan", "--imag_policy", "0", "--model.move_heads", "3"]
    arguments = ["--configs", "debug", "--cost", "lanes", *plans, "--valid_instances", str(COUNT), "--device", "cpu"]
    dreamer.main([*arguments, "--logdir", str(logdir)])
    return logdir


def make_agent(**changes: Any) -> dreamer.Dreamer:
    settings = config.load(solve.CONFIGS, ["debug"], {}).replace(imag_first="stored", **changes)
    torch.manual_seed(0)
    task, generators = setup.make_task(settings), make_generators(0, CPU)
    agent = dreamer.Dreamer.of(task, settings, device=CPU, generators=generators, guard=Guard(CPU))
    with torch.no_grad():
        # The head begins at zero, and would find all tours as good.
        for parameter in agent.model.heads["reward"].parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return agent


def cases(count: int, num_nodes: int = NODES) -> list[RoutingInstance]:
    coords = field_test_coords(num_nodes, count)
    return [RoutingInstance(f"own{row}", "tsp", nodes, EXACT) for row, nodes in enumerate(coords)]


def solved(agent: dreamer.Dreamer | None, instances: list[RoutingInstance], how: Decoding = PLAN, **options: Any):
    found = solve.solve(agent, instances, how, **options)
    assert all(isinstance(each, Solution) for each in found), found
    return found


def forecaster(**changes: Any) -> Forecaster:
    found = make_agent(**changes).forecaster
    assert found is not None
    return found


def expected_matrix(agent: dreamer.Dreamer, instance: RoutingInstance) -> np.ndarray:
    assert agent.forecaster is not None
    return agent.forecaster.matrices(TSPInstance(torch.from_numpy(instance.coords)[None].float()))[0]


def cheapest(costs: np.ndarray) -> float:
    orders = np.array([(0, *order) for order in itertools.permutations(range(1, len(costs)))])
    return costs[orders, np.roll(orders, -1, 1)].sum(1).min()


def lanes_cost(coords: np.ndarray, tour: list[int]) -> float:
    stops = torch.from_numpy(coords[tour])
    world = find_costs("lanes")
    return float(world.at(stops, stops.roll(-1, 0)).sum())  # type: ignore[attr-defined]


def write_csv(path: Path, header: str, rows: Any) -> Path:
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def answers(capsys, *arguments: Any) -> list[dict[str, Any]]:
    solve.main([*map(str, arguments), "--device", "cpu", "--json"])
    return json.loads(capsys.readouterr().out)["instances"]


def refusal(capsys, *arguments: Any) -> str:
    with pytest.raises(SystemExit):
        solve.main([*map(str, arguments), "--device", "cpu"])
    return capsys.readouterr().err.splitlines()[-1]


# Plans.


def test_plan_is_the_best_tour_by_what_the_model_expects():
    agent, instances = make_agent(), cases(3)
    for instance, solution in zip(instances, solved(agent, instances), strict=True):
        costs = expected_matrix(agent, instance)
        paid = costs[solution.tour, np.roll(solution.tour, -1)].sum()
        assert paid == pytest.approx(cheapest(costs), rel=1e-6)
        assert solution.length == pytest.approx(instance.tour_length(solution.tour))


def test_plan_says_that_a_solver_and_the_models_costs_chose():
    (solution,) = solved(make_agent(), cases(1))
    assert solution.chooser == "exact search by the model's costs" and solution.forecast is None


def test_plan_takes_any_size_where_the_actor_takes_one():
    agent = make_agent(**{"actor.type": "masked"})
    assert [len(each.tour) for each in solved(agent, [*cases(1, 9), *cases(1, 2), *cases(1, 1)])] == [9, 2, 1]


def test_plan_is_the_same_in_processes():
    agent, instances = make_agent(), cases(6, 11)
    alone, beside = (solved(agent, instances, processes=count) for count in (None, 2))
    assert [each.tour.tolist() for each in alone] == [each.tour.tolist() for each in beside]


def test_plan_moves_no_more_vehicles_than_there_are():
    agent = make_agent(task="cvrp", nodes=5)
    drawn = CVRPRules.field_instances(1, 5, seed=0)
    instance = RoutingInstance("own", "cvrp", drawn.coords[0].numpy(), EXACT, np.array([0, 2, 2, 2, 2]), 4, vehicles=2)
    (solution,) = solved(agent, [instance])
    assert (solution.tour == 0).sum() == 2
    (refused,) = solve.solve(agent, [instance._replace(vehicles=1)], PLAN)
    assert isinstance(refused, UserError) and "PyVRP found no solution" in str(refused)


def test_plan_is_refused_where_the_model_knows_costs_by_latents_alone():
    (refused,) = solve.solve(make_agent(**{"model.reward_latent": True}), cases(1), PLAN)
    assert "cannot be planned: the run's model does not tell what moves cost" in str(refused)


def test_plan_of_another_problem_is_refused():
    (refused,) = solve.solve(make_agent(task="cvrp"), cases(1), PLAN)
    assert "is a tsp instance, and the run was trained on cvrp" in str(refused)


def test_plans_go_on_where_one_needs_more_memory_than_there_is(monkeypatch):
    monkeypatch.setattr("system.memory.memory_at_hand", lambda: 10_000)
    large, small = planned(forecaster(), [*cases(1, 9), *cases(1)])
    assert "has 9 nodes, and planning so many takes" in str(large) and isinstance(small, Solution)


def test_forecaster_gives_the_same_matrix_in_pieces(monkeypatch):
    asked, instance = forecaster(**{"model.move_heads": 3}), TSPInstance(torch.rand(4, 7, 2))
    whole = asked.matrices(instance)
    monkeypatch.setattr(forecasts, "WORKING_NUMBERS", 1)
    np.testing.assert_allclose(asked.matrices(instance), whole, atol=1e-6)


def test_forecaster_counts_rewards_as_they_were_before_they_were_scaled():
    one = forecaster()
    other = Forecaster(make_agent().imagination, one.settings, reward_scale=0.1)  # type: ignore[arg-type]
    instance = TSPInstance(torch.rand(1, NODES, 2))
    np.testing.assert_allclose(other.matrices(instance), 10 * one.matrices(instance), rtol=1e-6)


def test_forecaster_takes_moves_to_be_dearer_by_the_spread_of_the_ensemble():
    plain, wary = (forecaster(**{"model.move_heads": 3, "plan.pessimism": by}) for by in (0.0, 2.0))
    instance = TSPInstance(torch.rand(1, NODES, 2))
    each = -plain.model.predict_moves_each(instance, None).double()
    added = 2 * each.std(0, correction=0)[0].numpy() * ~np.eye(NODES, dtype=bool)
    np.testing.assert_allclose(wary.matrices(instance)[0] - plain.matrices(instance)[0], added, atol=1e-6)


def test_forecaster_expects_of_tours_what_their_moves_cost():
    asked = forecaster(**{"model.move_heads": 3})
    instance, tours = TSPInstance(torch.rand(2, 4, 2)), np.array([[0, 2, 1, 3, 0], [3, 1, 1, 0, 2]])
    matrices = asked.matrices(instance)
    paid = matrices[np.arange(2)[:, None], tours, np.roll(tours, -1, 1)].sum(1)
    np.testing.assert_allclose(asked.tours(instance, tours).mean(0), paid, rtol=1e-5)


# Worlds.


def test_answers_of_a_world_are_expected_bounded_and_true(run, tmp_path, capsys):
    np.save(tmp_path / "own.npy", field_test_coords(NODES, 3))
    for row, coords in zip(answers(capsys, run, tmp_path / "own.npy"), field_test_coords(NODES, 3), strict=True):
        assert row["length"] == pytest.approx(lanes_cost(coords, row["tour"]))
        low, high = row["interval"]
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
    monkeypatch.setattr(dreamer, "calibrate_at_end", lambda agent, evaluation: None)
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


def street_rules():
    return TSPRules.under(find_costs("streets", streets="helsinki"))


def places(instance: RoutingInstance) -> list[int]:
    found = in_world(street_rules(), instance).place
    assert found is not None
    return found.tolist()


def test_places_are_read_from_a_column(tmp_path):
    (alone,) = read_instances(write_csv(tmp_path / "a.csv", "place", [[3], [0], [7]]))
    (named,) = read_instances(write_csv(tmp_path / "b.csv", "stop,place", [["a", 3], ["b", 0], ["c", 7]]))
    (beside,) = read_instances(write_csv(tmp_path / "c.csv", "place,x,y", [[3, 1, 2], [0, 2, 3], [7, 5, 5]]))
    (tmp_path / "d.json").write_text('[{"place": 3}, {"place": 0}, {"place": 7}]')
    (listed,) = read_instances(tmp_path / "d.json")
    for each in (alone, named, beside, listed):
        assert each.place is not None and each.place.tolist() == [3, 0, 7]
    assert alone.coords.shape == (3, 0) and beside.coords.tolist() == [[1, 2], [2, 3], [5, 5]]


@pytest.mark.parametrize("first", ["Ayr", "7"])
def test_column_of_names_is_no_column_of_places(tmp_path, first: str):
    (found,) = read_instances(write_csv(tmp_path / "a.csv", "place,x,y", [[first, 1, 2], ["Bath", 2, 3]]))
    assert found.place is None and found.coords.tolist() == [[1, 2], [2, 3]]


def test_places_cost_seconds_of_driving():
    rules = street_rules()
    instance = RoutingInstance("own", "tsp", np.zeros((4, 0)), EXACT, place=np.array([3, 0, 20, 11]))
    found = in_world(rules, instance)
    world: Any = rules.costs
    np.testing.assert_allclose(found.cost_matrix(), world.unit * world.tables[0][found.place][:, found.place])
    assert found.metric == SECONDS
    (solution,) = solved(make_agent(**STREETS), [instance])
    assert writing.answers.length_text(solution.length, found.metric).endswith(" s")


def test_latitudes_and_longitudes_stand_for_the_nearest_places():
    world: Any = street_rules().costs
    chosen = np.array([5, 30, 12])
    metres = world.network.points[world.network.places[chosen]] + 3.0
    ((east, north),) = projected(world.network.middle[None] + 1.0, world.network.middle)
    degrees = world.network.middle + metres / (east, north)
    instance = RoutingInstance("own", "tsp", degrees[:, ::-1], GREAT_CIRCLE)
    assert places(instance) == chosen.tolist()
    with pytest.raises(UserError, match="km from the nearest place of the streets"):
        in_world(street_rules(), instance._replace(coords=degrees[:, ::-1] + 0.1))


def test_positions_in_the_unit_square_stand_for_the_nearest_places():
    world: Any = street_rules().costs
    coords = world.coords[[5, 30, 12]].double().numpy()
    assert places(RoutingInstance("own", "tsp", coords, EXACT)) == [5, 30, 12]
    with pytest.raises(UserError, match="lie in the unit square"):
        in_world(street_rules(), RoutingInstance("own", "tsp", coords + 3, EXACT))


def test_places_that_there_are_not_are_refused():
    instance = RoutingInstance("own", "tsp", np.zeros((2, 0)), EXACT, place=np.array([3, 36]))
    with pytest.raises(UserError, match="has place 36; streets has 0 to 35"):
        in_world(street_rules(), instance)


def test_two_nodes_at_one_place_have_no_way_between_them():
    instance = RoutingInstance("own", "tsp", np.zeros((4, 0)), EXACT, place=np.array([3, 7, 20, 3]))
    (solution,) = solved(make_agent(**STREETS), [instance])
    matrix = forecaster(**STREETS).matrices(
        TSPInstance(torch.from_numpy(solution.instance.coords)[None].float(), place=torch.tensor([[3, 7, 20, 3]]))
    )
    assert matrix[0, 0, 3] == 0.0 and solution.instance.cost_matrix()[0, 3] == 0.0


def test_picture_of_an_answer_in_streets_follows_them(monkeypatch):
    drawn: dict[str, Any] = {}

    def draw(network, tours, **texts):
        drawn.update(texts, places=tours[0].tolist())
        return np.zeros((2, 2, 3), np.uint8)

    monkeypatch.setattr("routing.street_costs.draw_streets", draw)
    instance = RoutingInstance("own", "tsp", np.zeros((3, 0)), EXACT, place=np.array([3, 7, 20]))
    (solution,) = solved(make_agent(**STREETS), [instance])
    solution = solution._replace(length=441.25, forecast=Forecast(400.0, 343.72, 468.7))
    writing.picture_of(solution, street_rules().costs)
    assert drawn["places"] == [[3, 7, 20][node] for node in solution.tour]
    assert drawn["titles"] == ["own: expected 343.7 to 468.7 s"]
    assert drawn["note"] == "in truth 441.2 s; exact search by the model's costs"
