import shutil

import numpy as np
import pytest
import torch
from matplotlib.image import imread

import checkpoint
import config
import dreamer
import launch
import solve
from envs.instances import field_test_coords, tsplib_tour_length
from guard import Guard
from launch import make_generators

NODES = 6
CPU = torch.device("cpu")
TRIANGLE = np.array([[0, 0], [3, 0], [3, 4]])


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    logdir = tmp_path_factory.mktemp("solve") / "run"
    steps = ["--steps", "100", "--checkpoint_every", "50"]
    dreamer.main(["--configs", "debug", "--device", "cpu", "--logdir", str(logdir), *steps])
    return logdir


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


def solve_files(run, folder, *files, options=()):
    solve.main([str(run), *map(str, files), "--out", str(folder / "out"), "--device", "cpu", *options])


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        solve.main([str(argument) for argument in arguments])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return stopped.value.code, lines[0]


def make_agent(**changes):
    settings = config.load(solve.CONFIGS, ["debug"], {}).replace(**changes)
    task, generators = launch.make_task(settings), make_generators(0, CPU)
    return dreamer.Dreamer(task, settings, device=CPU, generators=generators, guard=Guard(CPU))


@pytest.mark.parametrize("count", [3, NODES, 15])
def test_solve_writes_a_tour_of_any_number_of_nodes(run, tmp_path, count):
    coords = np.round(1000 * field_test_coords(count, 1)[0])
    solve_files(run, tmp_path, write_tsp(tmp_path, "own", coords))
    tour = read_tour(tmp_path / "out" / "own.tour")
    assert sorted(tour) == list(range(count))
    header = (tmp_path / "out" / "own.tour").read_text().splitlines()[:4]
    length = tsplib_tour_length(coords, np.array(tour))
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
    rows = [line.split()[:5] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [["whole", "3", "12", "12", "0.00"], ["halved", "3", "7", "7", "0.00"]]


def test_solve_takes_a_checkpoint_and_compares_with_nothing_on_request(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(solve, "lkh_tour", None)
    path = write_tsp(tmp_path, "own", TRIANGLE)
    solve_files(run / "previous.pt", tmp_path, path, options=("--reference", "none"))
    assert capsys.readouterr().out.splitlines()[1].split()[:5] == ["own", "3", "12", "-", "-"]


def test_solve_goes_on_after_a_file_that_cannot_be_solved(run, tmp_path, capsys):
    bad = write_tsp(tmp_path, "bad", TRIANGLE, weights="GEO")
    one_point = write_tsp(tmp_path, "point", np.ones((4, 2)))
    good = write_tsp(tmp_path, "good", TRIANGLE)
    with pytest.raises(SystemExit) as stopped:
        solve_files(run, tmp_path, bad, one_point, good)
    assert stopped.value.code == 1
    captured = capsys.readouterr()
    first, second = captured.err.splitlines()
    assert str(bad) in first and "GEO" in first
    assert str(one_point) in second and "nodes lie at" in second
    assert captured.out.splitlines()[1].startswith("good")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["good.png", "good.tour"]


def test_solve_refuses_a_folder_without_a_run(tmp_path, capsys):
    code, line = refusal(capsys, tmp_path / "nowhere", "own.tsp", "--out", tmp_path / "out")
    assert code == 2 and "nowhere does not exist" in line
    code, line = refusal(capsys, tmp_path, "own.tsp", "--out", tmp_path / "out")
    assert code == 2 and "config.yaml" in line
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
    world = launch.make_world(settings, CPU)
    agent = dreamer.Dreamer(world.task, settings, device=CPU, generators=make_generators(0, CPU), guard=Guard(CPU))
    config.save(settings, tmp_path / "config.yaml")
    checkpoint.save(tmp_path / "latest.pt", {"agent": agent.state_dict(), "step": 0})
    code, line = refusal(capsys, tmp_path, "own.tsp", "--out", tmp_path / "out", "--device", "cpu")
    assert code == 2 and "no routing problem; give a run of a routing task" in line


def test_solve_refuses_files_whose_tours_would_overwrite_each_other(run, tmp_path, capsys):
    code, line = refusal(capsys, run, "a/own.tsp", "b/own.tsp", "--out", tmp_path / "out")
    assert code == 2 and "called own" in line


def test_solve_refuses_an_output_folder_that_is_a_file(run, tmp_path, capsys):
    path = write_tsp(tmp_path, "own", TRIANGLE)
    code, line = refusal(capsys, run, path, "--out", path, "--device", "cpu")
    assert code == 2 and str(path) in line


def test_greedy_tour_refuses_other_numbers_of_nodes_for_an_actor_without_a_pointer():
    agent = make_agent(**{"actor.type": "masked"})
    assert sorted(solve.greedy_tour(agent, field_test_coords(NODES, 1)[0])) == list(range(NODES))
    with pytest.raises(ValueError, match="has 7 nodes, and the run's actor takes 6"):
        solve.greedy_tour(agent, field_test_coords(NODES + 1, 1)[0])


def test_greedy_tour_does_not_depend_on_position_and_size_of_the_instance():
    agent, coords = make_agent(), field_test_coords(12, 1)[0]
    tour = solve.greedy_tour(agent, coords)
    np.testing.assert_array_equal(solve.greedy_tour(agent, 500 * coords - 30), tour)


def test_solution_gap_is_in_percent_and_needs_a_reference():
    solution = solve.Solution(TRIANGLE.astype(float), np.arange(3), length=15, reference=12, seconds=0.0)
    assert solution.gap == pytest.approx(25)
    assert solution._replace(reference=None).gap is None
    assert solution._replace(reference=0).gap is None
