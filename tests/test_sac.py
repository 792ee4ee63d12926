"""The SAC agent's verbs, and whole runs as a user starts them, too short to learn anything."""

from __future__ import annotations

import collections
import copy
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gymnasium.envs.classic_control import PendulumEnv

import checkpoint
import config
import sac
from comparing.runs import METRICS
from config import ConfigError
from envs.tasks import ActionSpec, ObservationKey, ObservationTask
from guard import Guard
from parts.acting import Sight
from sac import SAC
from tests.sac_scenes import CONFIG_PATH, CPU, pendulum_agent
from tests.scenes import debug_config, without_times
from training import devices
from training.agent import Agent

SHORT = ["debug", "--device", "cpu", "--steps", "120", "--log_every", "40", "--eval_every", "120"]
MONITORED = {f"train/{name}" for name in ("policy_grad_norm", "q_grad_norm", "q_mean", "q_std", "alpha")}

Rows = list[dict[str, Any]]


def read_metrics(logdir: Path) -> Rows:
    return [json.loads(line) for line in (logdir / METRICS).read_text().splitlines()]


def train(logdir: Path, section: str, *arguments: str) -> Rows:
    sac.main(["--configs", section, *SHORT, *arguments, "--logdir", str(logdir)])
    return read_metrics(logdir)


def values_of(rows: Rows, name: str) -> list[float]:
    return [row[name] for row in rows if name in row]


def parameters_of(agent: SAC) -> list[torch.Tensor]:
    return [parameter for optimizer in agent.learner.optimizers.values() for parameter in optimizer.parameters]


# The verbs


def test_sac_is_an_agent():
    assert isinstance(pendulum_agent()[0], Agent)


def test_act_is_greedy_without_a_generator_and_within_bounds():
    agent, _ = pendulum_agent()
    sight = Sight({"observation": torch.randn(50, 3)}, torch.ones(50, dtype=torch.bool), any_first=True)
    one, _ = agent.act(sight, agent.initial_state(50), generator=None)
    same, _ = agent.act(sight, agent.initial_state(50), generator=None)
    drawn, _ = agent.act(sight, agent.initial_state(50), generator=torch.Generator())
    assert torch.equal(one, same) and not torch.equal(one, drawn)
    assert drawn.abs().max() <= 1


@pytest.mark.parametrize("critic", ["mse", "symlog_disc"])
def test_update_moves_policy_values_and_temperature(critic: str):
    agent, replay = pendulum_agent(**{"sac.critic": critic})
    before = [parameter.clone() for parameter in parameters_of(agent)]
    for _ in range(3):
        metrics = agent.update(replay, progress=0.0)
    assert metrics.keys() >= MONITORED
    assert all(metric.isfinite() for metric in metrics.values())
    assert not any(torch.equal(old, new) for old, new in zip(before, parameters_of(agent), strict=True))
    assert agent.learner.updates == 3


def test_every_loss_is_logged_with_its_own_value(monkeypatch: pytest.MonkeyPatch):
    agent, replay = pendulum_agent()
    whole, seen = agent.soft.losses, []

    def record(*arguments: Any) -> Any:
        seen.append(whole(*arguments))
        return seen[-1]

    monkeypatch.setattr(agent.soft, "losses", record)
    metrics = agent.update(replay, progress=0.0)
    assert {name: metrics[f"{name}_loss"] for name in seen[0][0]} == {n: v.detach() for n, v in seen[0][0].items()}


def test_restored_agent_goes_on_like_the_saved_one():
    (one, replay), (other, _) = pendulum_agent(), pendulum_agent(seed=1)
    for _ in range(3):
        one.update(replay, progress=0.0)
    # As a checkpoint would: an optimiser keeps the very tensors that it is given.
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    checkpoint.restore_generators(other.generators, checkpoint.generator_state(one.generators))
    one.update(replay, progress=0.0)
    other.update(replay, progress=0.0)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(parameters_of(one), parameters_of(other), strict=True))
    assert other.learner.updates == 4


def test_broken_q_function_is_named_and_undone():
    agent, replay = pendulum_agent()
    for _ in range(4):
        agent.update(replay, progress=0.0)
    with torch.no_grad():
        agent.soft.values.mlp.weight0[1, 0, 0] = torch.nan
    agent.update(replay, progress=0.0)
    assert all(parameter.isfinite().all() for parameter in parameters_of(agent))
    (report,) = agent.guard.reports
    named = {entry["name"] for entry in report["state"]}
    assert "soft.values.mlp.q2.weight0" in named and "soft.values.mlp.q1.weight0" not in named
    (entry,) = [entry for entry in report["state"] if entry["name"] == "soft.values.mlp.q2.weight0"]
    assert entry["bad_share"] == pytest.approx(1 / (4 * 16))


def test_saved_state_is_finite_even_where_the_present_one_is_not():
    agent, replay = pendulum_agent()
    agent.update(replay, progress=0.0)
    with torch.no_grad():
        agent.soft.temperature.log_alpha.fill_(torch.nan)
    assert all(value.isfinite().all() for value in agent.state_dict()["soft"].values())


def test_temperature_is_the_very_tensor_that_its_optimiser_holds():
    agent, _ = pendulum_agent()
    assert agent.learner.optimizers["alpha"].parameters[0] is agent.soft.temperature.log_alpha


# Runs


@pytest.mark.run(shapes=True)
@pytest.mark.parametrize(
    ("section", "arguments"),
    [
        ("sac_pendulum", []),
        ("sac_conservative", ["--task", "gym_Pendulum-v1", "--sac.critic", "symlog_disc"]),
        ("sac", ["--task", "gym_CartPole-v1"]),
        ("sac", ["--task", "gym_Switches-v0"]),
        ("tsp_sac", []),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_section_trains_to_its_end(tmp_path: Path, section: str, arguments: list[str]):
    rows = train(tmp_path, section, *arguments)
    logged = set().union(*rows)
    assert all(value is not None for row in rows for value in row.values()), "a value that is not finite"
    assert logged >= MONITORED and {"eval_return", "actor_entropy", "q_loss", "policy_loss"} < logged
    assert {*values_of(rows, "env_miss_rate")} <= {0.0}


@pytest.mark.run
def test_routing_run_takes_only_legal_actions_and_aims_at_attainable_entropies(tmp_path: Path):
    rows = train(tmp_path, "tsp_sac", "--sac.entropy_share", "0.98")
    assert {*values_of(rows, "env_miss_rate")} == {0.0}
    # With 6 nodes: 5, 4, 3 and 2 are open where there is a choice.
    expected = 0.98 * sum(torch.tensor(float(count)).log().item() for count in (5, 4, 3, 2)) / 4
    assert values_of(rows, "target_entropy")[-1] == pytest.approx(expected, abs=1e-4)


@pytest.mark.run
def test_run_resumed_in_mid_episode_equals_the_undisturbed_one(tmp_path: Path):
    arguments = ["--context", "dynamics_map", "--checkpoint_every", "60", "--checkpoint_numbered", "true"]
    rows = train(tmp_path / "one", "sac_longitudinal", *arguments)
    middle = str(tmp_path / "one" / "step_000000060.pt")
    resumed = train(tmp_path / "two", "sac_longitudinal", *arguments, "--resume", middle)

    def after(logged: Rows) -> Rows:
        return without_times([row for row in logged if row["step"] > 60])

    assert after(resumed) == after(rows) and len(after(rows)) >= 3


@pytest.mark.run
def test_rewards_are_scaled_as_they_are_stored_and_returns_logged_both_ways(tmp_path: Path):
    arguments = ["--reward_scale", "0.01", "--steps", "900", "--prefill", "860", "--log_every", "300"]
    rows = train(tmp_path, "sac_pendulum", *arguments)
    for row in rows:
        if "train_return" in row:
            assert row["train_return"] < -100
            assert row["train_return_scaled"] == pytest.approx(0.01 * row["train_return"])
    assert values_of(rows, "train_return_scaled")
    # Every episode also has a row of its own, before the one with the mean.
    ended: list[float] = []
    for row in rows:
        if "episode_return" in row:
            ended.append(row["episode_return"])
        elif "train_return" in row:
            assert row["train_return"] == pytest.approx(sum(ended) / len(ended))
            ended = []
    # A step of Pendulum costs 16.3 at most.
    low = checkpoint.load(tmp_path / checkpoint.LATEST, CPU)["replay"]["reward_min"]
    assert -0.164 < low < -0.01
    # The evaluation is of the task as it is.
    assert rows[-1]["eval_return"] < -10


@pytest.mark.run
@pytest.mark.parametrize(
    ("arguments", "warning"),
    [
        (["--reward_scale", "1e6", "--sac.max_grad_norm", "5"], "warning: q_clip_rate is 1, above 0.99"),
        ([], None),
    ],
)
def test_runaway_values_are_warned_of(
    arguments: list[str], warning: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    train(tmp_path, "sac_pendulum", *arguments)
    told = capsys.readouterr().err
    assert warning in told if warning else "warning:" not in told


@pytest.mark.run
@pytest.mark.parametrize(
    ("sign", "line"), [(1, "train/q_mean is -, below -10000"), (-1, "train/q_mean is , above 10000")]
)
def test_values_beyond_their_limits_are_warned_of_while_everything_is_finite(
    sign: float, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def step(env: PendulumEnv, action: Any) -> Any:
        obs, cost, *others = plain_step(env, action)
        return obs, sign * cost, *others

    plain_step = PendulumEnv.step
    monkeypatch.setattr(PendulumEnv, "step", step)
    rows = train(tmp_path, "sac_pendulum", "--reward_scale", "1e5", "--sac.lr", "0.03")
    assert all(value is not None and math.isfinite(value) for row in rows for value in row.values())
    lines = [told for told in capsys.readouterr().err.splitlines() if "warning: train/" in told]
    assert {re.sub(r"[\d.]+e\+\d+", "", told.split("warning: ")[1]) for told in lines} == {
        line,
        "train/q_std is , above 5000",
    }


@pytest.mark.run
def test_evaluate_plays_a_saved_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train(tmp_path, "sac_longitudinal", "--context", "dynamics_map", "--steps", "60")
    sac.main(["--evaluate", str(tmp_path)])
    assert "4 episodes, mean return" in capsys.readouterr().out


@pytest.mark.run
def test_observation_that_is_not_finite_is_counted_named_and_zeroed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def step(env: PendulumEnv, action: Any) -> Any:
        obs, *others = plain_step(env, action)
        steps[id(env)] += 1
        return (obs * math.nan if steps[id(env)] in (30, 90) else obs, *others)

    steps: dict[int, int] = collections.defaultdict(int)
    plain_step = PendulumEnv.step
    monkeypatch.setattr(PendulumEnv, "step", step)
    rows = train(tmp_path, "sac_pendulum", "--envs", "1", "--checkpoint_every", "100")
    assert values_of(rows, "bad_inputs")[-1] == 2
    assert "'observation'" in capsys.readouterr().err
    assert "eval_return" in rows[-1]
    state = checkpoint.load(tmp_path / checkpoint.LATEST, CPU)
    (chunk, *_) = (checkpoint.load(path, CPU) for path in sorted((tmp_path / "replay").glob("*.pt")))
    assert not chunk["observation"][0, 30].any() and state["step"] == 120


@pytest.mark.run
def test_temperature_begins_anew_with_the_weights_of_another_run_and_goes_on_with_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = ["--sac.initial_alpha.mse", "5", "--sac.lr", "1e-9"]
    began = values_of(train(tmp_path / "one", "sac_pendulum", "--sac.lr", "1e-9"), "train/alpha")
    assert began[-1] == pytest.approx(1)
    latest = str(tmp_path / "one" / checkpoint.LATEST)
    anew = train(tmp_path / "two", "sac_pendulum", *arguments, "--init", latest)
    assert values_of(anew, "train/alpha")[-1] == pytest.approx(5)
    capsys.readouterr()
    on = train(tmp_path / "three", "sac_pendulum", *arguments, "--resume", latest, "--steps", "240")
    assert values_of(on, "train/alpha")[-1] == pytest.approx(1)
    assert "has begun: sac.initial_alpha.mse changes nothing any more" in capsys.readouterr().err


def test_weights_of_a_dreamer_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shipped = str(Path(sac.__file__).parent / "checkpoints" / "tsp20.pt")
    for arguments in (["--evaluate", shipped], ["--init", shipped]):
        with pytest.raises(SystemExit):
            train(tmp_path, "tsp_sac", *arguments)
        told = capsys.readouterr().err.strip().splitlines()[-1]
        assert told.endswith("tsp20.pt holds a Dreamer, where a SAC is needed; give it to the program that made it")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sac.critic", "huber"], "sac.critic is 'huber'; choose one of mse, symlog_disc"),
        (["--sac.max_grad_norm", "inf"], "sac.max_grad_norm is 'inf'; it takes a number (default .inf)"),
        (["--configs", "pendulum"], "section pendulum is for another program: python dreamer.py --configs pendulum"),
        (["--lr", "2"], "unknown key 'lr'; the nearest is 'sac.lr'"),
        (["--actor.entropy", "2"], "only dreamer.py reads actor.entropy"),
        (["--sac.tau", "2"], "sac.tau is 2; it must be between 0 and 1"),
        (["--reward_scale", "0"], "reward_scale is 0; it must be between 1e-12 and 1e+12"),
        (["--context", "map"], "context is 'map'; choose one of none, dynamics_map"),
        (["--task", "tsp", "--context", "dynamics_map", "--prefill", "100"], "is for gymnasium environments"),
    ],
)
def test_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str):
    with pytest.raises(SystemExit) as exit_info:
        train(tmp_path, "sac_pendulum", *arguments)
    told = capsys.readouterr().err.strip()
    assert exit_info.value.code == 2
    assert message in told and told.startswith("sac.py: ") and "\n" not in told


@pytest.mark.slow
def test_sac_swings_the_pendulum_up(tmp_path: Path):
    sac.main(["--configs", "sac_pendulum", "--steps", "10000", "--device", "cpu", "--logdir", str(tmp_path)])
    assert read_metrics(tmp_path)[-1]["eval_return"] > -200


def test_sac_reads_the_keys_that_are_encoded_only():
    agent, _ = pendulum_agent()
    image = ObservationKey("image", (16, 16, 3), torch.uint8)
    assert isinstance(agent.task, ObservationTask)
    task = replace(agent.task, observations={**agent.task.observations, "eye": image})
    command = config.parse_command_line(
        ["--configs", "sac_pendulum", "debug", "--model.encode_keys", "(?!eye$).*"],
        config_path=CONFIG_PATH,
        description="",
        entry_keys={},
        base=["sac"],
        foreign_keys=sac.FOREIGN_KEYS,
    )
    parts: dict[str, Any] = {"device": CPU, "generators": devices.make_generators(0, CPU), "guard": Guard(CPU)}
    assert SAC.of(task, command.config, **parts).task == agent.task
    assert SAC.of(task, debug_config("sac", "sac_pendulum"), **parts).task == task


def test_sac_refuses_several_choices_at_once():
    agent, _ = pendulum_agent()
    task = replace(agent.task, actions=ActionSpec("multi_discrete", (2, 3)))
    parts: dict[str, Any] = {"device": CPU, "generators": devices.make_generators(0, CPU), "guard": Guard(CPU)}
    with pytest.raises(ConfigError, match="has multi_discrete actions; .*: python dreamer.py --task gym_Pendulum-v1"):
        SAC.of(task, debug_config("sac", "sac_pendulum"), **parts)


@pytest.mark.run(shapes=True)
def test_sac_trains_on_images_and_resumes_exactly(tmp_path: Path):
    arguments = ["--task", "gym_PixelGrid-v0", "--steps", "60", "--prefill", "20", "--batch_size", "4"]
    arguments += ["--train_ratio", "4", "--sac.depth", "2", "--eval_episodes", "1", "--checkpoint_every", "40"]
    rows = [row for row in train(tmp_path / "whole", "debug", *arguments) if "q_loss" in row]
    assert math.isfinite(rows[-1]["q_loss"]) and rows[-1]["step"] >= 60
    train(tmp_path / "half", "debug", *arguments, "--steps", "40")
    again = [row for row in train(tmp_path / "half", "debug", *arguments) if "q_loss" in row]
    assert again[-1]["q_loss"] == rows[-1]["q_loss"]
