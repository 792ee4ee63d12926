import json
from pathlib import Path

import pytest
import torch

import checkpoint
import dreamer
import export
import solve
from config import ConfigError
from routing.instances import TEST_SEED
from tests.run_scenes import STEPS

CPU = torch.device("cpu")
SHIPPED = sorted((Path(export.__file__).parent / "checkpoints").glob("*.pt"))
# What later changes may cost a shipped file, in percentage points.
TOLERANCE = 0.05
LARGEST_FILE = 6_000_000


@pytest.fixture(scope="module")
def run(reference):
    return reference.logdir


@pytest.fixture(scope="module")
def weights(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints") / "tiny.pt"
    export.main([str(run), str(path), "--instances", "8", "--device", "cpu"])
    return path


def assert_recorded_gap(path, method):
    record = json.loads(path.with_suffix(".json").read_text())
    agent = solve.load_agent(path, CPU)
    cases = solve.random_instances(agent, record["instances"], agent.task.num_actions, record["test_seed"])
    gap = export.gap(agent, cases, record["mean_reference"], method)
    assert gap == pytest.approx(record["gaps"][method], abs=TOLERANCE)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_weights_are_small_and_solve_as_well_as_recorded(path):
    assert path.stat().st_size <= LARGEST_FILE
    assert_recorded_gap(path, "greedy")


@pytest.mark.slow
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_weights_solve_as_well_as_recorded_with_augmentation(path):
    assert_recorded_gap(path, "augment")


def test_exported_weights_solve_as_well_as_recorded(weights):
    assert_recorded_gap(weights, "greedy")
    record = json.loads(weights.with_suffix(".json").read_text())
    assert record["command"].startswith("dreamer.py --configs debug") and record["test_seed"] == TEST_SEED
    assert (record["seed"], record["steps"], record["instances"]) == (0, STEPS, 8)
    assert record["gaps"].keys() == {"greedy", "augment"} and record["curve"]
    weights_now = checkpoint.load(weights, CPU)
    for name, value in weights_now["agent"]["behavior"].items():
        weights_now["agent"]["behavior"][name] = -value
    checkpoint.save(weights, weights_now)
    with pytest.raises(AssertionError):
        assert_recorded_gap(weights, "greedy")


def test_exported_weights_are_those_of_actor_and_model_in_half_precision(run, tmp_path):
    trained = checkpoint.load(run / "latest.pt", CPU)["agent"]
    path = tmp_path / "tiny.pt"
    export.weights_file(run, path)
    exported = checkpoint.load(path, CPU)["agent"]
    assert exported.keys() == {"model", "behavior"}
    assert all(name.startswith("actor.") for name in exported["behavior"])
    for part, values in exported.items():
        for name, value in values.items():
            torch.testing.assert_close(value.float(), trained[part][name], rtol=1e-3, atol=1e-6)
    assert exported["behavior"]["actor.key.weight"].dtype == torch.float16


def test_exported_weights_take_missing_config_keys_from_the_defaults(run, tmp_path):
    path = tmp_path / "old.pt"
    export.weights_file(run, path)
    state = checkpoint.load(path, CPU)
    del state["config"]["imag_first"], state["config"]["model"]["depth"]
    checkpoint.save(path, state)
    assert solve.load_agent(path, CPU).behavior.settings.first == "any"


def test_init_begins_a_run_with_exported_weights(run, tmp_path):
    path = tmp_path / "tiny.pt"
    export.weights_file(run, path)
    arguments = ["--configs", "debug", "--device", "cpu", "--logdir", str(tmp_path / "tuned"), "--steps", "60"]
    dreamer.main([*arguments, "--init", str(path), "--actor.lr", "1e-12"])
    tuned = checkpoint.load(tmp_path / "tuned" / "latest.pt", CPU)["agent"]["behavior"]
    exported = checkpoint.load(path, CPU)["agent"]["behavior"]
    for name, value in exported.items():
        torch.testing.assert_close(tuned[name], value.float())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nowhere", "a.pt"], "nowhere does not exist"), (["nowhere", "a.txt"], "let it end in .pt")],
)
def test_export_refuses_what_it_cannot_do_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        export.main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and message in line


@pytest.fixture(scope="module")
def pickup_run(tmp_path_factory):
    logdir = tmp_path_factory.mktemp("export") / "pickup"
    arguments = ["--configs", "pickup_attn", "debug", "--nodes", "7", "--prefill", "56", "--steps", "57"]
    dreamer.main([*arguments, "--device", "cpu", "--logdir", str(logdir)])
    return logdir


def test_export_refuses_before_it_writes(run, pickup_run, tmp_path, capsys):
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "file").write_text("")
    mistakes = [
        ([str(pickup_run), str(tmp_path / "a.pt")], "was trained on pickup"),
        ([str(run), str(tmp_path / "a.pt"), "--device", "quantum"], "cannot be used here"),
        ([str(run), str(run / "latest.pt")], "lies in a run's folder"),
        ([str(run / "latest.pt"), str(run / "mine.pt")], "lies in a run's folder"),
        ([str(run), str(pickup_run / "mine.pt")], "lies in a run's folder"),
        ([str(run), str(tmp_path / "folder.pt")], "is a folder"),
        ([str(run), str(tmp_path / "file" / "a.pt")], "cannot be written"),
    ]
    latest = (run / "latest.pt").read_bytes()
    for arguments, message in mistakes:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            export.main([*arguments, "--instances", "2"])
        (line,) = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and message in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.pt"]
    assert (run / "latest.pt").read_bytes() == latest


@pytest.mark.parametrize("content", ["[]", "3", '{"valid_gap": 1.0}', '{"step": 1, "valid_gap": "low"}'])
def test_facts_of_a_folder_that_does_not_tell_them_are_refused(content, run, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text(content + "\n")
    with pytest.raises(ConfigError, match="does not say how it was made"):
        export.facts(tmp_path)
