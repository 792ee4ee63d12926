"""The zoo of environments: what is in it, and how the end of a run is told."""

import subprocess
from types import SimpleNamespace

import pytest

from benchmarks import zoo
from config import UserError
from envs.gym_tasks import make_gym
from settings.environment import SUITE_PREFIXES, WrapperSettings


def test_zoo_has_environments_of_every_suite():
    tasks = [line.split()[0] for line in zoo.read_zoo()]
    assert len(tasks) >= 25
    for prefix in ("gym_", *SUITE_PREFIXES):
        assert any(task.startswith(prefix) for task in tasks), prefix


def test_arguments_of_a_line_keep_values_with_spaces():
    *_, flag, task, key, value, last, resize = zoo.arguments_of(
        "dmc_a --env.kwargs {vision: true, size: [32, 32]} --env.resize [64,64]"
    )
    assert (flag, task, key, value) == ("--task", "dmc_a", "--env.kwargs", "{vision: true, size: [32, 32]}")
    assert (last, resize) == ("--env.resize", "[64,64]")


SEEN = "sees    a: 1 number\n        b: 2 numbers\nreplay  60 rows\n        of 3\n"


@pytest.mark.parametrize(
    ("code", "told", "verdict", "said"),
    [
        (0, f"logdir  x\n{SEEN}done", "ran", "a: 1 number; b: 2 numbers"),
        (2, "dreamer.py: no such thing; do that", "refused", "dreamer.py: no such thing; do that"),
        (2, "Traceback (most recent call last):\ndreamer.py: worse", "FAILED", "dreamer.py: worse"),
        (1, "ValueError: x", "FAILED", "ValueError: x"),
        (-9, "", "FAILED", ""),
    ],
)
def test_play_tells_how_a_run_ended(code, told, verdict, said, tmp_path, monkeypatch):
    finished = SimpleNamespace(returncode=code, stderr=told)
    monkeypatch.setattr(subprocess, "run", lambda *_arguments, **_named: finished)
    outcome = zoo.play("gym_CartPole-v1", tmp_path)
    assert (outcome.verdict, outcome.said) == (verdict, said)


def test_play_gives_up_on_a_run_that_hangs(tmp_path, monkeypatch):
    def hang(*_arguments, **_named):
        raise subprocess.TimeoutExpired("dreamer.py", 1)

    monkeypatch.setattr(subprocess, "run", hang)
    assert zoo.play("gym_CartPole-v1", tmp_path).verdict == "FAILED"


@pytest.mark.parametrize("env_id", zoo.ODD)
def test_odd_environments_play_or_are_refused_in_one_line(env_id, vector_env):
    refused = {
        "ZooMixedActions-v0": "mixes choices",
        "ZooText-v0": "'note' has the space Text",
        "ZooQuantity-v0": "1000",
    }
    if env_id not in refused:
        env = vector_env(make_gym(f"gym_{env_id}", settings=WrapperSettings(time_limit=3)))
        obs, _ = env.reset()
        assert {name: tuple(value.shape[1:]) for name, value in obs.items()} == {
            name: key.shape for name, key in env.observations.items()
        }
        return
    with pytest.raises(UserError, match=refused[env_id]) as refusal:
        vector_env(make_gym(f"gym_{env_id}"))
    assert "\n" not in str(refusal.value)
