"""Instances that are filled up to a common size: every answer is that of the instance alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dreamer
from comparing.runs import METRICS
from config import load
from envs.routing import ATSPRules, PickupRules, TSPRules, VRPTWRules
from envs.tasks import RoutingTask
from envs.vector import RoutingVectorEnv
from parts.acting import Sight
from routing.cvrp import CVRPRules
from routing.rules import Instance, Rules
from settings.learning import PointerSettings
from settings.sac import SoftSettings
from soft.losses import RoutingSoft
from tests.scenes import (
    CONFIG_PATH,
    CPU,
    Scene,
    generator,
    place_costs,
    pointer_of,
    refusal,
    without_times,
    without_zero_outputs,
)

NODES, SIZE, TOURS = 6, 9, 4
PROBLEMS = [TSPRules, ATSPRules, CVRPRules, PickupRules, VRPTWRules, CVRPRules.under(place_costs())]
LOSSES = {"model.loss_scales.current_pos": 1.0, "imag_first": "stored"}


def batch_of(rules: type[Rules], instance: Instance, *, rows: int) -> dict[str, Tensor]:
    """One whole episode of each instance, by a policy that cannot see padding; it may wait at its end."""
    draws, count = generator(5), len(instance.coords)
    state, reward = rules.reset(instance), torch.zeros(count)
    prev_action, parts = torch.zeros(count, dtype=torch.int64), []
    ended = was_ended = torch.zeros(count, dtype=torch.bool)
    for row in range(rows):
        obs = rules.observe(instance, state)
        preference = torch.rand(count, NODES, generator=draws)
        action = torch.where(obs["action_mask"][:, :NODES], preference, -1.0).argmax(-1)
        # What follows the end counts as another episode.
        flags = {"is_first": was_ended | (row == 0), "is_last": ended, "is_terminal": ended}
        was_ended = ended
        parts.append({**obs, **flags, "action": action, "prev_action": prev_action, "reward": reward})
        reward = -rules.cost(instance, state, action)
        state, ended = rules.step(state, action)
        prev_action = action
    return {key: torch.stack([part[key] for part in parts], 1) for key in parts[0]}


def pair(rules: type[Rules], count: int = 3) -> tuple[Instance, Instance]:
    alone = rules.random(count, NODES, generator=generator(3), device=CPU)
    return alone, rules.pad(alone, SIZE)


def scenes(rules: type[Rules], **changes: Any) -> list[Scene]:
    """The same networks for two sizes of task."""
    made = []
    for size in (NODES, SIZE):
        task = RoutingTask.of(rules, size)
        made.append(Scene(task, **LOSSES | changes))
        without_zero_outputs(made[-1].model)
        made[-1].behavior.load_state_dict(made[0].behavior.state_dict())
        made[-1].model.load_state_dict(made[0].model.state_dict())
    return made


def run(logdir: Path, *arguments: str) -> list[dict[str, Any]]:
    dreamer.main([*arguments, "--logdir", str(logdir)])
    return without_times([json.loads(line) for line in (logdir / METRICS).read_text().splitlines()])


@pytest.mark.parametrize("rules", PROBLEMS)
def test_padding_is_never_legal_and_changes_no_cost_and_no_end(rules):
    alone, padded = pair(rules)
    rows = rules.episode_steps(NODES) + 1
    short, long = (batch_of(rules, instance, rows=rows) for instance in (alone, padded))
    assert not long["action_mask"][:, :, NODES:].any()
    assert long["action_mask"][:, :, :NODES].equal(short["action_mask"])
    for key in ("action", "reward", "is_last"):
        assert short[key].equal(long[key])
    assert rules.longest_leg(padded).equal(rules.longest_leg(alone))
    states = [rules.restore(batch)[1] for batch in (short, long)]
    assert rules.remaining_legs(states[0]).equal(rules.remaining_legs(states[1]))


@pytest.mark.parametrize("rules", PROBLEMS)
def test_padded_instances_have_the_tables_and_values_of_the_unpadded(rules):
    alone, padded = pair(rules)
    scene, _ = scenes(rules)
    actor, critic = pointer_of(scene), scene.behavior.critic
    short, long = (actor.encode(rules.node_features(each), valid=each.valid) for each in (alone, padded))
    torch.testing.assert_close(long.current.unflatten(-1, (-1, SIZE))[:, :NODES, :, :NODES].flatten(2), short.current)
    embedded, expected = (critic.tables(scene.model.node_set(each)) for each in (padded, alone))
    assert embedded is not None and expected is not None
    torch.testing.assert_close(embedded.nodes[:, :NODES], expected.nodes)
    assert not embedded.nodes[:, NODES:].any()


@pytest.mark.parametrize("rules", PROBLEMS)
def test_padded_batches_give_the_world_model_the_losses_of_the_unpadded(rules):
    alone, padded = pair(rules)
    small, large = scenes(rules)
    rows = rules.episode_steps(NODES) + 1
    noise = torch.rand(3, rows, small.model.rssm.stoch_size, generator=generator(1))
    short, _, _ = small.model.loss(batch_of(rules, alone, rows=rows), noise)
    long, _, _ = large.model.loss(batch_of(rules, padded, rows=rows), noise)
    for name, loss in short.items():
        torch.testing.assert_close(long[name], loss, msg=name)


@pytest.mark.parametrize("rules", PROBLEMS)
@pytest.mark.parametrize("mask", ["rules", "predicted"])
def test_padded_batches_are_imagined_as_the_unpadded(rules, mask):
    alone, padded = pair(rules)
    # Tours spread over the nodes begin at valid ones.
    small, large = scenes(rules, imag_first="any" if rules.starts_anywhere else "stored", imag_mask=mask)
    rows, horizon = rules.episode_steps(NODES) + 1, rules.episode_steps(NODES)
    short, long = (
        scene.imagine_from(batch_of(rules, each, rows=rows), horizon=horizon)[1]
        for scene, each in ((small, alone), (large, padded))
    )
    for name in ("action", "survival"):
        assert getattr(short, name).equal(getattr(long, name)), name
    torch.testing.assert_close(long.moments.feat, short.moments.feat)
    mask = long.moments.view.action_mask
    assert mask is not None and not mask[..., NODES:].any()


@pytest.mark.parametrize("rules", PROBLEMS)
def test_padded_batches_give_actor_and_critic_the_losses_of_the_unpadded(rules):
    alone, padded = pair(rules)
    # Without latents, noise is drawn in an order that a longer horizon does not change.
    small, large = scenes(rules, **{"actor.pointer.latent": 0, "critic.latent": False})
    rows = rules.episode_steps(NODES) + 1
    short, metrics = small.losses(batch_of(rules, alone, rows=rows))
    long, padded_metrics = large.losses(batch_of(rules, padded, rows=rows))
    for name, loss in short.items():
        torch.testing.assert_close(long[name], loss, msg=name)
    torch.testing.assert_close(padded_metrics["imag_return"], metrics["imag_return"])


@pytest.mark.parametrize("rules", PROBLEMS)
def test_padded_batches_give_sac_the_tables_and_losses_of_the_unpadded(rules):
    alone, padded = pair(rules)
    settings = load(CONFIG_PATH, ["sac"], {})
    soft = RoutingSoft(rules, SoftSettings.of(settings), pointer=PointerSettings.of(settings), discount=1.0, device=CPU)
    rows = rules.episode_steps(NODES) + 1
    short, long = (batch_of(rules, each, rows=rows) for each in (alone, padded))
    (losses, metrics), (padded_losses, padded_metrics) = (soft.losses(each, generator(1)) for each in (short, long))
    torch.testing.assert_close(padded_losses, losses)
    torch.testing.assert_close(padded_metrics, metrics)
    first = torch.ones(len(alone.coords), dtype=torch.bool)
    tables, padded_tables = (
        soft.act(Sight({key: part[:, 0] for key, part in each.items()}, first, True), {}, generator=None)[1]
        for each in (short, long)
    )
    torch.testing.assert_close(padded_tables["direct"][:, :NODES, :NODES], tables["direct"])
    padded_scores = padded_tables["current"].unflatten(-1, (-1, SIZE))[:, :NODES, :, :NODES].flatten(2)
    torch.testing.assert_close(padded_scores, tables["current"])


@pytest.mark.parametrize("rules", PROBLEMS)
def test_vector_env_draws_the_sizes_of_its_curriculum_and_goes_on_with_them(rules):
    def make(draws: torch.Generator) -> RoutingVectorEnv:
        stages = [(3, 40), (5, None)]
        return RoutingVectorEnv(
            rules, num_envs=4, num_nodes=NODES, curriculum=stages, device=CPU, generator=draws, check_actions=True
        )

    def step(env: RoutingVectorEnv, obs: dict[str, Tensor]) -> tuple[Any, ...]:
        return env.step(obs["action_mask"].int().argmax(-1))

    draws = generator()
    env, sizes, decisions = make(draws), [], 0
    obs, _ = env.reset()
    assert env.single_observation_space.contains({key: value[0].numpy() for key, value in obs.items()})
    for _ in range(40):
        began = obs["valid"].sum(-1).tolist()
        obs, _, _, _, info = step(env, obs)
        sizes += [size for size, first in zip(obs["valid"].sum(-1).tolist(), info["is_first"], strict=True) if first]
        assert obs["valid"].sum(-1)[~info["is_first"]].tolist() == [
            size for size, first in zip(began, info["is_first"], strict=True) if not first
        ]
        decisions += info["decisions"]
        if decisions == 32:
            # A new environment goes on in the middle of a stage.
            state = env.state_dict()
            env = make(draws)
            env.load_state_dict(state)
    assert sizes == sorted(sizes) and set(sizes) == {3, 5}
    assert decisions > 40


@pytest.mark.slow(shapes=True)
def test_curriculum_trains_and_goes_on_in_every_stage(tmp_path):
    stages = ["--curriculum", "[[3, 100], [4, 100], [6, null]]", "--eval_every", "1000", "--log_every", "60"]
    command = ["--configs", "debug", "--device", "cpu", "--steps", "300", "--checkpoint_every", "80", *stages]
    whole = run(tmp_path / "whole", *command, "--checkpoint_numbered", "true")
    saved = sorted((tmp_path / "whole").glob("step_*.pt"))
    assert len(saved) == 4
    for path in saved[:3]:
        rows = run(tmp_path / path.stem, *command, "--resume", str(path))
        assert rows == whole[-len(rows) :]
    assert whole[-1]["eval_gap"] > 0


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("[[3, 10], [5, null]]", "ends with 5 nodes"),
        ("[[7, 10], [6, null]]", "3 to 6 nodes"),
        ("[[3, null], [6, null]]", "the last [nodes, null]"),
        ("[[3, 0], [6, null]]", "at least"),
        ("[3, 6]", "[nodes, env steps]"),
    ],
)
def test_curriculum_that_cannot_be_is_refused(stages, message, capsys, tmp_path: Path):
    line = refusal(capsys, "--configs", "debug", "--curriculum", stages, "--logdir", str(tmp_path / "run"))
    assert message in line
    assert not (tmp_path / "run").exists()
