"""Imagined plans that begin with moves which nobody chose: which moves, and what is learnt of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from config import UserError
from envs.tasks import RoutingTask
from imagining.routing_starts import first_moves
from routing.cvrp import CVRPInstance, CVRPRules
from routing.pickup import PickupRules
from routing.rules import Rules
from tests.scenes import CPU, RANGE, Scene, generator

NODES, TOURS = 6, 8
CVRP = RoutingTask.of(CVRPRules, NODES)
STEPS = CVRPRules.episode_steps(NODES)


def instances(count: int, num_nodes: int = NODES, rules: type[Rules] = CVRPRules) -> Any:
    return rules.random(count, num_nodes, generator=generator(3), device=CPU)


def begun(**changes: Any) -> tuple[Scene, Any]:
    """A scene whose plans begin anywhere, and where some of them begin."""
    scene = Scene(CVRP, imag_first="any", imag_tours=TOURS, **changes)
    instance = instances(5)
    batch = {name: part[:, None] for name, part in CVRPRules.observe(instance, CVRPRules.reset(instance)).items()}
    return scene, scene.start(batch)


@pytest.mark.parametrize("rules", [CVRPRules, PickupRules])
def test_given_first_moves_are_legal_and_different(rules):
    instance = instances(50, 9, rules)
    moves = first_moves(rules, instance, 4, generator())
    assert rules.action_mask(rules.reset(instance)).gather(-1, moves).all()
    assert all(len(set(row)) == 4 for row in moves.tolist())
    # Another draw gives others.
    assert not moves.equal(first_moves(rules, instance, 4, generator(1)))


def test_given_first_moves_come_again_where_there_are_fewer():
    coords = torch.rand(1, 6, 2)
    padded = CVRPInstance(
        coords=coords,
        demand=torch.tensor([[0, 1, 1, 1, 0, 0]]),
        capacity=torch.tensor([3]),
        valid=torch.tensor([[True] * 4 + [False] * 2]),
    )
    (row,) = first_moves(CVRPRules, padded, 7, generator()).tolist()
    assert sorted(row[:3]) == [1, 2, 3]
    assert row[3:] == [*row[:3], row[0]]


def test_half_of_the_plans_of_a_depot_begin_with_moves_that_are_given():
    scene, start = begun()
    given = scene.imagine(start, horizon=STEPS)
    free = scene.imagine(start._replace(given=None), horizon=STEPS)
    assert start.given.shape == (5, TOURS // 2)
    assert given.action[:, TOURS // 2 :, 0].equal(start.given)
    # The first half is what the actor draws by the same noise anyway.
    assert given.action[:, : TOURS // 2].equal(free.action[:, : TOURS // 2])
    assert not free.action[:, TOURS // 2 :, 0].equal(start.given)


def test_nothing_is_learnt_about_moves_that_were_given():
    scene, start = begun()
    trajectory = scene.imagine(start, horizon=STEPS)
    worth, _ = scene.behavior.worth(trajectory, start, scene.imagination.node_set(start.context), RANGE)
    assert (worth.weight[:, TOURS // 2 :, 0] == 0).all()
    assert worth.weight[:, : TOURS // 2].equal(trajectory.survival[:, : TOURS // 2])
    assert worth.weight[:, TOURS // 2 :, 1:].equal(trajectory.survival[:, TOURS // 2 :, 1:])


def test_plans_with_given_moves_are_compared_among_themselves():
    scene, _ = begun(imag_reward="simulated")
    returns = torch.tensor([1.0, 3.0, 2.0, 2.0, 10.0, 14.0, 12.0, 12.0])[None, :, None]
    advantage = scene.behavior.returns.advantage(returns, None, given=4)
    # Of 1, 3, 2, 2 the others' means are 7/3, 5/3, 2, 2; of the last four likewise.
    expected = [-4 / 3, 4 / 3, 0.0, 0.0, -8 / 3, 8 / 3, 0.0, 0.0]
    assert advantage[0, :, 0].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"imag_tours": 3}, "imag_tours of 4 or more, got 3, or imag_first: stored"),
        ({"imag_gradient": "dynamics"}, "nobody chose: it needs imag_gradient: reinforce, or imag_first: stored"),
    ],
)
def test_given_moves_are_refused_where_they_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        Scene(CVRP, imag_first="any", **changes)
