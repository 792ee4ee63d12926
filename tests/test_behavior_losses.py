"""The losses of actor and critic, their gradients, and what an update with them changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dreamer import Dreamer
from envs.routing import TSPRules
from envs.tasks import ActionSpec, ObservationTask
from guard import Guard
from imagining.behavior import ImagBehavior
from imagining.imagination import imagine
from networks import Latent
from parts.views import View
from routing.rules import each_part
from tests.scenes import (
    CPU,
    CRITIC,
    NODES,
    SCRIPTED,
    SWITCHING,
    Scene,
    costly_legs,
    debug_config,
    episodes,
    generator,
    instance_of,
    lengths,
    pointer_of,
    random_rows,
    scripted_replay,
    switches_episodes,
    tours_of,
    vector,
    without_zero_outputs,
)
from training.devices import make_generators
from updates.learner import Computed

# Actor


PLAIN: dict[str, Any] = {
    "actor__grad_clip": 1e9,
    "actor__entropy": 0.0,
    "actor__entropy_final": 0.0,
    "target_clip": "none",
}


def actor_gradient(scene: Scene, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the actor's optimiser was given in one update."""
    scene.update(batch)
    return {
        name: parameter.grad.clone()
        for name, parameter in scene.behavior.actor.named_parameters()
        if parameter.grad is not None
    }


def test_reinforce_gradient_equals_the_one_written_out_by_hand():
    scene, batch = Scene(imag_reward="simulated", imag_tours=3, actor__unimix=0.0, **PLAIN), episodes(4)
    draws = generator()
    start = scene.start_by(batch, draws)
    noise = scene.behavior._noise(start, draws)
    tables = pointer_of(scene).encode(TSPRules.node_features(instance_of(start)))
    trajectory = imagine(
        scene.imagination,
        scene.behavior.actor,
        start=start,
        tables=each_part(tables, Tensor.detach),
        noise=noise,
        horizon=NODES,
    )
    returns = -lengths(instance_of(start).coords, tours_of(trajectory))
    dist = scene.behavior.actor(
        trajectory.feat(slice(0, -1)),
        tables,
        trajectory.moments.view.at(slice(0, -1)),
    )
    objective = torch.zeros(())
    for row in range(4):
        for tour in range(3):
            others = [float(returns[row, other]) for other in range(3) if other != tour]
            advantage = float(returns[row, tour]) - sum(others) / 2
            for step, action in enumerate(trajectory.action[row, tour].tolist()):
                objective = objective + advantage * dist.probs[row, tour, step, action].log()
    loss = -objective / (4 * 3 * NODES)
    parameters = dict(scene.behavior.actor.named_parameters())
    expected = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    actual = actor_gradient(scene, batch)
    assert max(gradient.abs().max() for gradient in actual.values()) > 1e-3
    for name, gradient in zip(parameters, expected, strict=True):
        if gradient is not None:
            torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-6)


def test_dynamics_gradient_reaches_the_actor_through_the_moves():
    gradient = actor_gradient(costly_legs(Scene(imag_gradient="dynamics", **PLAIN)), episodes(8))
    assert gradient.keys() == dict(Scene().behavior.actor.named_parameters()).keys()
    assert all(part.isfinite().all() for part in gradient.values())
    assert gradient["pointer.weight"].abs().max() > 1e-6


def test_dynamics_gradient_of_a_move_is_that_of_the_expected_position():
    scene = costly_legs(Scene(imag_gradient="dynamics", baseline="critic", imag_tours=1, imag_horizon="1", **PLAIN))
    start, trajectory = scene.imagine_from(episodes(8), horizon=1, differentiable=True)
    assert trajectory.decisions.choice is not None
    choice = trajectory.decisions.choice
    reward = scene.imagination.reward(trajectory, start).sum()
    parameters = list(scene.behavior.actor.parameters())
    actual = torch.autograd.grad(reward, parameters, allow_unused=True, retain_graph=True)
    (slope,) = torch.autograd.grad(reward, choice)
    tables = pointer_of(scene).encode(TSPRules.node_features(instance_of(start)))
    view = trajectory.moments.view.at(slice(0, 1))
    probs = scene.behavior.actor(trajectory.feat(slice(0, 1)), tables, view).probs
    expected = torch.autograd.grad((probs * slope).sum(), parameters, allow_unused=True)
    assert max(gradient.abs().max() for gradient in expected if gradient is not None) > 1e-4
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


def test_score_of_an_action_is_not_differentiated_through_the_latents_before_it():
    """Without any share of `dynamics`, `both` is `reinforce`: states are given, however they came about."""
    batch, gradients = episodes(8), []
    alternatives: list[dict[str, Any]] = [
        {"imag_gradient": "reinforce"},
        {"imag_gradient": "both", "imag_gradient_mix": 0.0},
    ]
    for choices in alternatives:
        scene = costly_legs(Scene(**choices, **PLAIN))
        with torch.no_grad():
            # Let the latent matter to the actor.
            pointer_of(scene).query_latent.weight.mul_(10.0)
        gradients.append(actor_gradient(scene, batch))
    reinforce, both = gradients
    for name, expected in reinforce.items():
        assert (both[name] - expected).norm() <= 5e-3 * expected.norm(), name


def test_both_is_the_weighted_sum_of_the_two_gradients():
    batch = episodes(8)
    reinforce, dynamics, both = (
        actor_gradient(costly_legs(Scene(imag_gradient=name, imag_gradient_mix=0.25, **PLAIN)), batch)
        for name in ("reinforce", "dynamics", "both")
    )
    for name in both:
        expected = 0.75 * reinforce[name] + 0.25 * dynamics[name]
        torch.testing.assert_close(both[name], expected, rtol=1e-3, atol=1e-6)


def test_entropy_bonus_follows_its_schedule():
    batch = episodes(8)
    at = {}
    for coefficient in (0.0, 2.0, 4.0):
        scene = Scene(actor__grad_clip=1e9, actor__entropy=coefficient, actor__entropy_final=coefficient)
        at[coefficient] = actor_gradient(scene, batch)
    halfway = Scene(actor__grad_clip=1e9, actor__entropy=0.0, actor__entropy_final=4.0)
    halfway.update(batch, progress=0.5)
    for name, parameter in halfway.behavior.actor.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, at[2.0][name], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(
            at[4.0][name] - at[0.0][name], 2 * (at[2.0][name] - at[0.0][name]), rtol=1e-3, atol=1e-5
        )


# Actor and critic


@pytest.mark.parametrize(
    "choices",
    [{}, CRITIC, {"imag_gradient": "dynamics"}, {"imag_gradient": "both"}, {"imag_mask": "predicted"}],
    ids=["default", "critic", "dynamics", "both", "predicted"],
)
def test_update_changes_actor_and_critic_and_leaves_the_model_alone(choices: dict[str, Any]):
    scene = Scene(**choices)
    costly_legs(scene)
    model, actor, critic = (
        [p.detach().clone() for p in part.parameters()]
        for part in (scene.model, scene.behavior.actor, scene.behavior.critic)
    )
    metrics = scene.update(episodes(8))
    assert all(metric.ndim == 0 and not metric.requires_grad for metric in metrics.values())
    assert scene.guard.findings() == []
    assert all(torch.equal(a, b) for a, b in zip(model, scene.model.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(actor, scene.behavior.actor.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(critic, scene.behavior.critic.parameters(), strict=True))


def test_slow_critic_follows_at_its_rate():
    scene = Scene(critic__slow_rate=0.25, **CRITIC)
    before = [p.detach().clone() for p in scene.behavior.slow_critic.parameters()]
    scene.update(episodes(8))
    triples = zip(before, scene.behavior.critic.parameters(), scene.behavior.slow_critic.parameters(), strict=True)
    for old, fast, slow in triples:
        torch.testing.assert_close(slow, 0.75 * old + 0.25 * fast)


def test_critic_approaches_the_returns_of_the_tours():
    scene = Scene(imag_reward="simulated", critic__share=1.0, critic__lr=1e-2, schedule__warmup=0)
    batch = episodes(16)
    errors = [float(scene.update(batch, seed)["critic_error"]) for seed in range(40)]
    assert sum(errors[-5:]) / 5 < errors[0] / 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"imag_mask": "predicted", "model__loss_scales__mask": 0.0}, "a predicted mask needs the mask head"),
        ({"model__loss_scales__reward": 0.0}, "imag_reward: head needs the reward head"),
        ({"target_clip": "[-20; 0]"}, "target_clip is .*two numbers"),
    ],
)
def test_behaviour_refuses_choices_that_the_model_cannot_serve(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Scene(**changes)


@pytest.mark.parametrize("changes", [{"imag_horizon": "episode"}, {"imag_reward": "simulated"}])
def test_behaviour_refuses_routing_choices_in_a_task_without_rules(changes: dict[str, Any]):
    with pytest.raises(ValueError, match="a task without rules needs imag_horizon as a number of steps"):
        Scene(SCRIPTED, **changes)


KINDS = pytest.mark.parametrize(
    "actions",
    [ActionSpec("discrete", (3,)), ActionSpec("multi_discrete", (3, 2)), ActionSpec("continuous", (2,))],
    ids=["discrete", "multi_discrete", "continuous"],
)


@KINDS
@pytest.mark.parametrize("gradient", ["reinforce", "dynamics", "both"])
def test_behaviour_updates_in_a_task_without_rules(actions: ActionSpec, gradient: str):
    task = ObservationTask(actions=actions, observations={"position": vector(2)})
    scene = Scene(task, imag_gradient=gradient, imag_horizon="4", schedule__warmup=0)
    without_zero_outputs(scene.model)
    before = [parameter.detach().clone() for parameter in scene.behavior.actor.parameters()]
    metrics = scene.update(random_rows(task))
    assert all(metric.isfinite() for metric in metrics.values())
    assert "miss_rate" not in metrics and "target_clip_rate" not in metrics
    assert not any(map(torch.equal, before, scene.behavior.actor.parameters()))


@pytest.mark.parametrize("gradient", ["reinforce", "dynamics"])
def test_behaviour_updates_under_mask_rules(gradient: str):
    scene = Scene(SWITCHING, imag_gradient=gradient, imag_horizon="4")
    without_zero_outputs(scene.model)
    metrics = scene.update(switches_episodes(4))
    assert all(metric.isfinite() for metric in metrics.values())
    assert metrics["miss_rate"] == 0


@KINDS
def test_dynamics_gradient_reaches_the_actor_alone(actions: ActionSpec):
    task = ObservationTask(actions=actions, observations={"position": vector(2)})
    scene = Scene(task, imag_gradient="dynamics", imag_horizon="4", **PLAIN)
    without_zero_outputs(scene.model)
    without_zero_outputs(scene.behavior.critic)
    loss = scene.losses(random_rows(task))[0]["actor"]
    actor, others = (
        torch.autograd.grad(loss, list(parameters), allow_unused=True, retain_graph=True)
        for parameters in (
            scene.behavior.actor.parameters(),
            [*scene.model.parameters(), *scene.behavior.critic.parameters()],
        )
    )
    assert all(gradient is not None and gradient.isfinite().all() and gradient.any() for gradient in actor)
    assert all(gradient is None for gradient in others)
    assert all(p.requires_grad for p in (*scene.model.parameters(), *scene.behavior.critic.parameters()))


# Replayed rewards


def reaches(loss: Tensor, module: torch.nn.Module) -> bool:
    gradients = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, retain_graph=True)
    return any(gradient is not None and bool(gradient.any()) for gradient in gradients)


def test_replay_value_loss_reaches_model_and_critic_and_not_the_actor():
    scene, batch = Scene(SCRIPTED), random_rows(SCRIPTED)
    without_zero_outputs(scene.behavior.critic)
    losses, _ = scene.losses(batch, scene.observe(batch))
    loss, behavior = losses["replay_value"], scene.behavior
    assert scene.model.encoder is not None and scene.model.decoder is not None
    assert reaches(loss, scene.model.encoder) and reaches(loss, scene.model.rssm) and reaches(loss, behavior.critic)
    assert not any(reaches(loss, part) for part in (scene.model.decoder, scene.model.heads, behavior.actor))
    assert not reaches(losses["actor"], behavior.critic) and not reaches(losses["critic"], behavior.actor)
    assert not reaches(losses["actor"], scene.model) and not reaches(losses["critic"], scene.model)


def test_every_loss_of_an_update_is_logged_with_its_own_value(monkeypatch: pytest.MonkeyPatch):
    settings = debug_config("gym", replay_context=False, imag_horizon="3")
    agent = Dreamer.of(SCRIPTED, settings, device=CPU, generators=make_generators(0, CPU), guard=Guard("cpu"))
    whole, seen = agent._losses, []

    def record(*arguments: Any, **keywords: Any) -> Computed:
        seen.append(whole(*arguments, **keywords))
        return seen[-1]

    monkeypatch.setattr(agent, "_losses", record)
    metrics = agent.update(scripted_replay(), progress=0.0)
    names = ("model", "actor", "critic", "replay_value")
    for name, (loss, _) in zip(names, seen[0].losses, strict=True):
        assert metrics[f"{name}_loss"] == loss.detach(), name


def test_replay_value_loss_is_there_where_it_can_teach_the_model():
    batch = random_rows(SCRIPTED)
    plain, without = Scene(SCRIPTED), Scene(SCRIPTED, critic__replay_scale=0.0)
    assert set(plain.losses(batch, plain.observe(batch))[0]) == {"actor", "critic", "replay_value"}
    assert set(plain.losses(batch)[0]) == {"actor", "critic"}
    assert set(without.losses(batch, without.observe(batch))[0]) == {"actor", "critic"}
    with pytest.raises(ValueError, match="critic.replay_scale is 0.3; routing needs it at 0"):
        Scene(critic__replay_scale=0.3, **CRITIC)


def test_replay_value_loss_by_hand():
    scene = Scene(SCRIPTED, discount=0.5, return_lambda=0.0, critic__slow_scale=0.5, imag_tours=2)
    behavior, rssm = scene.behavior, scene.model.rssm
    without_zero_outputs(behavior.critic)
    without_zero_outputs(behavior.slow_critic)
    batch = random_rows(SCRIPTED, count=1, rows=4)
    last = torch.tensor([[False, True, False, False]])
    batch |= {"is_last": last, "is_first": last.roll(1, 1)}
    deter = torch.randn(1, 4, rssm.deter_size, requires_grad=True)
    latents = Latent(deter, torch.randn(1, 4, rssm.stoch_size, rssm.classes))
    observed = scene.observe(batch)._replace(latents=latents)
    # Two trajectories of two steps from each row; the first step of the first is what the row is worth.
    targets = torch.randn(1, 8, 2)
    worth, reward = targets[0, ::2, 0], batch["reward"][0]
    loss = behavior.replay_value_loss(batch, observed, targets)
    expected = torch.zeros(())
    # The mean is over all three rows that have a successor.
    for row in (0, 2):
        feat = latents.feat()[:, row]
        dist, slow = behavior.critic(feat, None, View(None)), behavior.slow_critic(feat, None, View(None)).mean()
        target = reward[row + 1] + 0.5 * worth[row + 1]
        expected = expected - (dist.log_prob(target[None]) + 0.5 * dist.log_prob(slow.detach())).sum() / 3
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, deter)
    # Behind an episode's last row another begins, and the last row of all has no successor.
    assert gradient[0].any(-1).tolist() == [True, False, True, False]


@pytest.mark.parametrize("broken", [False, True])
def test_replay_value_loss_that_is_not_finite_skips_model_and_critic(broken: bool, monkeypatch: pytest.MonkeyPatch):
    settings = debug_config("gym", replay_context=False, schedule__warmup=0, imag_horizon="3")
    learner = Dreamer.of(SCRIPTED, settings, device=CPU, generators=make_generators(0, CPU), guard=Guard("cpu"))
    replay = scripted_replay()
    learner.update(replay, progress=0.0)
    if broken:
        whole = ImagBehavior.replay_value_loss

        def poisoned(self: ImagBehavior, *arguments: Any) -> Tensor:
            return whole(self, *arguments) * torch.nan

        monkeypatch.setattr(ImagBehavior, "replay_value_loss", poisoned)
    parts = {"model": learner.model, "critic": learner.behavior.critic, "actor": learner.behavior.actor}
    parts["slow critic"] = learner.behavior.slow_critic
    before = {name: [p.detach().clone() for p in part.parameters()] for name, part in parts.items()}
    learner.update(replay, progress=0.0)
    kept = {name: all(map(torch.equal, before[name], part.parameters())) for name, part in parts.items()}
    assert kept == {"model": broken, "critic": broken, "slow critic": broken, "actor": False}
