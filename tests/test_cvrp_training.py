"""CVRP through the networks, imagination, replay and the training loop."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

import dreamer
from envs.routing import tour_length
from envs.tasks import RoutingTask
from envs.vector import RoutingVectorEnv
from guard import Guard
from imagining.imagination import Trajectory
from networks import TSPPointerActor
from parts.acting import Sight
from parts.views import View
from routing.cvrp import CVRPRules, CVRPState
from routing.rules import each_part
from tests.scenes import CPU, Scene, debug_config, generator, instance_of, without_zero_outputs
from training import devices, setup, tours
from training.agent import Agent
from training.replay import Replay

NODES = 6
CVRP = RoutingTask.of(CVRPRules, NODES)
ROWS = CVRPRules.episode_steps(NODES) + 1
STORED = {"imag_first": "stored"}


def cvrp_batch(count: int = 4) -> dict[str, Tensor]:
    """What replay gives of random plans, whose windows go on into other episodes."""
    draws, num_envs = generator(5), 4
    env = RoutingVectorEnv(CVRPRules, num_envs=num_envs, num_nodes=NODES, device=CPU, generator=generator(6))
    obs, info = env.reset()
    spaces = {key: (tuple(value.shape[1:]), value.dtype) for key, value in obs.items()}
    replay = Replay({**spaces, "action": ((), torch.int64)}, num_envs=num_envs, capacity=num_envs * 60, device=CPU)
    reward, ended = torch.zeros(num_envs), torch.zeros(num_envs, dtype=torch.bool)
    for _ in range(60):
        action = torch.multinomial(obs["action_mask"].float(), 1, generator=draws)[:, 0]
        flags = {"is_first": info["is_first"], "is_last": ended, "is_terminal": ended}
        replay.add({**obs, **flags, "action": action, "reward": reward})
        obs, reward, ended, _, info = env.step(action)
    return replay.sample_episodes(count, ROWS, generator=draws)


def scene(**changes: Any) -> Scene:
    return Scene(CVRP, **STORED | changes)


def imagined(made: Scene, batch: dict[str, Tensor], **choices: Any) -> tuple[Any, Trajectory]:
    return made.imagine_from(batch, horizon=ROWS - 1, **choices)


def plan_states(trajectory: Trajectory) -> CVRPState:
    assert isinstance(trajectory.moments.state, CVRPState)
    return trajectory.moments.state


def test_replayed_windows_hold_one_whole_plan_and_count_no_more():
    batch = cvrp_batch(64)
    rows = (batch["is_first"].cumsum(1) <= 1).sum(1)
    assert batch["is_first"][:, 0].all()
    for row, count in enumerate(rows.tolist()):
        assert batch["is_terminal"][row, :count].tolist() == [False] * (count - 1) + [True]
        plan = batch["action"][row, : count - 1]
        length = tour_length(batch["coords"][row, :1], plan[None])
        torch.testing.assert_close(batch["reward"][row, 1:count].sum(), -length[0])
    assert rows.unique().numel() > 1


def test_imagined_masks_are_the_environments_at_every_step():
    start, trajectory = imagined(scene(), cvrp_batch())
    tours = trajectory.action.shape[1]
    instance = each_part(instance_of(start), lambda part: part.repeat_interleave(tours, 0))
    rows, horizon = len(instance.coords), trajectory.action.shape[2]
    env = RoutingVectorEnv(
        CVRPRules, num_envs=rows, num_nodes=NODES, device=CPU, instances=instance, check_actions=True
    )
    obs, _ = env.reset()
    running = torch.ones(rows, dtype=torch.bool)
    assert trajectory.moments.view.action_mask is not None
    for step in range(horizon):
        assert trajectory.moments.view.action_mask[:, :, step].flatten(0, 1)[running].equal(obs["action_mask"][running])
        assert trajectory.survival[:, :, step].flatten().equal(running.float())
        load = plan_states(trajectory).load[:, :, step].flatten()
        assert load[running].equal(obs["load"][running, 0])
        actions = torch.where(running, trajectory.action[:, :, step].flatten(), obs["action_mask"].int().argmax(-1))
        obs, _, ended, _, _ = env.step(actions)
        running = running & ~ended
    assert not running.any()


def test_imagination_that_ends_with_its_last_plan_learns_the_same(monkeypatch):
    made, batch = scene(), cvrp_batch()
    without_zero_outputs(made.model)
    short, _ = made.losses(batch)
    assert imagined(made, batch)[1].action.shape[2] < ROWS - 1
    # In lockstep imagination does not ask whether all have finished.
    monkeypatch.setattr(CVRPRules, "fixed_length", True)
    assert imagined(made, batch)[1].action.shape[2] == ROWS - 1
    whole, _ = made.losses(batch)
    for name, loss in short.items():
        torch.testing.assert_close(loss, whole[name], rtol=1e-5, atol=1e-6)


def test_imagined_demands_share_the_memory_of_the_instance():
    _, trajectory = imagined(scene(), cvrp_batch())
    demand = plan_states(trajectory).demand
    assert demand.shape[2] == trajectory.action.shape[2] + 1
    assert demand.stride(2) == 0


@pytest.mark.parametrize(
    "changes",
    [{}, {"baseline": "critic", "imag_start": "replay"}, {"actor.type": "masked"}, {"imag_mask": "predicted"}],
    ids=["episodes", "critic", "masked", "predicted"],
)
def test_gradient_reaches_every_parameter(changes: dict[str, Any]):
    # Within the free nats the prior has no gradient.
    made, batch = scene(**{"model.free_nats": 0.0} | changes), cvrp_batch()
    for module in (made.model, made.behavior):
        without_zero_outputs(module)
    losses, metrics = made.losses(batch)
    model_losses, _, _ = made.model.loss(batch, torch.rand(*batch["reward"].shape, made.model.rssm.stoch_size))
    torch.stack([*losses.values(), *model_losses.values()]).sum().backward()
    parameters = [*made.model.named_parameters(), *made.behavior.named_parameters()]
    idle = [name for name, p in parameters if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert idle == []
    assert all(p.grad.isfinite().all() for _, p in parameters if p.grad is not None)
    assert metrics["miss_rate"] == 0 or changes.get("imag_mask") == "predicted"


def test_rows_after_a_plan_change_no_loss():
    made, batch = scene(), cvrp_batch()
    later = batch["is_first"].cumsum(1) > 1
    assert later.any()
    changed = dict(batch)
    for name in ("load", "current_node", "reward", "action"):
        fill = later.view(*later.shape, *[1] * (batch[name].ndim - 2))
        changed[name] = torch.where(fill, torch.ones_like(batch[name]), batch[name])
    noise = torch.rand(*batch["reward"].shape, made.model.rssm.stoch_size)
    for before, after in zip(*(made.model.loss(each, noise)[0].values() for each in (batch, changed)), strict=True):
        torch.testing.assert_close(before, after, rtol=0, atol=0)


def test_load_enters_the_pointers_query_linearly():
    torch.manual_seed(0)
    actor = TSPPointerActor(
        0, 4, state_features=1, width=16, layers=1, heads=2, hidden=16, latent=0, clip=10.0, unimix=0.0
    )
    tables = actor.encode(torch.rand(3, NODES, 4))
    mask, node = torch.ones(3, 2, NODES, dtype=torch.bool), torch.zeros(3, 2, dtype=torch.long)
    load = torch.rand(3, 2, 1)
    scores = actor.scores(None, tables, View(mask, first=node, current=node, features=load))
    # The same query with its load moved into the row of the current node.
    assert tables.features is not None
    for query in range(2):
        moved = tables._replace(current=tables.current + load[:, query, :, None] * tables.features)
        none = torch.zeros(3, 1, 1)
        view = View(mask[:, :1], first=node[:, :1], current=node[:, :1], features=none)
        torch.testing.assert_close(actor.scores(None, moved, view)[:, 0], scores[:, query])
    assert (scores[:, 0] - scores[:, 1]).abs().max() > 1e-4


def test_critic_and_world_model_see_the_load():
    made, batch = scene(), cvrp_batch()
    without_zero_outputs(made.behavior)
    context, view = made.model.context(made.model.first_instance(batch)), made.model.view(batch)
    assert view.features is not None and view.action_mask is not None
    emptied = view._replace(features=torch.zeros_like(view.features))
    assert not made.model.encode({}, context, view).allclose(made.model.encode({}, context, emptied))
    critic = made.behavior.critic
    nodes = critic.tables(made.model.node_set(context.instance))
    feat = torch.zeros(*view.action_mask.shape[:-1], made.model.rssm.feat_size)
    values = [critic(feat, nodes, each).mean() for each in (view, emptied)]
    assert not values[0].allclose(values[1])


def cvrp_agent(**changes: Any) -> tuple[Agent, RoutingTask]:
    chosen = debug_config("cvrp_attn", **changes)
    generators = devices.make_generators(0, CPU)
    task = setup.make_task(chosen)
    return dreamer.Dreamer.of(task, chosen, device=CPU, generators=generators, guard=Guard(CPU)), task


@pytest.mark.parametrize("changes", [{}, {"actor.pointer.latent": 4}], ids=["plain", "latent"])
def test_evaluation_measures_the_plans_it_returns(changes: dict[str, Any]):
    agent, task = cvrp_agent(**changes)
    instances = setup.make_evaluation(NODES, 16, seed=4321, rules=CVRPRules)
    result = tours.evaluate(agent, task, instances, device=CPU)
    torch.testing.assert_close(result.lengths, tour_length(instances.coords, result.tours))
    for row, plan in enumerate(result.tours):
        assert sorted(plan[plan > 0].tolist()) == list(range(1, NODES))
        load = 0
        for node in plan.tolist():
            load = 0 if node == 0 else load + int(instances.instance.demand[row, node])
            assert load <= int(instances.instance.capacity[row])
    assert result.gap >= -1e-3


def test_acting_encodes_only_the_rows_that_begin():
    agent, _ = cvrp_agent()
    env = RoutingVectorEnv(
        CVRPRules, num_envs=4, num_nodes=NODES, device=CPU, generator=generator(3), check_actions=True
    )
    obs, info = env.reset()
    state = agent.initial_state(4)
    for _ in range(30):
        action, state = agent.act(Sight.of(obs, info), state, generator=None)
        everywhere = Sight(obs, torch.ones(4, dtype=torch.bool), any_first=True)
        fresh, _ = agent.act(everywhere, agent.initial_state(4), generator=None)
        assert action.equal(fresh)
        obs, _, _, _, info = env.step(action)


@pytest.mark.run(shapes=True)
def test_cvrp_run_trains_evaluates_and_goes_on(tmp_path, capsys):
    command = ["--configs", "cvrp_attn", "debug", "--logdir", str(tmp_path), "--device", "cpu"]
    dreamer.main([*command, "--steps", "100"])
    dreamer.main([*command, "--steps", "150"])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"train_return", "valid_gap", "eval_gap", "move_error", "model_loss"} <= set().union(*rows)
    assert all(row.get("miss_rate", 0) == 0 and row.get("env_miss_rate", 0) == 0 for row in rows)
    assert rows[-1]["step"] >= 150
