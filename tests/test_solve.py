import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

import checkpoint
import config
import dreamer
import solve
from guard import Guard
from routing import instances
from routing.cvrp import CVRPRules
from routing.files import RoutingInstance
from routing.instances import field_test_coords
from routing.metrics import EXACT, tour_length
from routing.solutions import IllegalSolution, check_solution
from solving import given_costs, ways, writing
from solving.decoding import Decoding
from training import setup
from training.devices import make_generators

NODES = 6
CPU = torch.device("cpu")
ROOT = Path(solve.__file__).parent
# Each takes longer to import than a tour to find, and belongs to training, to pictures or to other solvers.
UNUSED = ("torch._dynamo", "sympy", "matplotlib", "tensorboard", "pyvrp", "training.trainer")
TRIANGLE = np.array([[0, 0], [3, 0], [3, 4]])
# The depot at a corner of a rectangle; to the near corner and back is 6, around the other three 3 + 4 + 5.
RECTANGLE, AMOUNTS = [[0, 0], [0, 3], [4, 3], [4, 0]], [0, 2, 2, 1]


@pytest.fixture(scope="session")
def run(reference):
    return reference.logdir


@pytest.fixture(scope="session")
def cvrp_run(tmp_path_factory):
    logdir = tmp_path_factory.mktemp("solve") / "cvrp"
    steps = ["--steps", "100", "--checkpoint_every", "50", "--prefill", "60"]
    dreamer.main(["--configs", "cvrp_attn", "debug", "--device", "cpu", "--logdir", str(logdir), *steps])
    return logdir


def write_vrp(folder, name, coords, demand, capacity):
    head = [f"NAME : {name}", "TYPE : CVRP", f"DIMENSION : {len(coords)}", "EDGE_WEIGHT_TYPE : EUC_2D"]
    nodes = [f"{number} {x} {y}" for number, (x, y) in enumerate(coords, start=1)]
    amounts = [f"{number} {amount}" for number, amount in enumerate(demand, start=1)]
    parts = [*head, f"CAPACITY : {capacity}", "NODE_COORD_SECTION", *nodes, "DEMAND_SECTION", *amounts]
    path = folder / f"{name}.vrp"
    path.write_text("\n".join([*parts, "DEPOT_SECTION", "1", "-1", "EOF"]) + "\n")
    return path


def write_tsp(folder, name, coords, *, weights="EUC_2D"):
    nodes = [f"{number} {x} {y}" for number, (x, y) in enumerate(coords, start=1)]
    head = [f"NAME: {name}", "TYPE: TSP", f"DIMENSION: {len(coords)}", f"EDGE_WEIGHT_TYPE: {weights}"]
    path = folder / f"{name}.tsp"
    path.write_text("\n".join([*head, "NODE_COORD_SECTION", *nodes, "EOF"]) + "\n")
    return path


def read_tour(path):
    lines = path.read_text().splitlines()
    begin = lines.index("TOUR_SECTION")
    assert lines[-2:] == ["-1", "EOF"]
    return [int(line) - 1 for line in lines[begin + 1 : -2]]


def solve_files(run, folder, *files, options=("--reference", "lkh")):
    solve.main([str(run), *map(str, files), "--out", str(folder / "out"), "--device", "cpu", *options])


def solve_json(capsys, run, *arguments):
    solve.main([str(run), *map(str, arguments), "--device", "cpu", "--json"])
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        solve.main([str(argument) for argument in arguments])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return stopped.value.code, lines[0]


def make_agent(**changes):
    settings = config.load(solve.CONFIGS, ["debug"], {}).replace(**changes)
    task, generators = setup.make_task(settings), make_generators(0, CPU)
    return dreamer.Dreamer.of(task, settings, device=CPU, generators=generators, guard=Guard(CPU))


@pytest.mark.parametrize("count", [3, NODES, 15])
def test_solve_writes_a_tour_of_any_number_of_nodes(run, tmp_path, count):
    coords = np.round(1000 * field_test_coords(count, 1)[0])
    solve_files(run, tmp_path, write_tsp(tmp_path, "own", coords))
    tour = read_tour(tmp_path / "out" / "own.tour")
    assert sorted(tour) == list(range(count))
    header = (tmp_path / "out" / "own.tour").read_text().splitlines()[:4]
    length = tour_length(coords, np.array(tour), "EUC_2D")
    assert header == ["NAME : own.tour", f"COMMENT : length {length}", "TYPE : TOUR", f"DIMENSION : {count}"]


def test_solve_draws_the_tour(run, tmp_path):
    solve_files(run, tmp_path, write_tsp(tmp_path, "own", TRIANGLE))
    picture = imread(tmp_path / "out" / "own.png")
    assert picture.ndim == 3
    assert picture[..., :3].min() < 0.5


def test_solve_prints_lengths_in_the_metric_of_the_file(run, tmp_path, capsys):
    # Legs of 3, 4 and 5 make 12; halved, they are 1.5, 2 and 2.5, which round up to 2, 2 and 3.
    files = [write_tsp(tmp_path, "whole", TRIANGLE), write_tsp(tmp_path, "halved", TRIANGLE / 2)]
    solve_files(run, tmp_path, *files)
    rows = [line.split()[:5] for line in capsys.readouterr().out.splitlines()[1:3]]
    assert rows == [["whole", "3", "12", "12", "0.00"], ["halved", "3", "7", "7", "0.00"]]


def test_solve_takes_a_checkpoint_and_compares_with_what_is_known(run, tmp_path, capsys):
    path = write_tsp(tmp_path, "own", TRIANGLE)
    solve.main([str(run / "previous.pt"), str(path), "--device", "cpu"])
    assert capsys.readouterr().out.splitlines()[1].split()[:5] == ["own", "3", "12", "-", "-"]
    (tmp_path / "own.opt.tour").write_text("TOUR_SECTION\n1\n2\n3\n-1\n")
    solve.main([str(run), str(path), "--device", "cpu"])
    assert capsys.readouterr().out.splitlines()[1].split()[:5] == ["own", "3", "12", "12", "0.00"]
    solve.main([str(run), str(path), "--device", "cpu", "--reference", "none"])
    assert capsys.readouterr().out.splitlines()[1].split()[:5] == ["own", "3", "12", "-", "-"]


def test_solve_prints_one_json_object_with_instances_in_the_order_of_the_input(run, tmp_path, capsys):
    pentagon = np.array([[0.0, 0], [4, 0], [5, 3], [2, 6], [-1, 3]])
    files = [write_tsp(tmp_path, "five", pentagon), write_tsp(tmp_path, "three", TRIANGLE)]
    np.save(tmp_path / "batch.npy", field_test_coords(5, 2))
    result = solve_json(capsys, run, *files, tmp_path / "batch.npy", "--reference", "lkh", "--imagine")
    assert [row["name"] for row in result["instances"]] == ["five", "three", "batch-0", "batch-1"]
    assert [row["n"] for row in result["instances"]] == [5, 3, 5, 5]
    for row, coords in zip(
        result["instances"], [pentagon, TRIANGLE.astype(float), *field_test_coords(5, 2)], strict=True
    ):
        metric = EXACT if row["name"].startswith("batch") else "EUC_2D"
        assert row["length"] == pytest.approx(tour_length(coords, np.array(row["tour"]), metric))
        assert row["gap_percent"] == pytest.approx(100 * (row["length"] / row["reference"] - 1))
        assert sorted(row["imagined_tour"]) == list(range(row["n"]))
    for total, key in (("length", "length"), ("reference", "reference"), ("gap_percent", "gap_percent")):
        assert result[f"mean_{total}"] == pytest.approx(np.mean([row[key] for row in result["instances"]]))
    assert result["seconds"] > 0


def test_solve_draws_random_instances_as_the_field_does(run, capsys):
    result = solve_json(capsys, run, "--random", 3, "--nodes", 7, "--seed", 777)
    coords = np.random.RandomState(777).uniform(size=(3, 7, 2))
    for row, nodes in zip(result["instances"], coords, strict=True):
        assert row["length"] == pytest.approx(tour_length(nodes, np.array(row["tour"]), EXACT))
    assert result["mean_gap_percent"] is None
    assert len(solve_json(capsys, run, "--random", 1)["instances"][0]["tour"]) == NODES


@pytest.mark.parametrize("solver", ["lkh", "pyvrp"])
def test_solve_compares_with_the_solver_asked_for(solver, run, capsys):
    result = solve_json(capsys, run, "--random", 2, "--nodes", 5, "--reference", solver, "--decode", "augment")
    for row, coords in zip(result["instances"], field_test_coords(5, 2, seed=0), strict=True):
        tour = instances.reference_tour(instances.euclidean_distances(coords))
        assert row["reference"] == pytest.approx(tour_length(coords, tour, EXACT))


def test_solve_refuses_the_files_of_another_problem(run, tmp_path, capsys):
    demand = np.array([[0, 1, 1, 1, 1]])
    np.savez(tmp_path / "batch.npz", coords=field_test_coords(5, 1), demand=demand, capacity=np.array(3))
    code, line = refusal(capsys, run, tmp_path / "batch.npz", "--device", "cpu")
    assert code == 1 and "batch.npz is a cvrp instance, and the run was trained on tsp" in line


@pytest.mark.parametrize(
    "arguments",
    [
        *([], ["a.tsp", "--random", "3"], ["--random", "0"], ["--random", "1", "--seed", "-1"]),
        # Options that change nothing, and abbreviated options.
        *(["a.tsp", "--samples", "8"], ["a.tsp", "--decode", "augment", "--samples", "8"], ["a.tsp", "--nodes", "8"]),
        *(["a.tsp", "--seconds", "2"], ["a.tsp", "--decode", "plan", "--seconds", "2"]),
        *(["a.tsp", "--decode", "augment", "--seconds", "0"], ["a.tsp", "--polish", "-1"]),
        *(["a.tsp", "--decode", "sample", "--seconds", "2", "--samples", "8"], ["a.tsp", "--polish", "often"]),
        *(["a.tsp", "--decode", "reconstruct", "--imagine"], ["a.tsp", "--width", "3"]),
        ["a.tsp", "--decode", "beam", "--width", "0"],
        *(["a.tsp", "--seed", "8"], ["--rand", "3"], ["--random", "3", "--dec", "sample"]),
    ],
)
def test_solve_refuses_a_command_line_that_says_too_much_or_too_little(arguments, run, capsys):
    with pytest.raises(SystemExit) as stopped:
        solve.main([str(run), *arguments])
    assert stopped.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_solve_checks_every_solution_against_the_rules(run, monkeypatch):
    agent, case = make_agent(), RoutingInstance("own", "tsp", TRIANGLE.astype(float), "EUC_2D")
    monkeypatch.setattr(ways, "best_tours", lambda *arguments, **_: [np.array([0, 1, 1])])
    with pytest.raises(IllegalSolution, match="exactly once"):
        solve.solve(agent, [case], Decoding())


def test_solve_goes_on_after_a_file_that_cannot_be_solved(run, tmp_path, capsys):
    bad = write_tsp(tmp_path, "bad", TRIANGLE, weights="XRAY1")
    one_node = write_tsp(tmp_path, "none", np.ones((0, 2)))
    good = write_tsp(tmp_path, "good", TRIANGLE)
    with pytest.raises(SystemExit) as stopped:
        solve_files(run, tmp_path, bad, one_node, good)
    assert stopped.value.code == 1
    captured = capsys.readouterr()
    first, second = captured.err.splitlines()
    assert str(bad) in first and "XRAY1" in first
    assert str(one_node) in second and "DIMENSION is '0'" in second
    assert captured.out.splitlines()[1].startswith("good")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["good.png", "good.tour"]


def test_solve_refuses_a_folder_without_a_run(tmp_path, capsys):
    code, line = refusal(capsys, tmp_path / "nowhere", "own.tsp", "--out", tmp_path / "out")
    assert code == 2 and "nowhere does not exist" in line
    code, line = refusal(capsys, tmp_path, "own.tsp", "--out", tmp_path / "out")
    assert code == 2 and "has no checkpoint yet" in line
    assert not (tmp_path / "out").exists()


def test_solve_refuses_a_run_without_a_readable_checkpoint(run, tmp_path, capsys):
    shutil.copy(run / "config.yaml", tmp_path)
    code, line = refusal(capsys, tmp_path, "own.tsp", "--out", tmp_path / "out")
    assert code == 2 and f"{tmp_path} has no checkpoint yet" in line
    (tmp_path / "latest.pt").write_bytes((run / "latest.pt").read_bytes()[:1000])
    code, line = refusal(capsys, tmp_path, "own.tsp", "--out", tmp_path / "out")
    assert code == 2 and f"{tmp_path / 'latest.pt'} is empty, truncated" in line


def test_solve_takes_the_checkpoint_before_a_broken_one_and_says_so(run, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    (broken / "latest.pt").write_bytes(b"no checkpoint")
    solve_files(broken, tmp_path, write_tsp(tmp_path, "own", TRIANGLE))
    captured = capsys.readouterr()
    assert f"Going on from {broken / 'previous.pt'}" in captured.err
    assert captured.out.splitlines()[1].split()[:3] == ["own", "3", "12"]


def test_solve_refuses_weights_of_another_config(run, tmp_path, capsys):
    checkpoint.save(tmp_path / "latest.pt", checkpoint.load(run / "latest.pt", CPU))
    config.save(config.read(run / "config.yaml").replace(**{"actor.pointer.width": 8}), tmp_path / "config.yaml")
    code, line = refusal(capsys, tmp_path, "own.tsp", "--out", tmp_path / "out", "--device", "cpu")
    assert code == 2 and "does not fit this config" in line


def test_solve_takes_the_run_of_an_older_version(run, tmp_path, capsys):
    old = tmp_path / "old"
    shutil.copytree(run, old)
    text = (run / "config.yaml").read_text()
    assert "imag_first: any\n" in text and "  depth: 4\n" in text
    (old / "config.yaml").write_text(text.replace("imag_first: any\n", "").replace("  depth: 4\n", ""))
    path = write_tsp(tmp_path, "own", TRIANGLE)
    solve_files(old, tmp_path, path)
    assert capsys.readouterr().out.splitlines()[1].split()[:5] == ["own", "3", "12", "12", "0.00"]


def test_solve_refuses_a_run_of_no_routing_task(tmp_path, capsys):
    settings = config.load(solve.CONFIGS, ["debug"], {"task": "gym_TMaze-v0"})
    made = setup.make_setup(settings, CPU)
    agent = dreamer.Dreamer.of(made.task, settings, device=CPU, generators=make_generators(0, CPU), guard=Guard(CPU))
    config.save(settings, tmp_path / "config.yaml")
    checkpoint.save(tmp_path / "latest.pt", {"agent": agent.state_dict(), "step": 0})
    code, line = refusal(capsys, tmp_path, "own.tsp", "--out", tmp_path / "out", "--device", "cpu")
    assert code == 2 and "no routing problem; give a run of a routing task" in line


def test_solve_refuses_files_whose_tours_would_overwrite_each_other(run, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    files = [write_tsp(tmp_path / name, "own", TRIANGLE) for name in ("a", "b")]
    code, line = refusal(capsys, run, *files, "--out", tmp_path / "out", "--device", "cpu")
    assert code == 2 and "called own" in line


def test_solve_refuses_an_output_folder_that_is_a_file(run, tmp_path, capsys):
    path = write_tsp(tmp_path, "own", TRIANGLE)
    code, line = refusal(capsys, run, path, "--out", path, "--device", "cpu")
    assert code == 2 and str(path) in line


def test_solve_leaves_no_folder_where_nothing_could_be_solved(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        solve_files(run, tmp_path, tmp_path / "missing.tsp")
    assert stopped.value.code == 1 and not (tmp_path / "out").exists()


def test_solve_answers_on_the_screen_before_it_fails_to_write(run, tmp_path, capsys, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "write", full)
    with pytest.raises(SystemExit) as stopped:
        solve_files(run, tmp_path, write_tsp(tmp_path, "own", TRIANGLE))
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.out.splitlines()[1].split()[:3] == ["own", "3", "12"]
    assert f"--out {tmp_path / 'out'} cannot be written to (No space" in captured.err.splitlines()[-1]


def test_solve_says_where_files_went_and_shows_tours_counted_from_one(run, tmp_path, capsys):
    solve_files(run, tmp_path, write_tsp(tmp_path, "own", TRIANGLE))
    lines = capsys.readouterr().out.splitlines()
    assert str(tmp_path / "out" / "own.tour") in lines[-1]
    (shown,) = [line.split() for line in lines if line.startswith("own:")]
    assert sorted(shown[1:]) == ["1", "2", "3"]


def test_solve_keeps_the_answers_of_others_where_one_is_too_large(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("system.memory.memory_at_hand", lambda: 10**6)
    files = [write_tsp(tmp_path, "large", field_test_coords(500, 1)[0]), write_tsp(tmp_path, "own", TRIANGLE)]
    monkeypatch.setattr("solving.decoding.WORKING_NUMBERS", 10**6)
    with pytest.raises(SystemExit) as stopped:
        solve_files(run, tmp_path, *files)
    captured = capsys.readouterr()
    assert stopped.value.code == 1 and captured.out.splitlines()[1].split()[:5] == ["own", "3", "12", "12", "0.00"]
    (line,) = [line for line in captured.err.splitlines() if "large" in line]
    assert "has 500 nodes" in line and "1 MB are free" in line


def test_solve_keeps_the_answers_of_others_where_memory_runs_out(run, tmp_path, capsys, monkeypatch):
    whole = ways.best_tours

    def short(behavior, group, decoding, **keywords):
        if len(group[0].coords) == 5:
            raise MemoryError
        return whole(behavior, group, decoding, **keywords)

    monkeypatch.setattr(ways, "best_tours", short)
    files = [write_tsp(tmp_path, "large", field_test_coords(5, 1)[0]), write_tsp(tmp_path, "own", TRIANGLE)]
    with pytest.raises(SystemExit) as stopped:
        solve_files(run, tmp_path, *files)
    captured = capsys.readouterr()
    assert stopped.value.code == 1 and captured.out.splitlines()[1].startswith("own")
    assert "large.tsp ran out of memory" in captured.err


def test_solve_keeps_an_answer_that_there_is_no_reference_for(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("system.memory.memory_at_hand", lambda: given_costs.LEG_BYTES * 10)
    files = [write_tsp(tmp_path, "five", field_test_coords(5, 1)[0]), write_tsp(tmp_path, "own", TRIANGLE)]
    solve_files(run, tmp_path, *files)
    captured = capsys.readouterr()
    rows = {line.split()[0]: line.split()[3] for line in captured.out.splitlines()[1:3]}
    assert rows == {"five": "-", "own": "12"}
    assert "five has no reference: lkh for 5 nodes needs" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--random", "1e9"], "1,000,000,000 random instances of 6 nodes take"),
        (["--random", "1", "--nodes", "1e8"], "every random instance has 100,000,000 nodes"),
        (["--random", "1", "--decode", "sample", "--samples", "1e12"], "samples is 1,000,000,000,000"),
    ],
)
def test_solve_refuses_what_no_memory_holds_in_one_line(arguments, message, run, capsys):
    code, line = refusal(capsys, run, *arguments, "--device", "cpu")
    assert code == 2 and message in line


def test_solve_refuses_more_cvrp_instances_than_memory_holds(cvrp_run, capsys, monkeypatch):
    # The field's set is drawn whole, however few are asked for.
    monkeypatch.setattr("system.memory.memory_at_hand", lambda: solve.NODE_BYTES * 20 * 9_000)
    code, line = refusal(capsys, cvrp_run, "--random", 1, "--nodes", 20, "--device", "cpu")
    assert code == 2 and "1 random instances of 20 nodes take" in line


def test_solve_goes_on_where_the_reader_of_its_output_has_left(run, tmp_path):
    path = write_tsp(tmp_path, "own", TRIANGLE)
    program = [sys.executable, solve.__file__, str(run), str(path), "--out", str(tmp_path / "out"), "--device", "cpu"]
    reader, writer = os.pipe()
    os.close(reader)
    finished = subprocess.run(program, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert finished.returncode == 0 and b"BrokenPipe" not in finished.stderr
    assert (tmp_path / "out" / "own.tour").exists()


def test_solve_refuses_a_plan_with_more_routes_than_vehicles(cvrp_run, tmp_path, capsys):
    path = write_vrp(tmp_path, "own", RECTANGLE, AMOUNTS, 3)
    # Demands of 2, 2 and 1 and a capacity of 3 need two routes.
    path.write_text(path.read_text().replace("CAPACITY", "VEHICLES : 1\nCAPACITY"))
    with pytest.raises(SystemExit):
        solve_files(cvrp_run, tmp_path, path, options=())
    captured = capsys.readouterr()
    assert "own.vrp may use 1 vehicles, and the best plan found has" in captured.err
    assert not (tmp_path / "out").exists()


def test_solution_gap_is_in_percent_and_needs_a_reference():
    case = RoutingInstance("own", "tsp", TRIANGLE.astype(float), "EUC_2D")
    solution = solve.Solution(case, np.arange(3), length=15, reference=12, seconds=0.0)
    assert solution.gap == pytest.approx(25)
    assert solution._replace(reference=None).gap is None
    assert solution._replace(reference=0).gap is None


def test_solve_writes_the_plan_of_a_cvrp_file(cvrp_run, tmp_path, capsys):
    path = write_vrp(tmp_path, "own", RECTANGLE, AMOUNTS, 3)
    solve_files(cvrp_run, tmp_path, path, options=("--decode", "augment", "--reference", "pyvrp"))
    assert capsys.readouterr().out.splitlines()[1].split()[:5] == ["own", "4", "18", "18", "0.00"]
    plan = (tmp_path / "out" / "own.sol").read_text().splitlines()
    assert plan[-1] == "Cost: 18" and len(plan) == 3
    assert imread(tmp_path / "out" / "own.png").ndim == 3


def test_solve_prints_plans_that_begin_at_the_depot_and_pass_it_between_routes(cvrp_run, capsys):
    result = solve_json(capsys, cvrp_run, "--random", 3, "--nodes", 12, "--imagine", "--reference", "pyvrp")
    drawn = CVRPRules.field_instances(3, 12, seed=0)
    for row, coords, demand in zip(result["instances"], drawn.coords.numpy(), drawn.demand.numpy(), strict=True):
        case = RoutingInstance("", "cvrp", coords, EXACT, demand, int(drawn.capacity[0]))
        for tour, length in ((row["tour"], "length"), (row["imagined_tour"], "imagined_real_length")):
            check_solution(case, np.array(tour))
            assert row[length] == pytest.approx(tour_length(coords, np.array(tour), EXACT))
        assert row["gap_percent"] > -1e-3


def test_solve_refuses_a_reference_that_does_not_know_the_problem(cvrp_run, capsys):
    code, line = refusal(capsys, cvrp_run, "--random", 1, "--reference", "lkh", "--device", "cpu")
    assert code == 2 and "give --reference pyvrp" in line


CVRPLIB = Path(solve.__file__).parents[1] / "shared" / "data" / "cvrplib"


@pytest.mark.skipif(not CVRPLIB.is_dir(), reason="the library's files are not here")
def test_solve_takes_every_file_of_the_library(cvrp_run, capsys):
    # A line of this one is damaged.
    files = [path for path in sorted(CVRPLIB.glob("*.vrp")) if path.stem != "A-n80-k10"]
    rows = solve_json(capsys, cvrp_run, *files, "--decode", "greedy")["instances"]
    assert [row["name"] for row in rows] == [path.stem for path in files]
    assert all(row["gap_percent"] > 0 for row in rows)


@pytest.mark.run
def test_solving_a_file_imports_nothing_that_it_does_not_use(tmp_path):
    path = write_tsp(tmp_path, "triangle", TRIANGLE)
    program = (
        "import sys, torch\nbefore = set(sys.modules)\nimport solve\nsolve.main(sys.argv[1:])\n"
        f"print('unused:', [name for name in {UNUSED} if name in sys.modules and name not in before])"
    )
    arguments = [str(ROOT / "checkpoints" / "tsp20.pt"), str(path), "--device", "cpu"]
    finished = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "triangle: 1 2 3" in finished.stdout or "triangle: 1 3 2" in finished.stdout
    assert finished.stdout.splitlines()[-1] == "unused: []"


@pytest.mark.run
def test_run_of_compiled_updates_is_loaded_with_its_code_as_written(run, tmp_path, capsys):
    compiled = tmp_path / "compiled"
    shutil.copytree(run, compiled)
    settings = compiled / "config.yaml"
    settings.write_text(settings.read_text().replace("compile: none", "compile: kernels"))
    agent = solve.load_agent(compiled, CPU)
    assert agent.compiled == "none" and agent.imagination.stops_early
    assert "compile" not in "".join(capsys.readouterr())
