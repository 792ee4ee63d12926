"""Environments that misbehave: numbers that are none, absurd rewards, empty sets, crashes, hangs and deaths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import checkpoint
import dreamer
from benchmarks.faults import is_finite
from tests.faults.conftest import COMMON


@pytest.fixture
def world(cartpole: list[str]):
    """The arguments of a run in a world of `tests/faults/worlds.py`."""

    def arguments(name: str) -> list[str]:
        return [*cartpole, "--task", f"gym_{name}-v0", "--import", "tests.faults.worlds"]

    return arguments


@pytest.mark.parametrize("name", ["NaNSeen", "InfinitySeen"])
def test_bad_observation_stops_the_run_and_is_named(name: str, runner, world):
    line = runner.refused(*world(name))
    assert "place" in line and "zero_keys" in line


@pytest.mark.parametrize("name", ["NaNEarned", "InfinityEarned"])
def test_bad_reward_stops_the_run_and_is_named(name: str, runner, world):
    line = runner.refused(*world(name))
    assert "reward" in line and "zero_keys" in line


@pytest.mark.parametrize("name", ["MillionsLost", "FortuneEarned"])
def test_absurd_reward_is_survived(name: str, runner, world):
    run = runner.train(*world(name))
    assert "final evaluation: " in run.text and is_finite(run.logdir)


def test_sets_without_members_are_survived_whatever_their_padding_holds(runner, world):
    run = runner.train(*world("EmptySet"))
    assert run.last("model_skips_max") == 0


@pytest.mark.parametrize(
    ("name", "told", "processes"),
    [
        ("Raises", "RuntimeError: the simulator has lost its licence", "false"),
        ("Exits", "SystemExit: 0", "false"),
        ("Exits", "SystemExit: 0", "true"),
        ("SaysNothing", "UnprintableError: ", "false"),
    ],
)
def test_crash_ends_the_run_which_is_saved_with_the_traceback(name: str, told: str, processes: str, runner, world):
    line = runner.refused(*world(name), "--eval_every", "0", "--env_processes", processes, "--envs", "2")
    (path,) = (runner.logdir / "crashes").iterdir()
    assert f"environment 0 of {name}-v0, step 17 of its episode: {told}" in line and str(path) in line
    assert path.name == "step_000000032_env_0.txt"
    assert "Traceback" in path.read_text() and "tests/faults/worlds.py" in path.read_text()
    assert checkpoint.load(runner.logdir / checkpoint.LATEST, torch.device("cpu"))["step"] == 32


def test_run_that_crashed_goes_on_with_restarts(runner, world):
    runner.refused(*world("Raises"), "--eval_every", "0")
    run = runner.train(*world("Raises"), "--env_restarts", "1000")
    assert run.last("env_restarts") > 1
    assert len(list((runner.logdir / "crashes").iterdir())) > 1


def test_run_ends_when_its_restarts_are_used_up(runner, world):
    few = ("--eval_every", "0", "--env_restarts", "3", "--checkpoint_every", "20")
    assert "after 3 restarts" in runner.refused(*world("Raises"), *few)
    # They are counted over the run, not anew after each start.
    assert "after 3 restarts" in runner.refused(*world("Raises"), *few)


def test_crash_of_the_first_evaluation_leaves_its_traceback(runner, world):
    line = runner.refused(*world("Raises"))
    (path,) = (runner.logdir / "crashes").iterdir()
    assert str(path) in line and "lost its licence" in path.read_text()


def test_environment_that_changes_the_working_directory_changes_no_logdir(runner, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner.logdir = Path("run")
    dreamer.main([*COMMON, *world("Wanders"), "--logdir", "run"])
    assert Path.cwd() == Path("/")
    assert {"latest.pt", "metrics.jsonl", "replay"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_worker_that_dies_is_replaced(runner, world):
    run = runner.train(*world("Dies"), "--env_processes", "true", "--envs", "2", "--env_restarts", "99")
    assert "its process died (exit code -9)" in run.text


def test_worker_that_hangs_is_replaced(runner, world):
    few = ["--env_timeout", "2", "--envs", "1", "--steps", "36", "--prefill", "20", "--env_restarts", "9"]
    run = runner.train(*world("Hangs"), "--env_processes", "true", *few)
    assert "did not answer within 2 s" in run.text


@pytest.mark.parametrize(("name", "key"), [("NaNSeen", "place"), ("InfinityEarned", "reward")])
@pytest.mark.parametrize("how", ["zero_keys", "drop_keys"])
def test_bad_input_is_zeroed_or_dropped_where_its_key_is_named(name: str, key: str, how: str, runner, world):
    run = runner.train(*world(name), f"--guard.{how}", key)
    assert run.last("model_skips_max") == 0
    assert key in run.text
