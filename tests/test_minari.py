"""Data sets of Minari as recorded episodes, and the way back from the actions of an environment."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

import dreamer
from envs.action_rows import to_row
from envs.gym_vector import GymVectorEnv
from envs.spaces import to_env_action
from envs.tasks import ObservationTask
from tests.scenes import refusal
from training.recorded import Record, episode_set

SPACES = {
    "discrete": spaces.Discrete(4, start=-1),
    "choices": spaces.MultiDiscrete([3, 2], start=[1, -1]),
    "flags": spaces.MultiBinary(3),
    "grid": spaces.Box(-2, 3, (2, 2), np.int32),
    "numbers": spaces.Box(np.array([-1, 0, -np.inf]), np.array([3, 10, np.inf]), dtype=np.float64),
    "matrix": spaces.Box(-2, 2, (2, 3), np.float32),
    "parts": spaces.Dict({"b": spaces.Discrete(3), "a": spaces.Tuple([spaces.MultiBinary(2), spaces.Discrete(2)])}),
    "moves": spaces.Tuple([spaces.Box(0, 4, (2,)), spaces.Box(-1, 1, (1,))]),
}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return np.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("name", SPACES)
def test_an_action_is_what_its_row_becomes(name: str):
    space = SPACES[name]
    space.seed(0)
    for _ in range(20):
        action = space.sample()
        assert same(to_env_action(space, to_row(space, action)), action)


def test_bounds_of_numbers_are_minus_one_and_one():
    space = spaces.Box(np.array([0.0, -4.0]), np.array([10.0, 4.0]), dtype=np.float64)
    assert to_row(space, np.array([2.5, 4.0])).tolist() == [-0.5, 1.0]
    widest = spaces.Box(-1.7e308, 1.7e308, (1,), np.float64)
    assert to_row(widest, widest.low).tolist() == [-1.0]


@pytest.fixture
def data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Three episodes of Pendulum, the last of which a crash has left with a number that is none."""
    minari = pytest.importorskip("minari")
    pytest.importorskip("h5py")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "sets"))
    env, episodes = gymnasium.make("Pendulum-v1"), []
    for number in range(3):
        obs, _ = env.reset(seed=number)
        env.action_space.seed(number)
        seen, done, earned = [obs], [], []
        for _ in range(30):
            done.append(env.action_space.sample())
            obs, reward, *_ = env.step(done[-1])
            seen.append(obs)
            earned.append(float(reward))
        if number == 2:
            seen[4] = np.full(3, np.nan, np.float32)
        ends = np.arange(30) == 29
        episodes.append(
            minari.data_collector.EpisodeBuffer(
                observations=seen,
                actions=done,
                rewards=earned,
                terminations=[bool(end and number == 0) for end in ends],
                truncations=[bool(end and number != 0) for end in ends],
                infos={},
            )
        )
    with warnings.catch_warnings():
        # It warns of every fact that a data set for others should have.
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers(
            "test/pendulum-v0",
            buffer=episodes,
            action_space=env.action_space,
            observation_space=env.observation_space,
            author="nobody",
            author_email="nobody@example.org",
            code_permalink="none",
            algorithm_name="random",
            description="Three episodes of random actions.",
        )
    return "minari:test/pendulum-v0"


@pytest.mark.run
def test_a_data_set_is_read_in_the_layout_of_files(data_set: str):
    episodes = episode_set(data_set)
    assert episodes.names == ["episode 0", "episode 1", "episode 2"]
    first, second = episodes.read(0), episodes.read(1)
    env = gymnasium.make("Pendulum-v1")
    obs, _ = env.reset(seed=1)
    env.action_space.seed(1)
    for row in range(30):
        assert (second["observation"][row] == obs).all()
        action = env.action_space.sample()
        assert second["action"][row] == pytest.approx(action / 2)
        obs, reward, *_ = env.step(action)
        assert second["reward"][row + 1] == pytest.approx(float(reward))
    assert (first["is_terminal"][-1], second["is_terminal"][-1]) == (True, False)
    vector = GymVectorEnv(lambda: gymnasium.make("Pendulum-v1"), num_envs=1, device="cpu", seed=0)
    task = ObservationTask(actions=vector.actions, observations=vector.observations)
    record = Record(episodes, task=task, spaces=task.spaces)
    assert len(record) == 2
    assert record.faults == ["episode 2 has a number that is not finite in observation, row 4"]


@pytest.mark.run
def test_a_run_learns_from_a_data_set(data_set: str, tmp_path: Path):
    command = ["--configs", "debug", "--task", "gym_Pendulum-v1", "--replay", data_set, "--steps", "0"]
    ends = ["--eval_every", "0", "--eval_episodes", "0", "--updates", "2", "--log_every", "1", "--envs", "2"]
    dreamer.main([*command, *ends, "--logdir", str(tmp_path / "run")])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "model_loss" in row] == [1, 2]


def test_a_data_set_that_is_not_there_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    line = refusal(capsys, "--task", "gym_Pendulum-v1", "--replay", "minari:none/such-v0", "--steps", "0")
    assert "minari:none/such-v0 cannot be opened" in line and "minari download none/such-v0" in line


def test_minari_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(sys.modules, "minari", None)
    line = refusal(capsys, "--task", "gym_Pendulum-v1", "--replay", "minari:any/set-v0", "--steps", "0")
    assert 'pip install -e ".[minari]"' in line
