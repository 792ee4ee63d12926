"""Imagined roll-outs: legality and masks, where they start, what they keep, and which choices go together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from envs.examples import SwitchesRules, SwitchesState
from envs.routing import TSPEnv, TSPInstance, TSPRules, TSPState
from envs.tasks import ActionSpec, ObservationTask, wrong_share
from envs.vector import RoutingVectorEnv
from imagining.imagination import Trajectory
from imagining.routing_imagination import RoutingImagination
from parts import actors
from parts.layers import MLP
from parts.views import View
from routing.rules import expand_instance
from settings.imagination import ImaginationSettings
from tests.scenes import (
    CPU,
    CRITIC,
    NODES,
    SCRIPTED,
    SWITCHES,
    SWITCHING,
    Scene,
    episodes,
    instance_of,
    pointer_of,
    random_rows,
    state_of,
    switches_episodes,
    tours_of,
    vector,
    with_head,
)
from tools import OneHotDist

# Legality


@pytest.mark.parametrize("start", ["episodes", "replay"])
@pytest.mark.parametrize(
    "actor",
    [{"actor__type": "masked"}, {"actor__pointer__latent": 0}, {"actor__unimix": 0.3}],
    ids=["masked", "pointer", "pointer with unimix 0.3"],
)
def test_imagination_never_takes_an_illegal_action(start: str, actor: dict[str, Any]):
    scene = Scene(imag_tours=8, imag_start=start, imag_first="stored", **actor)
    _, trajectory = scene.imagine_from(episodes(64))
    legal = TSPRules.action_mask(TSPState(*(part[:, :, :-1] for part in state_of(trajectory))))
    assert trajectory.action.numel() >= 3000
    assert legal.gather(-1, trajectory.action[..., None]).all()


@pytest.mark.parametrize("choices", [{}, CRITIC, {"imag_reward": "simulated"}, {"imag_gradient": "dynamics"}])
def test_miss_rate_is_exactly_0_under_the_rules(choices: dict[str, Any]):
    metrics = Scene(**choices).update(episodes(16))
    assert metrics["miss_rate"] == 0
    assert metrics["imag_mask_step_0"] == 1


@pytest.mark.parametrize("first", ["any", "stored"])
def test_imagined_tours_are_permutations_that_close(first: str):
    _, trajectory = Scene(imag_tours=NODES, imag_first=first).imagine_from(episodes(32))
    tours = tours_of(trajectory)
    assert (tours.sort(-1).values == torch.arange(NODES)).all()
    assert torch.equal(trajectory.action[:, :, -1], state_of(trajectory).first[:, :, 0])
    assert torch.equal(trajectory.cont, torch.tensor([1.0] * (NODES - 1) + [0.0]).expand_as(trajectory.cont))


def test_predicted_mask_at_initialisation_takes_illegal_actions():
    scene = Scene(imag_mask="predicted")
    metrics = scene.update(episodes(32))
    assert metrics["miss_rate"] > 0.05
    assert {f"imag_mask_step_{step}" for step in range(NODES)} <= metrics.keys()


def test_leaking_unimix_takes_illegal_actions(monkeypatch: pytest.MonkeyPatch):
    class LeakingDist(OneHotDist):
        """Spreads the uniform share over all actions, after the mask."""

        def __init__(self, logits: Tensor, *, mask: Tensor | None = None, unimix: float = 0.0) -> None:
            super().__init__(((1 - unimix) * OneHotDist(logits, mask=mask).probs + unimix / logits.shape[-1]).log())

    scene, batch = Scene(actor__unimix=0.1), episodes(32)
    assert scene.update(batch)["miss_rate"] == 0
    monkeypatch.setattr(actors, "OneHotDist", LeakingDist)
    assert scene.update(batch)["miss_rate"] > 0.005


def test_imag_mask_step_0_is_the_agreement_with_the_rules():
    scene, batch = Scene(imag_mask="predicted"), episodes(16)
    start = scene.start(batch)
    assert start.latent is not None and start.context is not None
    predicted = scene.model.predict_mask(start.latent.feat(), start.context)
    true = torch.ones(16, 4, NODES, dtype=torch.bool)
    # Tours of one instance begin at nodes 0, 1, 3 and 4, which alone are closed.
    true[:, range(4), [0, 1, 3, 4]] = False
    metrics = scene.update(batch)
    torch.testing.assert_close(metrics["imag_mask_step_0"], (predicted == true).float().mean())
    assert 0 < metrics["imag_mask_step_0"] < 1
    assert metrics["imag_legal_step_0"] == NODES - 1


def test_true_state_is_stepped_alongside_a_predicted_mask():
    _, trajectory = Scene(imag_mask="predicted").imagine_from(episodes(8))
    assert trajectory.moments.view.action_mask is not None and trajectory.moments.true_mask is not None
    assert not torch.equal(trajectory.moments.view.action_mask, trajectory.moments.true_mask)
    assert torch.equal(trajectory.moments.true_mask, TSPRules.action_mask(state_of(trajectory)))
    assert trajectory.moments.view.action_mask[:, :, :-1].gather(-1, trajectory.action[..., None]).all()


def test_mask_rules_give_the_exact_mask():
    scene, batch = Scene(SWITCHING), switches_episodes(16)
    assert scene.imagination.mask_from == "rules"
    start, trajectory = scene.imagine_from(batch, horizon=SWITCHES)
    assert isinstance(start.state.rules_state, SwitchesState)
    assert trajectory.moments.view.action_mask is not None and trajectory.moments.true_mask is not None
    assert torch.equal(trajectory.moments.view.action_mask, trajectory.moments.true_mask)
    fresh = trajectory.action[:, :4]
    # From the first row of an episode, four moves press every switch once.
    assert (fresh.sort(-1).values == torch.arange(SWITCHES)).all()
    metrics = scene.update(batch)
    assert metrics["miss_rate"] == 0
    assert metrics["imag_mask_step_0"] == 1


def test_predicted_mask_is_held_against_mask_rules():
    scene, batch = Scene(SWITCHING, imag_mask="predicted"), switches_episodes(16)
    assert scene.imagination.mask_from == "predicted"
    _, trajectory = scene.imagine_from(batch, horizon=SWITCHES)
    assert trajectory.moments.view.action_mask is not None and trajectory.moments.true_mask is not None
    assert not torch.equal(trajectory.moments.view.action_mask, trajectory.moments.true_mask)
    assert scene.update(batch)["miss_rate"] > 0.05


class NothingChanges(SwitchesRules):
    """Every switch can be pressed at any time."""

    def action_mask(self, state: SwitchesState) -> Tensor:
        return torch.ones_like(state.pressed)


class Forgetful(SwitchesRules):
    """The mask is right, and what a press does to it is not."""

    def step(self, state: SwitchesState, action: Tensor) -> SwitchesState:
        return state


def test_mask_rules_are_held_against_what_happened():
    batch = switches_episodes(16)
    assert wrong_share(SwitchesRules(), batch) == 0
    # In four rows of an episode a switch is pressed; all of them but the first have a closed switch.
    assert wrong_share(NothingChanges(), batch) == 0.75
    assert wrong_share(Forgetful(), batch) == 0.75


def test_action_mask_is_seen_by_the_world_model():
    scene, batch = Scene(SWITCHING), switches_episodes(2)
    changed = {**batch, "action_mask": ~batch["action_mask"]}
    assert not torch.allclose(*(scene.model.encode(each, None, View(None)) for each in (batch, changed)))


def test_mask_without_rules_is_predicted_and_keeps_its_best_action_open():
    scene, batch = Scene(replace(SWITCHING, mask_rules=None)), switches_episodes(8)
    assert scene.imagination.mask_from == "predicted"
    assert "miss_rate" not in scene.update(batch)
    head = scene.model.heads["mask"]
    assert isinstance(head, MLP)
    nn.init.constant_(head.output.bias, -100.0)
    start, trajectory = scene.imagine_from(batch, horizon=3)
    assert start.state.rules_state is None and trajectory.moments.true_mask is None
    assert trajectory.moments.view.action_mask is not None and trajectory.moments.feat is not None
    best = head(trajectory.moments.feat).argmax(-1, keepdim=True)
    predicted = torch.zeros_like(trajectory.moments.view.action_mask).scatter(-1, best, True)
    assert torch.equal(trajectory.moments.view.action_mask[:, :, 1:], predicted[:, :, 1:])
    assert torch.equal(trajectory.action[:, :, 1:], best[:, :, 1:-1, 0])
    # Where imagination starts the mask was seen.
    tours = start.weight.shape[1] // (SWITCHES + 1)
    assert torch.equal(trajectory.moments.view.action_mask[:, :, 0], batch["action_mask"].repeat_interleave(tours, 1))


def test_task_without_masks_needs_no_mask_head():
    scene = Scene(SCRIPTED, imag_mask="rules")
    assert scene.imagination.mask_from == "rules" and "mask" not in scene.model.heads
    _, trajectory = scene.imagine_from(random_rows(SCRIPTED), horizon=2)
    assert trajectory.moments.view.at(slice(None)) == View(None)


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize(
    "actions",
    [ActionSpec("continuous", (2,)), ActionSpec("multi_discrete", (3, 2))],
    ids=["continuous", "multi_discrete"],
)
def test_imagination_takes_actions_of_every_kind(actions: ActionSpec, differentiable: bool):
    task = ObservationTask(actions=actions, observations={"position": vector(2)})
    start, trajectory = Scene(task).imagine_from(random_rows(task), horizon=3, differentiable=differentiable)
    assert trajectory.action.shape == (*start.weight.shape, 3, 2)
    assert trajectory.action.dtype == actions.dtype
    assert len(trajectory.action.unique()) >= (100 if actions.kind == "continuous" else 3)
    if actions.kind == "multi_discrete":
        assert trajectory.action.amax((0, 1, 2)).tolist() == [2, 1]


# Against the environments


def test_imagined_states_equal_those_of_the_vector_environment():
    scene, batch = Scene(imag_reward="simulated", imag_first="stored"), episodes(16)
    start, trajectory = scene.imagine_from(batch)
    reward = scene.imagination.reward(trajectory, start)
    state, rows = state_of(trajectory), trajectory.action.shape[0] * trajectory.action.shape[1]
    coords = instance_of(start).coords.repeat_interleave(trajectory.action.shape[1], 0)
    env = RoutingVectorEnv(TSPRules, num_envs=rows, num_nodes=NODES, device=CPU, instances=coords, check_actions=True)
    obs, _ = env.reset()
    for step in range(NODES + 1):
        assert torch.equal(obs["current_node"], state.current[:, :, step].flatten())
        assert torch.equal(obs["visited"], state.visited[:, :, step].flatten(0, 1))
        assert trajectory.moments.view.action_mask is not None
        assert torch.equal(obs["action_mask"], trajectory.moments.view.action_mask[:, :, step].flatten(0, 1))
        if step < NODES:
            obs, earned, terminated, _, _ = env.step(trajectory.action[:, :, step].flatten())
            torch.testing.assert_close(earned, reward[:, :, step].flatten())
            assert torch.equal(terminated, trajectory.cont[:, :, step].flatten() == 0)


def test_imagined_states_equal_those_of_the_gymnasium_environment():
    scene = Scene(imag_reward="simulated", imag_first="stored")
    start, trajectory = scene.imagine_from(episodes(1))
    reward, state = scene.imagination.reward(trajectory, start), state_of(trajectory)
    for tour in range(trajectory.action.shape[1]):
        env = TSPEnv(num_nodes=NODES)
        obs, _ = env.reset(options={"coords": instance_of(start).coords[0].numpy()})
        for step, action in enumerate(trajectory.action[0, tour].tolist()):
            assert obs["current_node"] == state.current[0, tour, step]
            assert obs["visited"].tolist() == state.visited[0, tour, step].tolist()
            obs, earned, terminated, _, _ = env.step(action)
            assert earned == pytest.approx(float(reward[0, tour, step]), abs=1e-6)
        assert terminated


# Trajectories


def test_alive_ends_with_the_episode_and_reward_with_it():
    scene = with_head(Scene(**CRITIC, imag_tours=1), constant=-1.0)
    start, trajectory = scene.imagine_from(episodes(4))
    # From row t of an episode there are N - t decisions to take.
    expected = torch.tensor([[1.0] * (NODES - row) + [0.0] * row for row in range(NODES + 1)])
    assert torch.equal(trajectory.survival, expected.expand(4, -1, -1))
    reward = scene.imagination.reward(trajectory, start)
    assert (reward[trajectory.survival == 0] == 0).all()
    assert (reward[trajectory.survival == 1] == -1).all()


def test_expanded_instance_is_a_view():
    instance = TSPInstance(torch.rand(3, NODES, 2))
    expanded = expand_instance(instance, torch.Size((3, 4, 5))).coords
    assert expanded.shape == (3, 4, 5, NODES, 2)
    assert (expanded == instance.coords[:, None, None]).all()
    assert expanded.data_ptr() == instance.coords.data_ptr()


def equal(one: Trajectory, other: Trajectory) -> bool:
    feats = [each.moments.feat for each in (one, other) if isinstance(each.moments.feat, Tensor)]
    return torch.equal(one.action, other.action) and (len(feats) < 2 or torch.equal(*feats))


def test_same_noise_gives_the_same_trajectory():
    scene = Scene()
    start = scene.start(episodes(16))
    assert equal(scene.imagine(start, seed=1), scene.imagine(start, seed=1))
    assert not equal(scene.imagine(start, seed=1), scene.imagine(start, seed=2))


def test_same_generator_gives_the_same_update():
    one, other, batch = Scene(), Scene(), episodes(8)
    metrics, again = one.update(batch, seed=3), other.update(batch, seed=3)
    assert all(torch.equal(metrics[name], again[name]) for name in metrics)
    for mine, theirs in zip(one.behavior.parameters(), other.behavior.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_greedy_imagination_draws_nothing_and_takes_the_likeliest_tour():
    scene = Scene()
    instance = TSPInstance(torch.rand(8, NODES, 2))
    before = torch.get_rng_state()
    assert isinstance(scene.imagination, RoutingImagination)
    actor = scene.behavior.actor
    tours, reward, trajectory = scene.imagination.imagine_greedily(actor, instance, needs_latent=True)
    again = scene.imagination.imagine_greedily(actor, instance, needs_latent=True).trajectory
    assert equal(trajectory, again)
    assert torch.equal(torch.get_rng_state(), before)
    assert (tours.sort(-1).values == torch.arange(NODES)).all()
    assert reward.shape == (8, NODES)
    tables = pointer_of(scene).encode(TSPRules.node_features(instance))
    dist = actor(trajectory.feat(slice(0, -1)), tables, trajectory.moments.view.at(slice(0, -1)))
    assert torch.equal(dist.mode(), trajectory.action)


def test_differentiable_imagination_equals_the_plain_one():
    scene = with_head(Scene(imag_gradient="dynamics"), times_length=-1.0)
    start = scene.start(episodes(8))
    plain, graph = scene.imagine(start), scene.imagine(start, differentiable=True)
    assert torch.equal(plain.action, graph.action)
    assert plain.moments.feat is not None and graph.moments.feat is not None
    torch.testing.assert_close(plain.moments.feat, graph.moments.feat)
    # A move costs its length by the head, which begins where the move before it ended.
    torch.testing.assert_close(scene.imagination.reward(graph, start), scene.imagination.reward(plain, start))
    assert scene.imagination.reward(plain, start).abs().min() > 0
    assert plain.decisions.log_prob is None and plain.decisions.choice is None


def test_plain_imagination_keeps_no_graph():
    _, trajectory = Scene().imagine_from(episodes(4))
    assert isinstance(trajectory.moments.feat, Tensor)
    assert not trajectory.moments.feat.requires_grad and not trajectory.survival.requires_grad


# Choices


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"mask": "decoded"}, "imag_mask is 'decoded'; choose one of rules, predicted"),
    ({"start": "middle"}, "imag_start is 'middle'"),
    ({"first": "last"}, "imag_first is 'last'"),
    ({"baseline": "mean"}, "baseline is 'mean'; choose one of critic, leave_one_out"),
    ({"gradient": "pathwise"}, "imag_gradient is 'pathwise'"),
    ({"reward": "true"}, "imag_reward is 'true'; choose head, simulated or your own module:function"),
    ({"horizon": 0}, "imag_horizon is 0"),
    ({"horizon": "long"}, "imag_horizon is 'long'"),
    ({"tours": 0}, "imag_tours is 0"),
    ({"discount": 0.0}, "discount is 0; it must be above 0 and at most 1"),
    ({"discount": 1.1}, "discount is 1.1"),
    ({"lambda_": -0.1}, "return_lambda is -0.1; it must be between 0 and 1"),
    ({"tours": 1}, "baseline leave_one_out .* imag_tours of 2 or more, got episode and 1"),
    ({"horizon": 10}, "baseline leave_one_out .* imag_horizon: episode .* got 10 and 16"),
    ({"gradient": "dynamics", "reward": "simulated"}, "imag_gradient dynamics .* imag_reward: head"),
    ({"gradient": "both", "reward": "module:function"}, "imag_gradient both .* imag_reward: head"),
    ({"start": "replay"}, "imag_first: any .* needs imag_start: episodes"),
    ({"augment": True}, "imag_augment .* imag_reward: simulated"),
    ({"target_clip": "wide"}, "target_clip is 'wide'"),
    ({"target_clip": (0.0, -20.0)}, "target_clip is .*lower and an upper bound"),
    ({"target_clip": (-20.0,)}, "target_clip is .*lower and an upper bound"),
]


@pytest.mark.parametrize(("choices", "message"), REFUSED, ids=[str(choices) for choices, _ in REFUSED])
def test_imagination_refuses_what_does_not_go_together(choices: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ImaginationSettings(**choices)


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"start": "replay", "first": "stored"},
        {"baseline": "critic", "horizon": 10, "tours": 1},
        {"gradient": "both"},
        {"reward": "simulated", "augment": True},
        {"target_clip": (-20.0, 0.0)},
    ],
    ids=str,
)
def test_imagination_accepts_what_goes_together(choices: dict[str, Any]):
    accepted = ImaginationSettings(**choices)
    assert all(getattr(accepted, name) == value for name, value in choices.items())
