"""Environments that misbehave: numbers that are none, absurd rewards, empty sets, crashes, hangs and deaths."""

from __future__ import annotations

import pytest

from benchmarks.faults import is_finite


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


def test_environment_that_raises_is_replaced(runner, world):
    run = runner.train(*world("Raises"))
    assert "the simulator has lost its licence" in run.text


def test_worker_that_dies_is_replaced(runner, world):
    run = runner.train(*world("Dies"), "--env_processes", "true", "--envs", "2")
    assert "its process died (exit code -9)" in run.text


def test_worker_that_hangs_is_replaced(runner, world):
    few = ["--env_timeout", "2", "--envs", "1", "--steps", "36", "--prefill", "20"]
    run = runner.train(*world("Hangs"), "--env_processes", "true", *few)
    assert "did not answer within 2 s" in run.text


@pytest.mark.parametrize(("name", "key"), [("NaNSeen", "place"), ("InfinityEarned", "reward")])
@pytest.mark.parametrize("how", ["zero_keys", "drop_keys"])
def test_bad_input_is_zeroed_or_dropped_where_its_key_is_named(name: str, key: str, how: str, runner, world):
    run = runner.train(*world(name), f"--guard.{how}", key)
    assert run.last("model_skips_max") == 0
    assert key in run.text
