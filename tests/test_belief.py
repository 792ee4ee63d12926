"""Belief about hidden costs: what it reads, what the head is asked, and how the actor comes to know."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from dreamer import Dreamer
from envs.routing import TSPInstance, TSPRules
from envs.vector import RoutingVectorEnv
from guard import Guard
from imagining.routing_model import RoutingModel
from imagining.world_model import Observed
from parts.acting import Sight
from parts.moves import MoveHead, move_geometry
from routing.costs import find_costs
from routing.files import RoutingInstance
from routing.instances import field_test_coords
from routing.metrics import EXACT
from solving.decoding import Decoding, best_tours
from tests.scenes import (
    CPU,
    NODES,
    Scene,
    debug_config,
    episodes,
    generator,
    place_costs,
    pointer_of,
    routing,
    routing_replay,
    without_zero_outputs,
)
from training.devices import make_generators

BELIEF: dict[str, Any] = {
    "model__belief": True,
    "imag_start": "rows",
    "imag_first": "stored",
    "actor__pointer__latent": 0,
    "critic__latent": False,
}
BLIND = BELIEF | {"model__belief": False, "imag_start": "episodes"}
RULES = TSPRules.under(find_costs("stretch"))
HIDDEN = routing("stretch")


def believing(*, shown: str = "paid", **changes: Any) -> Scene:
    """A scene whose head and actor make something of their latent from the first update on."""
    scene = Scene(routing("stretch", shown=shown), **(BELIEF | changes))
    without_zero_outputs(scene.model)
    return scene


def stretched(count: int = 4, *, shown: str = "paid") -> dict[str, Tensor]:
    return episodes(count, rules=routing("stretch", shown=shown).rules)


def beliefs(scene: Scene, batch: dict[str, Tensor]) -> Tensor:
    instance, _ = RULES.restore({key: value[:, 0] for key, value in batch.items()})
    return scene.model.believe(batch, instance)


# What the belief reads


def test_belief_knows_what_the_last_move_cost_and_not_what_the_next_will():
    scene, batch = believing(), stretched()
    changed = batch["last_cost"].clone()
    changed[:, 3] *= 2
    before, after = beliefs(scene, batch), beliefs(scene, batch | {"last_cost": changed})
    assert before[:, :3].equal(after[:, :3])
    assert (before[:, 3:] != after[:, 3:]).any(-1).all()


def test_latent_reads_no_costs():
    scene, batch = believing(), stretched()
    changed = batch | {"last_cost": batch["last_cost"] + 1}
    assert scene.observe(batch).latents.feat().equal(scene.observe(changed).latents.feat())


def test_blank_costs_tell_the_belief_nothing():
    scene = believing(shown="nothing")
    paid, blank = stretched(), stretched(shown="nothing")
    assert paid["reward"].equal(blank["reward"]) and (blank["last_cost"] == 0).all()
    other = blank | {"reward": 2 * blank["reward"]}
    assert beliefs(scene, blank).equal(beliefs(scene, other))


def test_shown_factors_need_a_belief_to_read_them():
    with pytest.raises(ValueError, match="cost_shown: factors is read by a belief alone"):
        Scene(routing("stretch", shown="factors"))


def test_shown_factors_reach_the_belief_at_the_first_row():
    scene, batch = believing(shown="factors"), stretched(shown="factors")
    other = batch | {"factors": (batch["factors"] + 0.5) % 1}
    assert (beliefs(scene, batch)[:, 0] != beliefs(scene, other)[:, 0]).any(-1).all()


def test_belief_of_an_episodes_first_row_is_that_of_no_move():
    scene, batch = believing(), stretched()
    instance, _ = RULES.restore({key: value[:, 0] for key, value in batch.items()})
    first = beliefs(scene, batch)[:, 0]
    torch.testing.assert_close(first, scene.model.first_belief(instance))
    torch.testing.assert_close(first, first[:1].expand(4, -1))


def test_belief_goes_on_from_the_one_before():
    scene, batch = believing(), stretched()
    instance, _ = RULES.restore({key: value[:, 0] for key, value in batch.items()})
    whole = beliefs(scene, batch)
    later = {key: value[:, 3:] for key, value in batch.items()}
    torch.testing.assert_close(scene.model.believe(later, instance, whole[:, 2]), whole[:, 3:])


# What the head is asked


def hand_loss(scene: Scene, batch: dict[str, Tensor], belief: Tensor) -> float:
    """Every move of every episode, asked of every belief that chose one."""
    errors = []
    for row in range(batch["reward"].shape[0]):
        for move in range(NODES):
            origin, target = (batch["coords"][row, 0, batch[key][row, move]] for key in ("current_node", "action"))
            for time in range(NODES):
                predicted = scene.model.predict_move(origin, target, belief[row, time])
                errors.append((predicted - batch["reward"][row, move + 1]).square())
    return torch.stack(errors).mean().item()


def test_head_is_trained_on_all_moves_of_an_episode_by_every_belief():
    scene, batch = believing(), stretched()
    instance, _ = RULES.restore({key: value[:, 0] for key, value in batch.items()})
    loss = scene.model.move_loss(batch, instance, None)
    assert loss.item() == pytest.approx(hand_loss(scene, batch, beliefs(scene, batch)), rel=1e-5)


def test_loss_of_the_head_reaches_what_reads_the_costs():
    scene, batch = believing(), stretched()
    losses, _, _ = scene.model.loss(batch, torch.rand(4, NODES + 1, scene.model.rssm.stoch_size, generator=generator()))
    losses["reward"].backward()
    assert scene.model.belief is not None
    gradients = [parameter.grad for parameter in scene.model.belief.parameters()]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def test_move_head_gives_the_same_for_one_latent_of_many_moves():
    head = MoveHead(latent_size=5, units=8, layers=2)
    without_zero_outputs(head)
    origin, target, latent = torch.rand(3, 7, 2), torch.rand(3, 7, 2), torch.rand(3, 1, 5)
    torch.testing.assert_close(head(origin, target, latent), head(origin, target, latent.expand(3, 7, 5)))
    assert head.gate is not None
    out = head.output(head.hidden[2:](head.hidden[:2](move_geometry(origin, target)) * (1 + head.gate(latent))))
    expected = out[..., 0] * (target - origin).norm(dim=-1) + out[..., 1]
    torch.testing.assert_close(head(origin, target, latent)[0], expected)


def test_belief_compares_what_was_paid_with_what_was_expected_between_places():
    costs = place_costs(tables=3)
    model = Scene(routing(costs), **BELIEF).model
    lived = routing_replay(num_envs=4, columns=5 * (NODES + 1), rules=routing(costs).rules)
    batch = lived.sample(4, NODES + 1, whole_episodes=True, generator=generator())
    assert model.belief.compares
    # The head knows a toll at one place, of which the geometry says nothing.
    head = model.heads["reward"]
    without_zero_outputs(head)
    instance = model.first_instance(batch)
    before = model.believe(batch, instance)
    with torch.no_grad():
        head.places.weight[1 + int(instance.place[0, 3])] += 5.0
    after = model.believe(batch, instance)
    moved_from_there = (batch["last_node"][0] == 3) & (batch["last_cost"][0, :, 0] != 0)
    first = int((moved_from_there | (batch["current_node"][0] == 3)).nonzero()[0])
    assert torch.equal(before[0, :first], after[0, :first])
    assert not torch.equal(before[0, first], after[0, first])


# Where imagination starts


def observed_and_start(scene: Scene, batch: dict[str, Tensor]) -> tuple[Observed, Any]:
    observed = scene.observe(batch)
    draws = generator(0)
    latents = observed if scene.behavior.needs_latent else None
    return observed, scene.imagination.start(batch, latents, needs_latent=scene.behavior.needs_latent, generator=draws)


def test_row_starts_are_rows_of_their_episode_with_their_belief():
    scene, batch = believing(imag_tours=3), stretched(64)
    _, start = observed_and_start(scene, batch)
    row = start.state.visited[:, 0].sum(-1) - 1
    every = torch.arange(64)
    assert start.state.current.equal(batch["current_node"][every, row][:, None].expand(-1, 3))
    torch.testing.assert_close(start.context.belief, beliefs(scene, batch)[every, row])
    assert (start.weight == 1).all() and start.latent is None


def test_row_starts_are_early_rows_mostly_and_never_the_last():
    scene, batch = believing(), stretched(600)
    _, start = observed_and_start(scene, batch)
    counts = (start.state.visited[:, 0].sum(-1) - 1).bincount(minlength=NODES + 1)
    # The smaller of two draws lies in the k-th of 6 parts with probability (2 (6 - k) + 1) / 36, k from 1.
    expected = 600 * torch.tensor([11, 9, 7, 5, 3, 1, 0]) / 36
    # The last rows show every node visited, the closing leg still to go or done.
    assert counts[:5].sub(expected[:5]).abs().max() < 50
    assert counts.sum() == 600


def test_imagined_rewards_are_those_of_the_belief_at_the_start():
    scene, batch = believing(), stretched()
    start, trajectory = scene.imagine_from(batch)
    reward = scene.imagination.reward(trajectory, start)
    assert start.context.belief is not None and trajectory.moments.state is not None
    table = scene.model.predict_moves(start.context.instance, start.context.belief)
    current = trajectory.moments.state.current[:, :, :-1]
    expected = table[torch.arange(4)[:, None, None], current, trajectory.action] * trajectory.survival
    torch.testing.assert_close(reward, expected)


def test_generated_starts_mix_fresh_maps_with_replayed_ones():
    batch = episodes(8)
    start = Scene(imag_start="generated", imag_generated=0.25).start(batch)
    assert start.context is not None
    coords, stored = start.context.instance.coords, batch["coords"][:, 0]
    assert (coords == stored).all((1, 2)).tolist() == [True] * 6 + [False] * 2
    assert coords.min() >= 0 and coords.max() <= 1
    other = Scene(imag_start="generated", imag_generated=0.25).start(batch, seed=1)
    assert other.context is not None and not other.context.instance.coords[6:].equal(coords[6:])
    few = Scene(imag_start="generated", imag_generated=0.01).start(batch)
    assert few.context is not None
    assert (few.context.instance.coords == stored).all((1, 2)).tolist() == [True] * 7 + [False]


# How the actor comes to know


def test_belief_changes_the_policy_and_predicted_costs_are_part_of_it():
    scene, batch = believing(), stretched()
    _, start = observed_and_start(scene, batch)
    actor, model, instance = pointer_of(scene), scene.model, start.context.instance
    nodes = RULES.node_features(instance)
    moves = model.predict_moves(instance, start.context.belief)
    plain = actor.encode(nodes, start.context.belief, torch.zeros_like(moves))
    torch.testing.assert_close(actor.encode(nodes, start.context.belief, moves).direct - plain.direct, 0.5 * moves)
    other = actor.encode(nodes, start.context.belief.roll(1, 0), moves)
    assert not other.current.isclose(plain.current).all()


def test_every_part_of_a_believing_actor_learns():
    scene, batch = believing(), stretched(8)
    losses, _ = scene.losses(batch)
    losses["actor"].backward()
    without = [name for name, p in scene.behavior.actor.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert without == []
    assert all(parameter.grad is None for parameter in scene.model.parameters())


def routing_model(agent: Dreamer) -> RoutingModel:
    assert isinstance(agent.model, RoutingModel)
    return agent.model


def hidden_agent(**changes: Any) -> Dreamer:
    settings, generators = debug_config(**changes), make_generators(0, CPU)
    agent = Dreamer.of(HIDDEN, settings, device=CPU, generators=generators, guard=Guard("cpu"))
    without_zero_outputs(agent.model)
    return agent


def test_solver_plans_by_what_is_believed_before_any_move(monkeypatch: pytest.MonkeyPatch):
    agent = hidden_agent(**{key.replace("__", "."): value for key, value in BELIEF.items()})
    cases = [RoutingInstance(str(i), "tsp", nodes, EXACT) for i, nodes in enumerate(field_test_coords(NODES, 3))]
    seen = tables_of(agent, monkeypatch)
    best_tours(agent.behavior, cases, Decoding())
    instance = TSPInstance(torch.tensor(field_test_coords(NODES, 3)).float())
    model = routing_model(agent)
    belief = model.first_belief(instance)
    assert belief is not None
    by_belief, without = (agent.behavior.actor.tables(model.node_set(instance, each)) for each in (belief, None))
    assert by_belief is not None and without is not None
    torch.testing.assert_close(seen[0], by_belief.direct)
    assert not seen[0].isclose(without.direct).all()


@torch.no_grad()
def greedy_episode(agent: Dreamer) -> dict[str, Tensor]:
    """What two environments show of an episode, [2, T, ...]."""
    env = RoutingVectorEnv(HIDDEN.rules, num_envs=2, num_nodes=NODES, device=CPU, generator=generator(3))
    obs, info = env.reset()
    state, rows = agent.initial_state(2), []
    for _ in range(NODES):
        rows.append(obs)
        action, state = agent.act(Sight.of(obs, info), state, generator=None)
        obs, _, _, _, info = env.step(action)
    return {key: torch.stack([row[key] for row in rows], 1) for key in obs}


def tables_of(agent: Dreamer, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The direct scores that every decision from here on is taken by, as they come."""
    seen: list[Tensor] = []
    forward = agent.behavior.actor.forward

    def record(feat: Tensor, tables: Any, view: Any) -> Any:
        seen.append(tables.direct)
        return forward(feat, tables, view)

    monkeypatch.setattr(agent.behavior.actor, "forward", record)
    return seen


def tables_while_acting(agent: Dreamer, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The direct scores that every decision of an episode was taken by."""
    seen = tables_of(agent, monkeypatch)
    greedy_episode(agent)
    return seen


def test_acting_believes_what_training_believes(monkeypatch: pytest.MonkeyPatch):
    agent = hidden_agent(**BELIEF)
    believe, seen = routing_model(agent).believe, []

    def record(*arguments: Any) -> Tensor:
        seen.append(believe(*arguments))
        return seen[-1]

    monkeypatch.setattr(agent.model, "believe", record)
    batch = greedy_episode(agent)
    instance, _ = RULES.restore({key: value[:, 0] for key, value in batch.items()})
    torch.testing.assert_close(torch.cat(seen, 1), believe(batch, instance))
    assert (batch["last_cost"][:, 1:] > 0).all()


def test_belief_begins_anew_with_every_episode():
    agent = hidden_agent(**BELIEF)
    first = greedy_episode(agent)
    state = agent.initial_state(2)
    state["belief"] += 1
    obs = {key: value[:, 0] for key, value in first.items()}
    sight = Sight(obs, torch.ones(2, dtype=torch.bool), any_first=True)
    _, after = agent.act(sight, agent.initial_state(2), generator=None)
    _, second = agent.act(sight, state, generator=None)
    assert after["belief"].equal(second["belief"])


def test_acting_encodes_again_with_every_move_that_was_paid_for(monkeypatch: pytest.MonkeyPatch):
    believed = tables_while_acting(hidden_agent(**BELIEF), monkeypatch)
    assert all(not earlier.equal(later) for earlier, later in itertools.pairwise(believed))
    blind = tables_while_acting(hidden_agent(**BLIND), monkeypatch)
    assert all(table.equal(blind[0]) for table in blind)
