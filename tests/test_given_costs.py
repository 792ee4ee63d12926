"""Matrices of costs answered by a solver, from the file to the picture, without a model."""

import itertools
import json
import multiprocessing
import signal
from pathlib import Path

import numpy as np
import pytest

import solve
from routing.files import RoutingInstance
from routing.matrices import as_costs, without_positions
from routing.metrics import GIVEN
from routing.solutions import IllegalSolution
from solving import given_costs, writing
from solving.answers import Solution
from solving.given_costs import solve_given, solver_tour
from system.memory import NotEnoughMemory

# The cheapest way round is 0 3 1 2: 9 + 2 + 5 + 1; the other way round it costs 6 + 4 + 3 + 6.
ONE_WAY = [[0, 8, 6, 9], [7, 0, 5, 3], [1, 4, 0, 8], [6, 2, 9, 0]]
DEMAND = np.array([0, 2, 2, 1])
SHARED = Path(solve.__file__).parents[1] / "shared" / "data"
BEST_KNOWN = {"br17": 39, "ft53": 6905, "ftv33": 1286, "ftv35": 1473, "ry48p": 14422, "gr17": 2085, "bays29": 2020}


def instance_of(costs, name="own", **parts):
    costs = np.asarray(costs, dtype=float)
    return RoutingInstance(name, "tsp", without_positions(len(costs)), GIVEN, costs=as_costs(costs), **parts)


def answers(*instances, **options):
    """What `solve_given` finds, where it finds something for all."""
    found = solve_given(instances, **options)
    solutions = [each for each in found if isinstance(each, Solution)]
    assert len(solutions) == len(instances), found
    return solutions


def vehicles(costs, **parts):
    return instance_of(costs, demand=DEMAND, capacity=3, **parts)._replace(problem="cvrp")


def write_matrix(folder, name="own.csv", costs=ONE_WAY):
    path = folder / name
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in costs))
    return path


def random_costs(count, seed=0):
    return np.random.default_rng(seed).integers(1, 1000, (count, count))


def run(capsys, *arguments):
    solve.main([*map(str, arguments)])
    return capsys.readouterr()


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        solve.main([str(argument) for argument in arguments])
    return stopped.value.code, capsys.readouterr().err.splitlines()[-1]


def shortest(costs):
    costs = np.asarray(costs)
    orders = np.array([(0, *order) for order in itertools.permutations(range(1, len(costs)))])
    return costs[orders, np.roll(orders, -1, axis=1)].sum(1).min()


def test_solve_answers_a_matrix_without_a_model(tmp_path, capsys):
    shown = run(capsys, "none", write_matrix(tmp_path), "--out", tmp_path / "out").out
    head, row, *_ = shown.splitlines()
    assert head.endswith("chosen by") and row.split()[:3] == ["own", "4", "17"]
    assert row.endswith("exact search, no model") and "own: 1 4 2 3" in shown
    written = (tmp_path / "out" / "own.tour").read_text().splitlines()
    assert written[1] == "COMMENT : length 17" and written[5:9] == ["1", "4", "2", "3"]
    assert (tmp_path / "out" / "own.png").stat().st_size > 1000


def test_solve_says_in_json_who_chose_and_that_no_model_did(tmp_path, capsys):
    (row,) = json.loads(run(capsys, "none", write_matrix(tmp_path), "--json").out)["instances"]
    assert (row["chosen_by"], row["by_model"], row["length"]) == ("exact search", False, 17)
    assert row["seconds"] > 0 and isinstance(row["length"], int)


def test_solve_says_in_the_picture_who_chose_and_that_places_are_laid_out(tmp_path, monkeypatch):
    drawn = {}

    def draw(coords, tour, **texts):
        drawn.update(texts)
        return np.zeros((2, 2, 3), np.uint8)

    monkeypatch.setattr(writing, "draw_tour", draw)
    (solution,) = answers(instance_of(ONE_WAY))
    writing.write(solution, tmp_path, None)
    assert drawn["title"] == "own: length 17"
    assert drawn["note"] == "chosen by exact search, no model; places laid out by costs, not where they are"
    writing.write(solution._replace(instance=instance_of(ONE_WAY)._replace(coords=np.ones((4, 2)))), tmp_path, None)
    assert drawn["note"] == "chosen by exact search, no model"


def test_solve_compares_a_matrix_with_the_known_tour_beside_it(tmp_path, capsys):
    path = write_matrix(tmp_path)
    # The other way round: 6 + 4 + 3 + 6.
    (tmp_path / "own.opt.tour").write_text("TOUR_SECTION\n1\n3\n2\n4\n-1\n")
    assert run(capsys, "none", path).out.splitlines()[1].split()[:5] == ["own", "4", "17", "19", "-10.53"]
    assert run(capsys, "none", path, "--reference", "lkh").out.splitlines()[1].split()[:5] == [
        *("own", "4", "17"),
        *("17", "0.00"),
    ]


def test_solve_compares_lkh_with_pyvrp_on_a_matrix(tmp_path, capsys):
    path = write_matrix(tmp_path, costs=random_costs(12))
    (row,) = json.loads(run(capsys, "none", path, "--reference", "pyvrp", "--json").out)["instances"]
    assert row["chosen_by"] == "LKH" and row["gap_percent"] == pytest.approx(0, abs=1)


def test_solve_answers_positions_too_without_a_model(tmp_path, capsys):
    path = tmp_path / "own.csv"
    path.write_text("0,0\n3,0\n3,4\n")
    row = run(capsys, "none", path).out.splitlines()[1]
    assert row.split()[:3] == ["own", "3", "12"] and row.endswith("exact search, no model")


def test_solve_has_a_solver_answer_matrices_beside_a_run(reference, tmp_path, capsys):
    row = run(capsys, reference.logdir, write_matrix(tmp_path), "--decode", "plan", "--device", "cpu").out.splitlines()[
        1
    ]
    assert row.split()[:3] == ["own", "4", "17"] and row.endswith("exact search, no model")


def test_solve_says_that_a_network_chose(reference, tmp_path, capsys):
    path = tmp_path / "own.csv"
    path.write_text("0,0\n3,0\n3,4\n")
    assert run(capsys, reference.logdir, path, "--device", "cpu").out.splitlines()[1].endswith(" network")


def test_solve_refuses_a_matrix_that_a_network_would_have_to_read(reference, tmp_path, capsys):
    code, line = refusal(capsys, reference.logdir, write_matrix(tmp_path), "--device", "cpu")
    assert code == 1 and line.endswith(
        "is a matrix of costs, which this run's network does not read (those of task atsp do); --decode plan has a"
        " solver answer"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["own.csv", "--decode", "greedy"], "--decode greedy is of a network"),
        (["--random", "3"], "--random draws what a run was trained on"),
        (["own.csv", "--imagine"], "--imagine asks a model"),
        (["own.csv", "--trust"], "--trust is of code that a run names"),
    ],
)
def test_solve_refuses_without_a_run_what_takes_a_model(arguments, message, capsys):
    code, line = refusal(capsys, "none", *arguments)
    assert code == 2 and message in line


def test_solve_refuses_lkh_for_vehicles_before_it_solves(tmp_path, capsys):
    np.savez(tmp_path / "own.npz", costs=np.array(ONE_WAY), demand=DEMAND, capacity=3)
    code, line = refusal(capsys, "none", tmp_path / "own.npz", "--reference", "lkh")
    assert code == 2 and "LKH solves no cvrp instances here; give --reference pyvrp" in line


def test_solve_writes_the_plan_of_vehicles_by_given_costs(tmp_path, capsys):
    np.savez(tmp_path / "own.npz", costs=np.array(ONE_WAY), demand=DEMAND, capacity=3)
    run(capsys, "none", tmp_path / "own.npz", "--out", tmp_path / "out")
    # 0 3 1 0 and 0 2 0 cost 9 + 2 + 7 + 6 + 1; the other way round, 0 1 3 0 costs 8 + 3 + 6.
    assert (tmp_path / "out" / "own.sol").read_text().splitlines()[-1] == "Cost: 24"


def test_solver_tour_finds_the_best_of_all_tours():
    for count, seed in ((3, 0), (7, 1), (10, 2)):
        costs = random_costs(count, seed)
        np.fill_diagonal(costs, 0)
        instance = instance_of(costs)
        # Beyond ten nodes there are too many to try.
        best = shortest(costs) if count < 10 else instance.tour_length(solver_tour(instance, "pyvrp"))
        assert instance.tour_length(solver_tour(instance, "lkh")) == best


def test_long_work_tells_of_what_takes_minutes():
    large = instance_of(np.ones((1000, 1000)), "large")
    lines = given_costs.long_work([large, large._replace(demand=np.zeros(1000, int)), instance_of(ONE_WAY)])
    assert lines == ["large has 1,000 nodes: LKH may take some 7 minutes"]


@pytest.mark.parametrize("count", [1, 2])
def test_solve_given_answers_what_has_one_tour(count):
    (solution,) = answers(instance_of(np.ones((count, count))))
    assert solution.tour.tolist() == list(range(count)) and solution.length == (0 if count == 1 else 2)


@pytest.mark.parametrize("unit", [1, 0.001])
def test_solver_tour_tells_costs_apart_where_most_ways_are_closed(unit):
    costs = random_costs(30, seed=3) * unit
    best = instance_of(costs).tour_length(solver_tour(instance_of(costs), "lkh"))
    # The best tour stays open, and so does every third other way.
    tour, is_open = solver_tour(instance_of(costs), "lkh"), np.random.default_rng(3).uniform(size=costs.shape) < 0.3
    is_open[tour, np.roll(tour, -1)] = True
    closed = instance_of(np.where(is_open, costs, 1e9))
    assert closed.tour_length(solver_tour(closed, "lkh")) == pytest.approx(best)


def test_solver_tour_tells_costs_of_vehicles_apart_where_ways_are_closed():
    costs = np.array(ONE_WAY)
    # The best plan needs neither.
    costs[1, 2], costs[3, 2] = 10**9, 10**9
    instance = vehicles(costs)
    assert instance.tour_length(solver_tour(instance, "pyvrp")) == 24


def test_solve_given_solves_large_ones_beside_each_other_and_in_order(monkeypatch):
    monkeypatch.setattr(given_costs, "NODES_WORTH_A_PROCESS", 12)
    cases = [instance_of(random_costs(count, count), name=f"own{count}") for count in (12, 4, 11)]
    counted: list[int] = []
    found = answers(*cases, progress=counted.append)
    assert [(each.instance.name, len(each.tour)) for each in found] == [("own12", 12), ("own4", 4), ("own11", 11)]
    assert counted == [12, 4, 11]
    monkeypatch.undo()
    (alone,) = answers(cases[0])
    assert alone.tour.tolist() == found[0].tour.tolist()


def test_solve_given_ends_its_processes_where_it_is_interrupted(monkeypatch):
    monkeypatch.setattr(given_costs, "NODES_WORTH_A_PROCESS", 12)
    before = set(multiprocessing.active_children())
    started: set[multiprocessing.process.BaseProcess] = set()

    def interrupt(nodes):
        started.update(set(multiprocessing.active_children()) - before)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        solve_given([instance_of(random_costs(12)), instance_of(random_costs(250))], progress=interrupt)
    # Ended, rather than waited for.
    assert -signal.SIGTERM in {process.exitcode for process in started}


def test_solve_given_says_what_no_memory_holds(monkeypatch):
    monkeypatch.setattr("system.memory.memory_at_hand", lambda: 100)
    (short,) = solve_given([instance_of(ONE_WAY)])
    assert isinstance(short, NotEnoughMemory) and str(short).startswith("cannot be solved: lkh for 4 nodes needs")


def test_solve_given_goes_on_where_one_runs_out_of_memory(monkeypatch):
    whole = given_costs.solver_tour

    def exhausted(instance, solver):
        if instance.name == "large":
            raise MemoryError
        return whole(instance, solver)

    monkeypatch.setattr(given_costs, "solver_tour", exhausted)
    short, solution = solve_given([instance_of(ONE_WAY, "large"), instance_of(ONE_WAY)])
    assert "ran out of memory" in str(short)
    assert isinstance(solution, Solution) and solution.length == 17


def test_solve_given_checks_what_solvers_answer(monkeypatch):
    monkeypatch.setattr(given_costs, "solver_tour", lambda instance, solver: np.array([0, 1, 1, 2]))
    with pytest.raises(IllegalSolution, match="exactly once"):
        solve_given([instance_of(ONE_WAY)])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the libraries' files are not here")
def test_solve_finds_the_optima_of_the_library_by_given_costs(capsys):
    files = [path for path in SHARED.rglob("*.*tsp") if path.stem in BEST_KNOWN]
    rows = json.loads(run(capsys, "none", *files, "--json").out)["instances"]
    assert {row["name"]: row["length"] for row in rows} == BEST_KNOWN
