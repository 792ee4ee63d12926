"""Whole runs on environments of one's own, as a user writes and names them."""

from __future__ import annotations

import shlex
from pathlib import Path

import gymnasium
import pytest
import torch

import dreamer
from tests.gym_runs import COMMAND, train
from tests.scenes import decisions_in, refusal, stored_rows
from training import episodes

MINIGRID = """
import gymnasium, numpy
from gymnasium import spaces

class Mission(spaces.Space):
    def __init__(self):
        super().__init__((), numpy.dtype(object))
    def sample(self, mask=None, probability=None):
        return "go to the green door"
    def contains(self, x):
        return isinstance(x, str)

class Grid(gymnasium.Env):
    observation_space = spaces.Dict(
        {"image": spaces.Box(0, 255, (7, 7, 3), numpy.uint8), "direction": spaces.Discrete(4), "mission": Mission()}
    )
    action_space = spaces.Discrete(7)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.observe(), {}

    def step(self, action):
        self.time += 1
        return self.observe(), 0.0, False, self.time == 5, {}

    def observe(self):
        image = self.np_random.integers(0, 11, (7, 7, 3), numpy.uint8)
        return {"image": image, "direction": self.time % 4, "mission": "go to the green door"}

gymnasium.register("Grid-v0", entry_point=Grid)
"""
SINGLE = """
import gymnasium, numpy
from gymnasium import spaces

class Single(gymnasium.Env):
    observation_space = spaces.Box(-1, 1, (2,))
    action_space = spaces.Discrete(2)
    exists = False

    def __init__(self):
        assert not Single.exists, "there is one simulator only"
        Single.exists = True

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return numpy.zeros(2, numpy.float32), {}

    def step(self, action):
        return self.np_random.random(2).astype(numpy.float32), float(action), False, False, {}

    def close(self):
        Single.exists = False

gymnasium.register("Single-v0", entry_point=Single, max_episode_steps=9)
"""
OWN_TASK = """
import gymnasium, numpy

class Own(gymnasium.Env):
    observation_space = gymnasium.spaces.Dict(
        {"place": gymnasium.spaces.Discrete(3, start=5), "speed": gymnasium.spaces.Box(-1, 1, (2, 2))}
    )
    action_space = gymnasium.spaces.MultiDiscrete([2, 3])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.time += 1
        return self.observe(), float(action[1]), False, self.time == 5, {}

    def observe(self):
        return {"place": numpy.int64(5 + self.time % 3), "speed": numpy.full((2, 2), self.time / 5, numpy.float32)}

gymnasium.register("Own-v0", entry_point=Own)
"""


@pytest.mark.run
def test_simulator_that_exists_once_trains_and_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "single_task.py").write_text(SINGLE)
    monkeypatch.syspath_prepend(tmp_path)
    once = ("--import", "single_task", "--envs", "1", "--eval_env", "training", "--eval_every", "50", "--steps", "100")
    logdir = tmp_path / "run"
    try:
        rows = train(logdir, "Single-v0", *once)
        assert {"valid_return", "eval_return"} < set().union(*rows)
        assert {row["valid_length"] for row in rows if "valid_length" in row} == {9.0}
        spaces = {"observation": ((2,), torch.float32), "action": ((), torch.int64)}
        state, stored = stored_rows(logdir, spaces, num_envs=1)
        # Where an evaluation ended an episode, its last row is closed and the next begins another.
        assert torch.equal(stored["is_first"][0, 1:], stored["is_last"][0, :-1]) and not stored["is_terminal"].any()
        assert state["step"] == decisions_in(state, stored) == 100
        capsys.readouterr()
        dreamer.main(["--evaluate", str(logdir), "--device", "cpu", "--import", "single_task"])
        assert ": 3 episodes, mean return" in capsys.readouterr().out
    finally:
        gymnasium.registry.pop("Single-v0", None)


@pytest.mark.run(shapes=True)
def test_environment_of_ones_own_trains_and_is_not_filmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "own_task.py").write_text(OWN_TASK)
    monkeypatch.syspath_prepend(tmp_path)
    logdir = tmp_path / "run"
    try:
        rows = train(logdir, "Own-v0", "--import", "own_task", "--steps", "100")
        assert {row["train_length"] for row in rows if "train_length" in row} == {5.0}
        assert {"decoder_place_loss", "decoder_speed_loss"} < set().union(*rows)
        spaces = {"place": ((1,), torch.int64), "speed": ((4,), torch.float32), "action": ((2,), torch.int64)}
        _, stored = stored_rows(logdir, spaces)
        # Time limits end its episodes: what follows them still has a value.
        assert stored["is_last"][:, 5].all() and not stored["is_terminal"].any()
        assert torch.equal(stored["reward"][:, 1:6], stored["action"][:, :5, 1].float())
        with monkeypatch.context() as patched:
            patched.setattr(episodes.GymEvaluator, "test", lambda *_: pytest.fail("episodes were played first"))
            line = refusal(capsys, "--evaluate", str(logdir), "--import", "own_task", "--video", str(tmp_path / "film"))
        assert "rgb_array" in line
    finally:
        gymnasium.registry.pop("Own-v0", None)


@pytest.mark.run
def test_refusal_of_a_grid_with_a_mission_in_words_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "grid_task.py").write_text(MINIGRID)
    monkeypatch.syspath_prepend(tmp_path)
    command = ("--import", "grid_task", "--steps", "64")
    try:
        line = refusal(capsys, *COMMAND, "--task", "gym_Grid-v0", *command)
        assert "'mission'" in line
        advice = shlex.split(line.partition("leave it out with ")[2])
        rows = train(tmp_path / "run", "Grid-v0", *command, *advice)
        assert {"decoder_image_loss", "decoder_direction_loss", "eval_return"} < set().union(*rows)
    finally:
        gymnasium.registry.pop("Grid-v0", None)
