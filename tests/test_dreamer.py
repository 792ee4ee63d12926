from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import config
import dreamer
from comparing.runs import METRICS
from dreamer import Dreamer
from envs.routing import TSPInstance, TSPRules
from envs.tasks import RoutingTask
from envs.vector import RoutingVectorEnv
from guard import Guard
from parts.acting import Sight
from settings.imagination import ImaginationSettings
from tools import uniform
from training import devices, setup

CPU = torch.device("cpu")
NODES = 6
CONFIG_PATH = Path(dreamer.__file__).with_name("configs.yaml")


def debug_config(**changes: Any) -> config.Config:
    return config.load(CONFIG_PATH, ["debug"], {}).replace(**changes)


def agent(**changes: Any) -> Dreamer:
    torch.manual_seed(0)
    settings = debug_config(**changes)
    return Dreamer.of(
        setup.make_task(settings), settings, device=CPU, generators=devices.make_generators(0, CPU), guard=Guard("cpu")
    )


def train(logdir: Path, *arguments: str) -> list[dict[str, Any]]:
    dreamer.main(["--configs", "debug", *arguments, "--logdir", str(logdir)])
    return [json.loads(line) for line in (logdir / METRICS).read_text().splitlines()]


def last(rows: list[dict[str, Any]], name: str) -> float:
    return [row[name] for row in rows if name in row][-1]


# Learning

LEARN = [
    *("--steps", "4000", "--envs", "16", "--prefill", "112", "--replay_capacity", "4000", "--batch_size", "16"),
    *("--valid_instances", "512", "--eval_instances", "256", "--log_every", "1000", "--eval_every", "2000"),
    *("--checkpoint_every", "4000", "--actor.lr", "3e-3", "--reward_updates", "2"),
]


@pytest.mark.run
def test_dreamer_learns_tsp_6_to_3_percent_with_a_learned_cost(tmp_path: Path):
    rows = train(tmp_path, *LEARN, "--imag_tours", "6", "--model_every", "8")
    # Untrained, it wanders; with LKH's tours it would be 0.
    assert rows[0]["valid_gap"] > 15
    assert last(rows, "valid_gap") <= 3
    assert last(rows, "eval_gap") <= 3
    assert last(rows, "move_error") < 0.05


# Variants

SHORT = ["--steps", "120", "--log_every", "40"]
CRITIC = ["--baseline", "critic", "--imag_start", "replay", "--imag_first", "stored", "--imag_tours", "1"]


@pytest.mark.run(shapes=True)
@pytest.mark.parametrize(
    "arguments",
    [
        CRITIC,
        [*CRITIC, "--imag_horizon", "3", "--actor.advantage_scale", "mean_abs", "--target_clip", "[-20, 0]"],
        ["--imag_gradient", "dynamics"],
        ["--imag_gradient", "both"],
        ["--imag_reward", "simulated", "--imag_augment", "true"],
        ["--model.reward_latent", "true", "--model.loss_scales.coords", "1", "--model.loss_scales.current_pos", "1"],
        ["--actor.type", "masked"],
        ["--actor.pointer.latent", "0", "--critic.latent", "false"],
    ],
    ids=" ".join,
)
def test_variant_runs_to_its_end(tmp_path: Path, arguments: list[str]):
    rows = train(tmp_path, *SHORT, *arguments)
    assert all(value is not None for row in rows for value in row.values())
    assert "eval_gap" in rows[-1]
    assert {row["miss_rate"] for row in rows if "miss_rate" in row} == {0.0}


@pytest.mark.run(shapes=True)
def test_predicted_mask_runs_to_its_end_and_logs_its_agreement_step_by_step(tmp_path: Path):
    rows = train(tmp_path, *SHORT, "--imag_mask", "predicted", "--imag_penalty", "2.0")
    assert "eval_gap" in rows[-1]
    for step in range(NODES):
        assert 0 < last(rows, f"imag_mask_step_{step}") <= 1
    assert max(row["miss_rate"] for row in rows if "miss_rate" in row) > 0
    # Masks are predicted in imagination only; the environment's own are always exact.
    assert {row["env_miss_rate"] for row in rows if "env_miss_rate" in row} == {0.0}


# Acting


def environment(count: int = 8) -> RoutingVectorEnv:
    generator = torch.Generator().manual_seed(1)
    return RoutingVectorEnv(
        TSPRules, num_envs=count, num_nodes=NODES, device=CPU, generator=generator, check_actions=True
    )


@pytest.mark.parametrize("actor_type", ["tsp_pointer", "masked"])
def test_act_is_legal_over_several_episodes(actor_type: str):
    acting, env, draws = agent(**{"actor.type": actor_type}), environment(), torch.Generator().manual_seed(2)
    obs, info = env.reset()
    state = acting.initial_state(8)
    for _ in range(3 * (NODES + 1)):
        action, state = acting.act(Sight.of(obs, info), state, generator=draws)
        obs, _, _, _, info = env.step(action)
    assert obs["visited"].shape == (8, NODES)


def test_act_forgets_the_episode_before():
    acting, env = agent(), environment()
    obs, _ = env.reset()
    everywhere = torch.ones(8, dtype=torch.bool)

    def first_action(state: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        return acting.act(Sight(obs, everywhere, True), state, generator=torch.Generator().manual_seed(3))

    fresh, fresh_state = first_action(acting.initial_state(8))
    other, used = environment(), acting.initial_state(8)
    other_obs, _ = other.reset(seed=9)
    _, used = acting.act(Sight(other_obs, everywhere, True), used, generator=None)
    again, again_state = first_action(used)
    assert torch.equal(fresh, again)
    assert torch.equal(fresh_state["deter"], again_state["deter"])
    assert torch.equal(fresh_state["static"]["whole"], again_state["static"]["whole"])


def test_act_renews_the_tables_of_those_whose_episode_begins_and_of_no_other():
    acting = agent()
    one, other = environment(), environment()
    obs, _ = one.reset()
    new_obs, _ = other.reset(seed=9)
    everywhere = torch.ones(8, dtype=torch.bool)
    _, state = acting.act(Sight(obs, everywhere, True), acting.initial_state(8), generator=None)
    begins = torch.arange(8) < 3
    mixed = {key: torch.where(begins.view(-1, *[1] * (obs[key].ndim - 1)), new_obs[key], obs[key]) for key in obs}
    _, renewed = acting.act(Sight(mixed, begins, True), state, generator=None)
    for name, table in renewed["static"].items():
        assert torch.equal(table[3:], state["static"][name][3:])
        assert not any(torch.equal(table[row], state["static"][name][row]) for row in range(3))


def test_latent_while_acting_equals_the_one_observed_in_replay():
    acting, env = agent(), environment(4)
    draws, same_draws = (torch.Generator().manual_seed(2) for _ in range(2))
    obs, info = env.reset()
    state, deters, noise, rows = acting.initial_state(4), [], [], []
    for step in range(NODES):
        action, state = acting.act(Sight(obs, info["is_first"], step == 0), state, generator=draws)
        deters.append(state["deter"])
        noise.append(uniform((4, acting.model.rssm.stoch_size), same_draws))
        uniform((4, 1), same_draws)
        rows.append({**obs, "is_first": info["is_first"], "action": action})
        obs, _, _, _, info = env.step(action)
    batch = {key: torch.stack([row[key] for row in rows], 1) for key in rows[0]}
    batch["prev_action"] = torch.cat((torch.zeros(4, 1, dtype=torch.int64), batch["action"][:, :-1]), 1)
    latents = acting.model.observe(batch, torch.stack(noise, 1)).latents
    torch.testing.assert_close(latents.deter, torch.stack(deters, 1))


# The four verbs


def test_restored_agent_acts_and_counts_like_the_saved_one():
    one, other = agent(), agent(seed=1)
    with torch.no_grad():
        for parameter in one.model.parameters():
            parameter.add_(0.1)
    one.learner.updates = 7
    other.load_state_dict(one.state_dict())
    assert other.learner.updates == 7
    for part in ("model", "behavior"):
        theirs = getattr(other, part).state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in getattr(one, part).state_dict().items())


def test_weights_alone_leave_the_counters():
    one, other = agent(), agent()
    one.learner.updates = 7
    other.load_weights(one.state_dict())
    assert other.learner.updates == 0


def test_pictures_draw_the_imagined_tour():
    shown = agent()
    pictures: Any = shown.imagination.pictures(
        shown.behavior.actor, needs_latent=shown.behavior.needs_latent, reward_scale=1.0, device=CPU
    )
    drawn = pictures(TSPInstance(torch.rand(1, NODES, 2)))
    assert drawn.keys() == {"imagined"}
    picture = drawn["imagined"]
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[-1] == 3
    assert picture.std() > 0


def test_make_task_takes_the_nodes_from_the_config():
    task = setup.make_task(debug_config(nodes=9))
    assert task.rules is not None and issubclass(task.rules, TSPRules)
    assert task == RoutingTask.of(task.rules, 9)


# Settings


def test_imagination_reads_horizon_and_range():
    settings = ImaginationSettings.of(debug_config(imag_horizon="7", target_clip="[-20, 0]", baseline="critic"))
    assert settings.horizon == 7
    assert settings.target_clip == (-20.0, 0.0)
    assert ImaginationSettings.of(debug_config()).horizon == "episode"


def test_imagination_refuses_a_range_that_is_none():
    with pytest.raises(ValueError, match="target_clip is '\\[low, high\\]'; a range is written as two numbers"):
        ImaginationSettings.of(debug_config(target_clip="[low, high]"))
