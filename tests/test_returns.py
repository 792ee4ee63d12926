"""What imagined actions earn: rewards, return targets and advantages, and the clipping of targets."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from config import load_function
from dreamer import Dreamer
from envs.routing import TSPInstance, TSPRules
from envs.tasks import Task
from guard import Guard
from imagining.imagination import Start, Trajectory
from imagining.returns import replayed_returns, statistics, values_outside
from parts.layers import MLP
from routing.cost_world import Costs
from routing.costs import GeometricCosts
from routing.places import PlaceCosts
from tests.scenes import (
    CPU,
    CRITIC,
    NODES,
    RANGE,
    ROUTING,
    SCRIPTED,
    Scene,
    constant_critic,
    debug_config,
    episodes,
    instance_of,
    lengths,
    place_costs,
    random_rows,
    routing,
    routing_replay,
    tours_of,
)
from tools import Bounds
from training.devices import make_generators
from training.replay import Replay
from updates.optimizer import Optimizer

# Six nodes in the unit square; the longest leg is a diagonal.
COORDS = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.5, 0.5], [0.5, 0.0]])
DIAGONAL = math.sqrt(2)


# Rewards


def test_penalty_is_taken_from_illegal_moves_alone():
    batch = episodes(32)
    plain, punished = (Scene(imag_mask="predicted", imag_penalty=penalty) for penalty in (0.0, 2.0))
    start, trajectory = plain.imagine_from(batch)
    assert trajectory.moments.true_mask is not None
    legal = trajectory.moments.true_mask[:, :, :-1].gather(-1, trajectory.action[..., None])[..., 0]
    difference = plain.imagination.reward(trajectory, start) - punished.imagination.reward(trajectory, start)
    assert (~legal).any()
    torch.testing.assert_close(difference, 2.0 * (~legal).float() * trajectory.survival)


@pytest.mark.parametrize("first", ["any", "stored"])
def test_simulated_return_is_minus_the_tours_length(first: str):
    scene = Scene(imag_reward="simulated", imag_first=first)
    start, trajectory = scene.imagine_from(episodes(16))
    returns = scene.imagination.reward(trajectory, start).sum(-1)
    torch.testing.assert_close(-returns, lengths(instance_of(start).coords, tours_of(trajectory)))


def test_head_comes_close_to_the_true_cost_from_replayed_moves_alone():
    head, truth = Scene(), Scene(imag_reward="simulated")
    batch = episodes(128)
    optimizer = Optimizer("model", {"model": head.model}, guard=Guard("cpu"), lr=1e-2, clip=10.0)
    for _ in range(150):
        loss = head.model.move_loss(batch, TSPInstance(batch["coords"][:, 0]), None)
        optimizer.step(loss, progress=0.0)
    start, trajectory = head.imagine_from(episodes(64))
    predicted = head.imagination.reward(trajectory, start)
    simulated = truth.imagination.reward(trajectory, start)
    assert (predicted - simulated).abs().mean() < 0.04
    assert simulated.abs().mean() > 0.3


@pytest.fixture
def cost_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The true cost of a move must not be asked for."""

    def refuse(*_arguments: object) -> Tensor:
        raise AssertionError("the true cost was asked for")

    monkeypatch.setattr(TSPRules, "cost", staticmethod(refuse))
    monkeypatch.setattr(TSPRules, "longest_leg", staticmethod(refuse))
    for kind in (GeometricCosts, PlaceCosts):
        for verb in ("between", "matrix", "mean_matrix"):
            monkeypatch.setattr(kind, verb, refuse)
    monkeypatch.setattr(GeometricCosts, "at", refuse)
    monkeypatch.setattr(PlaceCosts, "_look_up", refuse)


def agent(task: Task = ROUTING, **changes: Any) -> Dreamer:
    return Dreamer.of(task, debug_config(**changes), device=CPU, generators=make_generators(0, CPU), guard=Guard("cpu"))


@pytest.fixture
def replay() -> Replay:
    return routing_replay(num_envs=4, columns=5 * (NODES + 1))


@pytest.mark.parametrize(
    ("cost", "choices"),
    [
        ("euclidean", {}),
        ("river", {"imag_start": "generated"}),
        ("stretch", {}),
        ("stretch", {"model__belief": True, "imag_start": "rows", "imag_first": "stored"}),
        (place_costs(), {"imag_start": "generated"}),
        ("river", {"imag_teacher": 1.0, "actor__pointer__latent": 0, "model__show_moves": True}),
        (place_costs(tables=3), {"model__belief": True, "imag_start": "rows", "imag_first": "stored"}),
    ],
)
def test_learned_reward_never_asks_for_the_true_cost(
    cost: str | Costs, choices: dict[str, Any], request: pytest.FixtureRequest
):
    task = routing(cost)
    lived = routing_replay(num_envs=4, columns=5 * (NODES + 1), rules=task.rules)
    request.getfixturevalue("cost_refused")
    trained = agent(task, imag_reward="head", **choices)
    for update in range(8):
        trained.update(lived, progress=update / 8)
    assert trained.learner.updates == 8


def test_simulated_reward_asks_for_the_true_cost(replay: Replay, cost_refused: None):
    with pytest.raises(AssertionError, match="the true cost was asked for"):
        agent(imag_reward="simulated").update(replay, progress=0.0)


@pytest.mark.parametrize(
    ("cost", "choices", "message"),
    [
        ("stretch", {"imag_reward": "simulated"}, "costs of stretch depend on what is hidden.*imag_reward: head"),
        ("lanes", {"imag_reward": "simulated", "imag_augment": True}, "costs of lanes differ.*imag_augment: false"),
        ("lanes", {"model__belief": True}, "model.belief is about hidden costs"),
        (
            "stretch",
            {"model__belief": True, "imag_start": "replay", "imag_first": "stored"},
            "needs .*imag_start: rows",
        ),
        (
            "stretch",
            {"model__belief": True, "imag_start": "rows", "imag_first": "stored", "actor__type": "masked"},
            "only actor.type: tsp_pointer reads a belief",
        ),
    ],
)
def test_imagination_that_does_not_go_with_the_costs_is_refused(cost: str, choices: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        agent(routing(cost), **choices)


CUSTOM_REWARD = """
def twice_the_node(instance, state, action):
    return 2.0 * action + 0.0 * instance.coords.sum((-1, -2)) + 0 * state.current
"""


def test_custom_reward_is_loaded_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "own_reward.py").write_text(CUSTOM_REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    scene = Scene(imag_reward="own_reward:twice_the_node")
    start, trajectory = scene.imagine_from(episodes(4))
    reward = scene.imagination.reward(trajectory, start)
    torch.testing.assert_close(reward, 2.0 * trajectory.action)
    # No range is known for such returns.
    assert scene.bounds(trajectory, start) is None
    assert scene.update(episodes(4))["imag_return"] == 2.0 * sum(range(NODES))


@pytest.mark.parametrize("name", ["no_such_module:reward", "math:no_such_function"])
def test_custom_reward_that_cannot_be_loaded_is_refused(name: str):
    with pytest.raises(ValueError, match=f"imag_reward names '{name}', which cannot be loaded"):
        load_function(name, key="imag_reward")


# Targets and advantages


def square_batch(count: int = 1) -> dict[str, Tensor]:
    return episodes(count, COORDS)


def worth_of(
    scene: Scene, trajectory: Trajectory, start: Start, reward: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Targets and advantages if a trajectory's actions earned `reward`; metrics."""
    scene.imagination.reward = lambda *_: reward  # type: ignore[method-assign]
    worth, metrics = scene.behavior.worth(trajectory, start, scene.imagination.node_set(start.context), RANGE)
    return worth.targets, worth.advantage, metrics


def targets(scene: Scene, reward: Tensor, **choices: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    start, trajectory = scene.imagine_from(square_batch(reward.shape[0]), horizon=reward.shape[-1], **choices)
    return worth_of(scene, trajectory, start, reward)


def test_advantage_over_the_critic_by_hand():
    scene = Scene(**CRITIC)
    returns, value = torch.tensor([[[3.0, 5.0]]]), torch.tensor([[[1.0, 7.0, 9.0]]])
    assert scene.behavior.returns.advantage(returns, value).tolist() == [[[2.0, -2.0]]]


def test_leave_one_out_advantage_by_hand():
    scene = Scene(imag_tours=3, target_clip="none", actor__advantage_scale="none")
    reward = torch.zeros(1, 3, NODES)
    reward[0, :, 0], reward[0, :, -1] = torch.tensor([1.0, 0.0, 4.0]), torch.tensor([0.0, 2.0, 2.0])
    returns, advantage, metrics = targets(scene, reward)
    assert returns[0, :, 0].tolist() == [1.0, 2.0, 6.0]
    assert returns[0, :, -1].tolist() == [0.0, 2.0, 2.0]
    # The others' means are 4, 3.5 and 1.5; every decision of a tour shares its advantage.
    assert advantage[0].tolist() == [[-3.0] * NODES, [-1.5] * NODES, [4.5] * NODES]
    assert metrics["imag_return"] == 3.0


def test_leave_one_out_compares_tours_from_the_same_row_only():
    scene = Scene(
        imag_tours=2,
        imag_start="replay",
        imag_first="stored",
        target_clip="none",
        actor__advantage_scale="none",
    )
    reward = torch.zeros(1, 2 * (NODES + 1), NODES)
    reward[0, :, 0] = torch.arange(2.0 * (NODES + 1)).square()
    _, advantage, _ = targets(scene, reward)
    # Rows 2k and 2k + 1 are a pair: (2k + 1)^2 - (2k)^2 = 4k + 1.
    assert advantage[0, ::2, 0].tolist() == [-(4.0 * k + 1) for k in range(NODES + 1)]
    assert advantage[0, 1::2, 0].tolist() == [4.0 * k + 1 for k in range(NODES + 1)]


def test_statistics_are_of_what_counts():
    values = torch.tensor([[2.0, 4.0, 100.0], [5.0, -50.0, 7.0]])
    weight = torch.tensor([[1.0, 0.5, 0.0], [0.5, 0.0, 0.0]])
    metrics = {name: value.item() for name, value in statistics("value", values, weight).items()}
    # (2 + 4 / 2 + 5 / 2) / 2, and 1.25^2, 0.75^2 / 2 and 1.75^2 / 2 about it.
    assert metrics == pytest.approx(
        {"value_min": 2.0, "value_max": 5.0, "value_mean": 3.25, "value_std": math.sqrt(3.375 / 2)}
    )


def test_values_outside_the_possible_range_count_as_much_as_they_are_likely():
    value, survival = torch.tensor([[[-5.0, 0.0, 5.0]]]), torch.tensor([[[1.0, 0.5, 0.25]]])
    possible = Bounds(torch.full((1, 1, 3), -1.0), torch.full((1, 1, 3), 1.0))
    assert values_outside(value, possible, survival)["value_outside_rate"] == pytest.approx(1.25 / 1.75)
    assert values_outside(value, None, survival) == {}


def test_imagined_return_is_of_the_starts_that_count():
    """Rows beyond an episode's end are no starts: those that are there have earned what is left of their tours."""
    scene = Scene(imag_tours=1, baseline="critic", imag_start="replay", imag_first="stored", target_clip="none")
    returns, _, metrics = targets(scene, torch.ones(1, NODES + 1, NODES))
    assert metrics["imag_return"] == pytest.approx(sum(range(1, NODES + 1)) / NODES)
    assert metrics["target_max"] == returns[0, :NODES].max()


def test_advantage_is_divided_by_the_scale_and_its_floor():
    reward = torch.zeros(1, 2, NODES)
    reward[0, :, 0] = torch.tensor([0.0, 8.0])
    choices: dict[str, Any] = {"imag_tours": 2, "target_clip": "none", "actor__advantage_floor": 4.0}
    _, advantage, metrics = targets(Scene(**choices), reward)
    # The running range has taken one hundredth of 8 so far: the floor counts.
    assert metrics["advantage_scale"] == 4.0
    assert advantage[0, :, 0].tolist() == [-2.0, 2.0]


def test_lambda_targets_by_hand():
    scene = Scene(
        imag_horizon="2", imag_tours=1, baseline="critic", discount=0.5, return_lambda=0.8, target_clip="none"
    )
    value = constant_critic(scene)
    assert value > 1
    returns, advantage, metrics = targets(scene, torch.tensor([[[3.0, 5.0]]]))
    last = 5.0 + 0.5 * value
    first = 3.0 + 0.5 * (0.2 * value + 0.8 * last)
    torch.testing.assert_close(returns, torch.tensor([[[first, last]]]))
    # The percentile range of so few returns is below its floor of 1.
    torch.testing.assert_close(advantage, torch.tensor([[[first - value, last - value]]]))
    assert metrics["value_min"] == metrics["value_max"] == pytest.approx(value)
    assert metrics["target_min"] == pytest.approx(min(first, last))


def test_lambda_targets_bootstrap_nothing_beyond_the_episodes_end():
    scene = Scene(imag_tours=1, baseline="critic", imag_first="stored", return_lambda=0.0, target_clip="none")
    value = constant_critic(scene)
    returns, _, _ = targets(scene, torch.full((1, 1, NODES), -1.0))
    torch.testing.assert_close(returns[0, 0], torch.tensor([value - 1] * (NODES - 1) + [-1.0]))


def test_discount_is_part_of_cont_and_applied_once():
    """`cont` is 0.9 everywhere, as the head learns it under some discount; no other factor may show."""
    scene = Scene(SCRIPTED, imag_horizon="3", discount=0.5, return_lambda=1.0)
    value, head = constant_critic(scene), scene.model.heads["cont"]
    assert isinstance(head, MLP)
    nn.init.zeros_(head.output.weight)
    nn.init.constant_(head.output.bias, math.log(9))
    batch = random_rows(SCRIPTED)
    _, trajectory = scene.imagine_from(batch, horizon=3)
    # The head is asked at the first step, too.
    torch.testing.assert_close(trajectory.survival, torch.tensor([0.9, 0.81, 0.729]).expand_as(trajectory.survival))
    # Nothing is earned on the way: three targets, and the errors of a critic that answers `value`.
    targets = [0.729 * value, 0.81 * value, 0.9 * value]
    squares = [(value - target) ** 2 for target in targets]
    expected = math.sqrt((squares[0] + 0.9 * squares[1] + 0.81 * squares[2]) / (1 + 0.9 + 0.81))
    _, metrics = scene.losses(batch)
    assert metrics["target_min"] == pytest.approx(targets[0], rel=1e-5)
    assert metrics["target_max"] == pytest.approx(targets[2], rel=1e-5)
    assert metrics["critic_error"] == pytest.approx(expected, rel=1e-5)


def test_discount_of_routing_weighs_targets_and_steps():
    critic: dict[str, Any] = {"baseline": "critic", "return_lambda": 1.0, "target_clip": "none"}
    scene = Scene(imag_tours=1, imag_horizon="2", discount=0.5, **critic)
    value = constant_critic(scene)
    _, metrics = scene.losses(episodes(4))
    squares = [(value - 0.25 * value) ** 2, (value - 0.5 * value) ** 2]
    expected = math.sqrt((squares[0] + 0.5 * squares[1]) / 1.5)
    assert metrics["critic_error"] == pytest.approx(expected, rel=1e-5)


def replayed(**changes: Any) -> dict[str, Tensor]:
    """An episode cut after row 2, one that terminates with row 5, and the first row of a third."""
    rows = torch.arange(7)
    batch = {
        "reward": torch.tensor([[0.0, 1.0, 2.0, 0.0, 4.0, 5.0, 0.0]]),
        "is_first": ((rows == 0) | (rows == 3) | (rows == 6))[None],
        "is_last": ((rows == 2) | (rows == 5))[None],
        "is_terminal": (rows == 5)[None],
    }
    return batch | changes


BOOTSTRAP = torch.tensor([[10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0]])


def test_replayed_returns_by_hand():
    returns = replayed_returns(replayed(), BOOTSTRAP, discount=0.5, lambda_=0.8)[0].tolist()
    # The terminal row bootstraps nothing, and the row before it mixes the bootstrap with that return.
    assert returns[4] == 5.0
    assert returns[3] == pytest.approx(4 + 0.5 * (0.2 * 50 + 0.8 * 5.0))
    # The row that a time limit cut bootstraps with all that is to be expected from it.
    assert returns[1] == pytest.approx(2 + 0.5 * 30)
    assert returns[0] == pytest.approx(1 + 0.5 * (0.2 * 20 + 0.8 * returns[1]))


def test_replayed_returns_take_nothing_from_the_next_episode():
    batch, other = replayed(), replayed()
    other["reward"] = batch["reward"].clone()
    other["reward"][0, [3, 6]] = torch.tensor([1e3, -1e3])
    bootstrap = BOOTSTRAP.clone()
    bootstrap[0, [3, 6]] = 1e4
    returns = replayed_returns(batch, BOOTSTRAP, discount=0.5, lambda_=0.8)
    others = replayed_returns(other, bootstrap, discount=0.5, lambda_=0.8)
    inner = ~batch["is_last"][:, :-1]
    assert torch.equal(returns[inner], others[inner])
    assert not torch.equal(returns, others)


# Clipping


def bounds(scene: Scene, rewards: tuple[float, float] = (-0.9, -0.1)) -> Any:
    start, trajectory = scene.imagine_from(square_batch())
    return scene.bounds(trajectory, start, Bounds(*map(torch.tensor, rewards)))


# Before each of a tour's decisions, this many legs are left.
LEGS = torch.arange(NODES, 0, -1).float()


def test_simulated_bounds_are_the_legs_that_remain_times_the_longest():
    low, high = bounds(Scene(imag_reward="simulated"))
    torch.testing.assert_close(low, (-DIAGONAL * LEGS).expand_as(low))
    assert (high == 0).all()


def test_learned_bounds_follow_the_rewards_in_replay():
    low, high = bounds(Scene())
    torch.testing.assert_close(low, (-1.5 * 0.9 * LEGS).expand_as(low))
    assert (high == 0).all()


def test_learned_bounds_lie_above_0_once_a_positive_reward_was_seen():
    low, high = bounds(Scene(), (0.1, 0.2))
    assert (low == 0).all()
    torch.testing.assert_close(high, (1.5 * 0.2 * LEGS).expand_as(high))


@pytest.mark.parametrize(("reward", "leg"), [("simulated", DIAGONAL), ("head", 1.5 * 0.9)])
def test_penalty_widens_the_bounds_by_its_largest_sum(reward: str, leg: float):
    low, high = bounds(Scene(imag_reward=reward, imag_penalty=2.0))
    torch.testing.assert_close(low, (-leg * LEGS - 2.0 * NODES).expand_as(low))
    assert (high == 0).all()


def test_constant_range_and_none_are_taken_as_given():
    low, high = bounds(Scene(target_clip="[-20, 0.5]"))
    assert (float(low), float(high)) == (-20.0, 0.5)
    assert bounds(Scene(target_clip="none")) is None


def test_targets_are_clipped_and_the_clipped_share_is_logged():
    scene = Scene(imag_tours=2, target_clip="[-5, 0]")
    reward = torch.zeros(1, 2, NODES)
    reward[0, 0] = -1.0
    returns, _, metrics = targets(scene, reward)
    # Only the first of twelve returns, -6, lies outside.
    assert returns[0, 0].tolist() == [-5.0, -5.0, -4.0, -3.0, -2.0, -1.0]
    assert metrics["target_clip_rate"] == pytest.approx(1 / 12)
    assert metrics["target_min"] == -5.0


def test_no_true_return_is_clipped():
    scene, batch = Scene(imag_reward="simulated"), square_batch(4)
    start, trajectory = scene.imagine_from(batch)
    reward = scene.imagination.reward(trajectory, start)
    assert worth_of(scene, trajectory, start, reward)[2]["target_clip_rate"] == 0
