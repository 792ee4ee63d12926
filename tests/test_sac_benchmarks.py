"""The benchmarks that hold our SAC against a peer."""

import json
import sys

import gymnasium
import numpy as np
import pytest

import compare
from benchmarks import (
    sac_peer,
    sac_speed,
)
from benchmarks.flags import CONFIGS
from config import load
from training.logger import Logger


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_sac_speed_compares_with_a_peer(capsys):
    pytest.importorskip("stable_baselines3")
    sac_speed.main(["--rounds", "1"])
    table = capsys.readouterr().out
    assert "| ours |" in table and "| stable-baselines3 |" in table and "ratio: " in table


def test_sac_speed_refuses_a_number_of_rounds_that_is_none(capsys):
    with pytest.raises(SystemExit):
        sac_speed.main(["--rounds", "0"])
    assert "--rounds is '0'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--context", "dynamics_map"), "context is 'dynamics_map'; choose one of none"),
        (("--sac.critic", "symlog_disc"), "sac.critic is 'symlog_disc'; choose one of mse"),
        (("--rounds", "²"), "--rounds is '²'; it takes a whole number, at least 1"),
    ],
)
def test_sac_speed_refuses_an_unequal_contest(options, expected, capsys):
    with pytest.raises(SystemExit):
        sac_speed.main(list(options))
    assert capsys.readouterr().err.splitlines() == [f"sac_speed: {expected}"]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_sac_peer_logs_a_run_that_compare_can_read(tmp_path, capsys):
    pytest.importorskip("stable_baselines3")
    short = ["--steps", "600", "--prefill", "300", "--eval_every", "300", "--valid_episodes", "1"]
    sac_peer.main(["--configs", "sac_pendulum", *short, "--eval_episodes", "2", "--logdir", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "valid_return" in row] == [300, 600]
    assert rows[-1]["step"] == 600 and -2000 < rows[-1]["eval_return"] < 0
    # Episodes of 200 steps: one has ended by 300, and two more by 600.
    assert [row["step"] for row in rows if "train_return" in row] == [300, 600]
    compare.main([str(tmp_path), "--at-steps", "600", "--out", str(tmp_path / "a.png")])
    assert "600" in capsys.readouterr().out


class Walk(gymnasium.Env):
    """Three steps to an episode; the reward counts all steps ever made."""

    observation_space = gymnasium.spaces.Box(-1, 1, (1,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))
    steps = 0

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        return self.observation_space.sample(), float(self.steps), False, self.steps % 3 == 0, {}


class Idler:
    """Stands for a peer: it steps its environment and learns nothing."""

    num_timesteps = 0

    def __init__(self, env):
        self.env = env

    def learn(self, steps, *, reset_num_timesteps):
        if not self.num_timesteps:
            self.env.reset()
        for _ in range(steps):
            self.num_timesteps += 1
            *_, terminated, truncated, _ = self.env.step(np.zeros(1))
            if terminated or truncated:
                self.env.reset()

    def predict(self, obs, *, deterministic):
        return np.zeros(1), None


def test_sac_peer_train_return_is_that_of_the_episodes_since_the_last_row(tmp_path):
    short = {"steps": "9", "eval_every": "2", "valid_episodes": "1", "eval_episodes": "1"}
    settings = load(CONFIGS, ["sac_pendulum"], short)
    env = sac_peer.Returns(Walk())
    logger = Logger(tmp_path)
    sac_peer.train(settings, logger, peer=Idler(env), env=env, other=Walk())
    logger.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # Episodes end at 3, 6 and 9, with 1 + 2 + 3, 4 + 5 + 6 and 7 + 8 + 9.
    told = [(row["step"], row.get("train_return")) for row in rows if "valid_return" in row]
    assert told == [(2, None), (4, 6.0), (6, 15.0), (8, None), (9, 24.0)]
    assert not any("train_return" in row and row["train_return"] is None for row in rows)


def test_sac_peer_writes_nothing_where_a_package_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(SystemExit):
        sac_peer.main(["--configs", "sac_pendulum", "--logdir", str(tmp_path / "run")])
    assert "stable-baselines3 is not installed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--reward_scale", "0.1"), "reward_scale is 0.1; choose one of 1.0"),
        (("--context", "dynamics_map"), "context is 'dynamics_map'; choose one of none"),
        (("--valid_episodes", "0"), "valid_episodes is 0; it must be at least 1"),
        (("--eval_every", "0"), "eval_every is 0; it must be at least 1"),
        (("--replay_capacity", "0"), "replay_capacity is 0; it must be at least 1"),
        (("--sac.tau", "7"), "sac.tau is 7; it must be between 0 and 1"),
        (("--sac.critic", "symlog_disc"), "sac.critic is 'symlog_disc'; choose one of mse"),
        (("--envs", "8"), "envs is 8; choose one of 1"),
    ],
)
def test_sac_peer_refuses_what_it_does_not_do(options, expected, tmp_path, capsys):
    with pytest.raises(SystemExit):
        sac_peer.main(["--configs", "sac_pendulum", "--logdir", str(tmp_path / "run"), *options])
    assert capsys.readouterr().err.splitlines() == [f"sac_peer: {expected}"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("below", ["", "run"])
def test_sac_peer_names_a_folder_that_cannot_be_written_to(below, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sac_peer, "make_peer", lambda config, env: None)
    (file := tmp_path / "file").write_text("something")
    with pytest.raises(SystemExit):
        sac_peer.main(["--configs", "sac_pendulum", "--logdir", str(file / below)])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"sac_peer: logdir {file / below} cannot be written to (")


def test_sac_peer_refuses_to_run_without_a_folder(capsys):
    with pytest.raises(SystemExit):
        sac_peer.main(["--configs", "sac_pendulum"])
    assert "name a folder that has no run yet" in capsys.readouterr().err


def test_sac_peer_refuses_actions_that_are_no_numbers(tmp_path, capsys):
    with pytest.raises(SystemExit):
        sac_peer.main(["--task", "gym_CartPole-v1", "--logdir", str(tmp_path / "run")])
    assert "gym_CartPole-v1 has actions Discrete(2)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
