"""Agents as ONNX graphs: they choose what the agent chooses, for instances and environments of any number."""

import json
import runpy
import subprocess
import sys
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

import checkpoint
import config
import export
import solve
from config import ConfigError, UserError
from dreamer import load
from exporting import files
from exporting.graphs import Agreement, compared
from routing.cvrp import CVRPRules
from solving.decoding import Decoding
from tests.conftest import shapes_executed
from tests.test_playing import SMALL, make_weights

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.run

CPU = torch.device("cpu")
CHECKPOINTS = Path(export.__file__).parent / "checkpoints"
TOWN = Path(export.__file__).parent / "examples" / "town.tsp"


@pytest.fixture(scope="module")
def tsp(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "tsp20"
    # What is traced has no shapes to execute.
    with shapes_executed(False):
        export.main([str(CHECKPOINTS / "tsp20.pt"), str(folder), "--format", "onnx"])
    return folder


def graphs(folder: Path, *names: str) -> dict[str, Any]:
    return {name: files.runner(folder / f"{name}.onnx") for name in names}


def runs_of(weights: Path, folder: Path, through: str) -> dict[str, Any]:
    """What runs the graphs of weights: PyTorch what they are made of, or ONNX Runtime what they have become."""
    if through == "onnx":
        export.onnx_folder(weights, folder)
        return graphs(folder, *(path.stem for path in folder.glob("*.onnx")))

    def run(module: torch.nn.Module, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.no_grad():
            outputs = module({name: torch.from_numpy(np.ascontiguousarray(part)) for name, part in feeds.items()})
        return {name: part.numpy() for name, part in outputs.items()}

    made = files.export_of(export._loaded(weights, trust=False)[1]).graphs
    names = {graph.name: set(graph.inputs) for graph in made}
    return {
        graph.name: lambda feeds, graph=graph: run(graph.module, {name: feeds[name] for name in names[graph.name]})
        for graph in made
    }


def solved(run: dict[str, Any], given: dict[str, np.ndarray], queries: int = 1) -> list[list[int]]:
    """Greedy tours by the two graphs of a routing problem, without the steps in which they wait at their first node."""
    start = np.zeros((len(next(iter(given.values()))), queries), np.int64)
    known = {**given, "start": start, "prev_action": start, "is_first": start == 0}
    known |= run["encode"](known)
    tours = [start]
    while True:
        known |= {name.removeprefix("next_"): value for name, value in known.items() if name.startswith("next_")}
        known |= run["step"](known)
        if known["finished"].all():
            return [np.trim_zeros(tour, "b").tolist() for tour in np.stack(tours, -1)[:, 0]]
        known |= {"prev_action": known["logits"].argmax(-1), "is_first": start > 0}
        tours.append(known["prev_action"])


def without_torch(folder: Path) -> dict[str, Any]:
    """The program beside the graphs, as a module's names."""
    return runpy.run_path(str(folder / "solve_onnx.py"))


def decoded(weights: Path, instances: list[Any], method: str = "greedy") -> list[list[int]]:
    found = solve.solve(solve.load_agent(weights, CPU), instances, Decoding(method=method))
    assert not any(isinstance(each, UserError) for each in found)
    return [each.tour.tolist() for each in found]  # type: ignore[union-attr]


def drawn(weights: Path, count: int, nodes: int) -> list[Any]:
    return solve.random_instances(solve.load_agent(weights, CPU), count, nodes, seed=3)


def test_graphs_of_tsp_find_the_tours_that_decoding_finds_whatever_the_number_of_nodes(tsp: Path):
    program, run = without_torch(tsp), graphs(tsp, "encode", "step")
    assert run.keys() == {"encode", "step"}
    sessions = program["load"]("encode"), program["load"]("step")
    for count, nodes in ((3, 9), (1, 20), (2, 130)):
        instances = drawn(CHECKPOINTS / "tsp20.pt", count, nodes)
        coords = np.stack([each.coords for each in instances])
        tours = program["tours"](*sessions, coords, np.zeros((count, 1)))
        assert tours[:, 0].tolist() == decoded(CHECKPOINTS / "tsp20.pt", instances)


def test_graphs_begin_tours_where_they_are_told_to(tsp: Path):
    program = without_torch(tsp)
    coords = np.random.default_rng(0).uniform(size=(2, 8, 2))
    tours = program["tours"](program["load"]("encode"), program["load"]("step"), coords, np.tile([5, 0, 7], (2, 1)))
    assert tours.shape == (2, 3, 8) and tours[:, :, 0].tolist() == [[5, 0, 7]] * 2
    assert (np.sort(tours, -1) == np.arange(8)).all()


def test_graphs_pass_over_what_stands_before_a_first_step(tsp: Path):
    run, start = graphs(tsp, "encode", "step"), np.zeros((2, 1), np.int64)
    coords = np.random.default_rng(0).uniform(size=(2, 8, 2)).astype(np.float32)
    known = {
        name.removeprefix("next_"): part for name, part in run["encode"]({"coords": coords, "start": start}).items()
    }
    for is_first, same in ((True, True), (False, False)):
        begun, other = (
            run["step"]({**known, "prev_action": start + node, "is_first": np.full_like(start, is_first, np.bool_)})
            for node in (0, 5)
        )
        assert (begun["logits"] == other["logits"]).all() == same
        assert (other["next_visited"].sum(-1) == (1 if is_first else 2)).all()


@pytest.mark.parametrize("method", ["greedy", "augment"])
def test_solve_onnx_finds_what_solve_finds_in_a_file_without_torch(method: str, tsp: Path):
    flags = ["--augment"] if method == "augment" else []
    # A module that cannot be imported: whoever needs PyTorch fails.
    code = (
        "import runpy, sys; sys.modules['torch'] = None; del sys.argv[0]; runpy.run_path(sys.argv[0], None, '__main__')"
    )
    command = [sys.executable, "-c", code, str(tsp / "solve_onnx.py"), str(TOWN), *flags]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (instance,) = solve.read_instances(TOWN)
    (tour,) = decoded(CHECKPOINTS / "tsp20.pt", [instance], method)
    head, _, found = told.strip().partition(", tour ")
    assert head == f"{TOWN}: length {instance.tour_length(np.array(tour)):g}"
    # Several first nodes may lead to the same round.
    rounds = [deque(nodes) for nodes in (tour, [int(node) - 1 for node in found.split()])]
    for each in rounds:
        each.rotate(-each.index(0))
    assert rounds[0] == rounds[1]


@pytest.mark.parametrize(
    "text",
    [None, "NODE_COORD_SECTION\n1 2 3\n", "EDGE_WEIGHT_TYPE: GEO\nNODE_COORD_SECTION\n1 2 3\n2 3 4\n3 5 6\nEOF\n", "x"],
)
def test_solve_onnx_refuses_files_in_one_line(text: str | None, tsp: Path, tmp_path: Path):
    path = tmp_path / "own.tsp"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as refused:
        without_torch(tsp)["read"](path)
    assert str(refused.value).startswith(
        f"solve_onnx.py: {path} is no TSPLIB file of three nodes or more"
    ) and "\n" not in str(refused.value)


THROUGH = pytest.mark.parametrize("through", ["torch", pytest.param("onnx", marks=pytest.mark.slow)])


@THROUGH
def test_graphs_of_cvrp_step_the_rules(through: str, tmp_path: Path):
    weights = CHECKPOINTS / "cvrp20.pt"
    run, instances = runs_of(weights, tmp_path, through), drawn(weights, 4, 12)
    parts = CVRPRules.field_instances(4, 12, seed=3)
    given = {name: getattr(parts, name).numpy() for name in ("demand", "capacity")}
    given["coords"] = np.stack([each.coords for each in instances]).astype(np.float32)
    expected = [np.trim_zeros(np.array(plan), "b").tolist() for plan in decoded(weights, instances)]
    assert solved(run, given) == expected and any(0 in plan[1:] for plan in expected)


@THROUGH
def test_graphs_of_matrices_read_costs_alone(through: str, tmp_path: Path):
    weights = make_weights(tmp_path / "own.pt", "atsp_attn", nodes=10)
    run, instances = runs_of(weights, tmp_path / "graphs", through), drawn(weights, 3, 8)
    costs = np.stack([each.cost_matrix() for each in instances]).astype(np.float32)
    assert solved(run, {"costs": 1000 * costs}) == decoded(weights, instances)


@THROUGH
def test_graphs_of_a_pointer_that_reads_latents_find_the_tours_that_decoding_finds(through: str, tmp_path: Path):
    changes = {"actor__pointer__latent": 4, "model__loss_scales__dyn": 0.5}
    weights = make_weights(tmp_path / "own.pt", "tsp_attn", nodes=10, **changes)
    run, instances = runs_of(weights, tmp_path / "graphs", through), drawn(weights, 3, 8)
    coords = np.stack([each.coords for each in instances]).astype(np.float32)
    assert solved(run, {"coords": coords}) == decoded(weights, instances)
    # Tours of the same instance have latents of their own.
    assert solved(run, {"coords": coords}, queries=2) == decoded(weights, instances)


TASKS = [
    *(("CartPole-v1", through) for through in ("torch", "onnx")),
    *((task, "torch") for task in ("Pendulum-v1", "Switches-v0", "PixelGrid-v0")),
    *(pytest.param(task, "onnx", marks=pytest.mark.slow) for task in ("Pendulum-v1", "Switches-v0", "PixelGrid-v0")),
]


@pytest.mark.parametrize(("task", "through"), TASKS)
def test_graph_of_a_gymnasium_task_acts_as_the_loaded_agent(task: str, through: str, tmp_path: Path):
    weights = make_weights(tmp_path / "own.pt", task=f"gym_{task}", **SMALL)
    run = runs_of(weights, tmp_path / "graphs", through)["act"]
    (graph,) = files.export_of(export._loaded(weights, trust=False)[1]).graphs
    known = {name: np.zeros((1, *part.shape[1:]), part.numpy().dtype) for name, part in graph.inputs.items()}
    known["is_first"] = np.ones(1, np.bool_)
    agent, env, state, actions = load(weights, device="cpu"), gymnasium.make(task), None, []
    obs, _ = env.reset(seed=0)
    for _ in range(6):
        for name, part in (obs if isinstance(obs, dict) else {"observation": obs}).items():
            known[f"obs/{name}"][0] = np.asarray(part).reshape(known[f"obs/{name}"][0].shape)
        told = run(known)
        action, state = agent(obs, state)
        actions.append(action)
        # Pendulum takes a torque of 2 at most.
        scaled = 2 * np.clip(told["action"][0], -1, 1) if task == "Pendulum-v1" else told["action"][0]
        np.testing.assert_allclose(scaled, action, atol=1e-5)
        known |= {"deter": told["next_deter"], "stoch": told["next_stoch"], "prev_action": told["action"]}
        known["is_first"] = np.zeros(1, np.bool_)
        np.testing.assert_allclose(told["next_deter"], state["deter"], atol=1e-5)
        obs, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            break
    assert task == "PixelGrid-v0" or len({str(action) for action in actions}) > 1


def test_export_writes_the_facts_of_a_run_beside_its_graphs(tsp: Path, capsys: pytest.CaptureFixture[str]):
    facts = json.loads((tsp / "agent.json").read_text())
    assert (facts["run"], facts["task"], facts["problem"], facts["nodes"]) == ("tsp20.pt", "tsp", "tsp", "any number")
    assert facts["verified"]["steps"] >= 1000 and facts["verified"]["actions"] == 0
    assert 0 < facts["verified"]["logits"] <= 1e-4
    assert sorted(path.name for path in tsp.iterdir()) == ["agent.json", "encode.onnx", "solve_onnx.py", "step.onnx"]
    # Nothing of this machine's folders is in them.
    assert not any(str(Path(export.__file__).parent).encode() in path.read_bytes() for path in tsp.iterdir())


def test_export_removes_graphs_that_do_not_do_what_the_agent_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    weights = make_weights(tmp_path / "own.pt", task="gym_CartPole-v1", **SMALL)
    run = runs_of(weights, tmp_path, "torch")["act"]
    monkeypatch.setattr(files, "_write_graph", lambda graph, path: path.write_bytes(b""))
    monkeypatch.setattr(
        files, "runner", lambda path: lambda feeds: {**(told := run(feeds)), "logits": told["logits"] + 0.01}
    )
    with pytest.raises(SystemExit):
        export.main([str(weights), str(tmp_path / "graphs"), "--format", "onnx"])
    (line,) = capsys.readouterr().err.splitlines()
    assert "were removed" in line and "logits by up to 0.01" in line and not [*(tmp_path / "graphs").iterdir()]


def test_export_refuses_what_it_cannot_write_as_onnx(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "file"
    file.write_text("")
    plan = make_weights(tmp_path / "plan.pt", "tsp_plan", imag_policy=0, nodes=10)
    for arguments, message in (
        ([str(CHECKPOINTS / "tsp20.pt"), str(file)], "is a file or a run's own folder"),
        ([str(plan), str(tmp_path / "new")], "trained no policy"),
        ([str(tmp_path / "nowhere")], "does not exist"),
    ):
        with pytest.raises(SystemExit):
            export.main([*arguments, "--format", "onnx"])
        assert message in capsys.readouterr().err
    monkeypatch.setattr(files, "PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(ConfigError, match=r"needs no_such_package; pip install -e"):
        export.onnx_folder(plan, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_compared_counts_other_actions_and_leaves_out_ties_of_latents():
    ours = {"logits": torch.tensor([[-1.0, -0.5], [-0.4, -1.2], [-1.0, -0.5]]), "stoch": torch.eye(2).repeat(3, 1, 1)}
    theirs = {name: value.numpy().copy() for name, value in ours.items()}
    tell = partial(compared, told=["logits"], latent=["stoch"])
    assert tell(ours, theirs) == Agreement(3, 0.0, 0, 0) and tell(ours, theirs).holds
    theirs["logits"][0] = [-0.5, -1.0]
    assert tell(ours, theirs) == Agreement(3, 0.5, 1, 0) and not tell(ours, theirs).holds
    theirs["stoch"][0] = theirs["stoch"][0][::-1]
    assert tell(ours, theirs) == Agreement(3, 0.0, 0, 1) and not tell(ours, theirs).holds


def test_export_writes_weights_of_a_gymnasium_run_that_can_be_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    run.mkdir()
    made = make_weights(tmp_path / "made.pt", task="gym_CartPole-v1", **SMALL)
    state = checkpoint.load(made, CPU)
    config.save(config.Config(state.pop("config")), run / "config.yaml")
    checkpoint.save(run / checkpoint.LATEST, state)
    (run / "run.json").write_text('{"command": "dreamer.py --task gym_CartPole-v1", "commit": null}')
    (run / "metrics.jsonl").write_text('{"step": 5, "seconds": 1.0, "valid_return": 9.5}\n')
    export.main([str(run), str(tmp_path / "own.pt")])
    assert json.loads((tmp_path / "own.json").read_text())["curve"] == [[5, 9.5]]
    assert "gap" not in capsys.readouterr().out
    obs = np.array([0.01, 0.02, -0.03, 0.04], np.float32)
    assert load(tmp_path / "own.pt", device="cpu")(obs)[0] == load(run, device="cpu")(obs)[0]
