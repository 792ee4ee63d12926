from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from envs.routing import TSPInstance, TSPRules
from envs.tasks import RoutingTask, Task
from imagining.routing_model import RoutingModel
from networks import Latent, NodeHead
from parts.layers import MLP
from tests.scenes import (
    EPISODE_ROWS,
    NODES,
    ROUTING,
    SCRIPTED,
    SWITCHES,
    SWITCHING,
    generator,
    make_world_model,
    random_rows,
    routing_replay,
    scripted_replay,
    switches_episodes,
    without_zero_outputs,
)
from tools import OneHotDist


def test_move_loss_reads_the_latent_before_each_move():
    model = make_world_model(ROUTING, reward_latent=True)
    without_zero_outputs(model)
    batch = routing_replay().sample_episodes(4, NODES + 1, generator=generator())
    feat = torch.randn(4, NODES + 1, model.rssm.feat_size, requires_grad=True)
    (gradient,) = torch.autograd.grad(model.move_loss(batch, TSPInstance(batch["coords"][:, 0]), feat), feat)
    assert (gradient[:, :-1].abs().sum((0, 2)) > 0).all()
    assert (gradient[:, -1] == 0).all()


def test_move_loss_is_the_mean_squared_reward_while_the_head_is_zero():
    batch = routing_replay().sample_episodes(8, NODES + 1, generator=generator())
    loss = make_world_model(ROUTING).move_loss(batch, TSPInstance(batch["coords"][:, 0]), None)
    torch.testing.assert_close(loss, batch["reward"][:, 1:].square().mean())


def every_scale(value: float) -> dict[str, Any]:
    scales = ("dyn", "rep", "decoder", *RoutingModel.HEADS)
    return {f"loss_scales.{name}": value for name in scales}


@pytest.mark.parametrize("current_pos", ["coords", "node"])
def test_every_routing_head_has_a_finite_loss(current_pos: str):
    model = make_world_model(ROUTING, current_pos=current_pos, **every_scale(1.0))
    batch = routing_replay().sample_episodes(4, NODES + 1, generator=generator())
    losses, metrics, _ = model.loss(batch, torch.rand(4, NODES + 1, model.rssm.stoch_size))
    assert set(losses) == {"dyn", "rep", *RoutingModel.HEADS} == set(model.loss_scales)
    assert set(model.heads) == set(RoutingModel.HEADS)
    assert all(loss.isfinite() and loss.ndim == 0 for loss in losses.values())
    assert all(f"{name}_loss" in metrics for name in losses)
    assert not any(metric.requires_grad for metric in metrics.values())


@pytest.mark.parametrize("name", RoutingModel.HEADS)
def test_head_with_scale_0_is_not_built(name: str):
    model = make_world_model(ROUTING, **every_scale(1.0) | {f"loss_scales.{name}": 0.0})
    assert set(model.heads) == set(RoutingModel.HEADS) - {name}
    batch = routing_replay().sample_episodes(2, NODES + 1, generator=generator())
    losses, _, _ = model.loss(batch, torch.rand(2, NODES + 1, model.rssm.stoch_size))
    assert set(losses) == {"dyn", "rep", *RoutingModel.HEADS} - {name}


@pytest.mark.parametrize("name", RoutingModel.HEADS)
def test_single_head_trains_alone(name: str):
    model = make_world_model(ROUTING, **every_scale(0.0) | {f"loss_scales.{key}": 1.0 for key in ("dyn", "rep", name)})
    batch = routing_replay().sample_episodes(2, NODES + 1, generator=generator())
    assert set(model.loss(batch, torch.rand(2, NODES + 1, model.rssm.stoch_size))[0]) == {"dyn", "rep", name}


def test_task_without_rules_has_reward_cont_and_decoder():
    model = make_world_model(SCRIPTED, **every_scale(1.0))
    batch = scripted_replay().sample_windows(4, 12, generator=generator())
    losses, _, _ = model.loss(batch, torch.rand(4, 12, model.rssm.stoch_size))
    assert set(losses) == {"dyn", "rep", "reward", "cont", "decoder"} == set(model.loss_scales)
    assert set(model.heads) == {"reward", "cont"} and model.decoder is not None
    assert all(loss.isfinite() for loss in losses.values())


def test_rewards_start_at_zero():
    routing, plain = make_world_model(ROUTING), make_world_model(SCRIPTED)
    assert (routing.predict_move(torch.rand(9, 2), torch.rand(9, 2), None) == 0).all()
    assert (plain.predict_reward(torch.randn(9, plain.rssm.feat_size)) == 0).all()


def test_current_position_is_learnt_as_coordinates_or_as_the_node():
    batch = routing_replay().sample_episodes(4, NODES + 1, generator=generator())
    noise = torch.rand(4, NODES + 1, 4)
    scales = every_scale(0.0) | {"loss_scales.dyn": 1.0, "loss_scales.rep": 1.0, "loss_scales.current_pos": 1.0}
    for current_pos, target in (
        ("coords", batch["coords"][:, 0][torch.arange(4)[:, None], batch["current_node"]]),
        ("node", batch["current_node"][..., None].float()),
    ):
        model = make_world_model(ROUTING, current_pos=current_pos, **scales)
        for parameter in model.heads["current_pos"].parameters():
            nn.init.zeros_(parameter)
        # Half the squared symlog of the target is what a prediction of 0 costs.
        expected = 0.5 * torch.log1p(target).square().sum(-1).mean()
        torch.testing.assert_close(model.loss(batch, noise)[0]["current_pos"], expected)


@pytest.mark.parametrize("task", [ROUTING, SCRIPTED], ids=["routing", "vectors"])
def test_gradient_reaches_every_parameter(task: Task):
    model = make_world_model(task, reward_latent=True, free_nats=0.0, **every_scale(1.0))
    without_zero_outputs(model)
    if not isinstance(task, RoutingTask):
        batch = scripted_replay().sample_windows(8, 12, generator=generator())
    else:
        batch = routing_replay().sample_episodes(8, NODES + 1, generator=generator())
    losses, _, _ = model.loss(batch, torch.rand(*batch["reward"].shape, model.rssm.stoch_size))
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(sum(losses.values(), torch.zeros(())), list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        # A softmax cancels what is added to all of its logits, and SetNorm what is added to all members of a set.
        if name.endswith(("current_node.bias", "hidden_out.bias")):
            continue
        assert gradient is not None, f"{name} is no part of the losses"
        assert gradient.isfinite().all() and gradient.abs().max() > 1e-7, name


def test_rows_beyond_the_first_episode_carry_no_weight():
    model = make_world_model(ROUTING, reward_latent=True, **every_scale(1.0))
    without_zero_outputs(model)
    batch = routing_replay().sample_episodes(4, NODES + 4, generator=generator())
    assert batch["is_first"][:, NODES + 1].all()
    noise = torch.rand(4, NODES + 4, model.rssm.stoch_size)
    episode = {key: value[:, : NODES + 1] for key, value in batch.items()}
    longer, _, _ = model.loss(batch, noise)
    alone, _, _ = model.loss(episode, noise[:, : NODES + 1])
    assert longer.keys() == alone.keys()
    for name in alone:
        torch.testing.assert_close(longer[name], alone[name], msg=f"{name} counts rows beyond the episode")


def test_kl_is_free_below_the_free_nats():
    model = make_world_model(ROUTING, free_nats=1e6)
    batch = routing_replay().sample_episodes(2, NODES + 1, generator=generator())
    losses, _, _ = model.loss(batch, torch.rand(2, NODES + 1, model.rssm.stoch_size))
    assert losses["dyn"] == losses["rep"] == 1e6


def test_kl_terms_pull_one_side_each():
    model = make_world_model(ROUTING, free_nats=0.0)
    batch = routing_replay().sample_episodes(4, NODES + 1, generator=generator())
    losses, _, _ = model.loss(batch, torch.rand(4, NODES + 1, model.rssm.stoch_size))
    prior, posterior = list(model.rssm.prior.parameters()), list(model.rssm.posterior.parameters())
    assert torch.autograd.grad(losses["dyn"], prior, retain_graph=True)[0].abs().max() > 0
    assert all(
        gradient is None for gradient in torch.autograd.grad(losses["rep"], prior, retain_graph=True, allow_unused=True)
    )
    assert torch.autograd.grad(losses["rep"], posterior)[0].abs().max() > 0


class EverythingClosed(NodeHead):
    """A mask head that holds no node for open."""

    def forward(self, feat: Tensor, nodes: Tensor) -> Tensor:
        return super().forward(feat, nodes) - 100


def test_predicted_mask_keeps_its_best_node_open():
    model = make_world_model(ROUTING)
    context = model.context(TSPInstance(torch.rand(3, NODES, 2)))
    model.heads["mask"] = EverythingClosed(model.rssm.feat_size, context.nodes.shape[-1], units=8)
    mask = model.predict_mask(torch.randn(3, 5, model.rssm.feat_size), context)
    assert (mask.sum(-1) == 1).all()


def test_begin_equals_observing_the_first_row():
    model = make_world_model(ROUTING)
    batch = routing_replay().sample_episodes(4, NODES + 1, generator=generator())
    noise = torch.rand(4, NODES + 1, model.rssm.stoch_size)
    observed = model.observe(batch, noise)
    latents, context = observed.latents, observed.context
    assert context is not None
    state = TSPRules.reset(TSPInstance(batch["coords"][:, :1]))
    begun = model.begin(context, state, noise[:, :1])
    for mine, theirs in zip(begun, latents, strict=True):
        torch.testing.assert_close(mine, theirs[:, :1])


def test_observe_carries_nothing_over_an_episodes_end():
    model = make_world_model(SCRIPTED)
    batch = scripted_replay().sample_windows(4, 2 * EPISODE_ROWS, generator=generator())
    noise = torch.rand(4, 2 * EPISODE_ROWS, model.rssm.stoch_size)
    other = {**batch, "clock": batch["clock"].clone(), "prev_action": batch["prev_action"].clone()}
    begins, other_noise = batch["is_first"].int().argmax(1), noise.clone()
    for row, begin in enumerate(begins.tolist()):
        other_noise[row, :begin] = 1 - noise[row, :begin]
        other["clock"][row, :begin] += 1.0
        other["prev_action"][row, : begin + 1] = 1
    latents, others = model.observe(batch, noise).latents.feat(), model.observe(other, other_noise).latents.feat()
    assert (begins > 0).any()
    for row, begin in enumerate(begins.tolist()):
        assert torch.equal(latents[row, begin:], others[row, begin:])
        assert begin == 0 or not torch.equal(latents[row, :begin], others[row, :begin])


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_cont_target_holds_the_discount(discount: float):
    model = make_world_model(SCRIPTED, discount=discount)
    head = model.heads["cont"]
    assert isinstance(head, MLP)
    nn.init.zeros_(head.output.weight)
    nn.init.constant_(head.output.bias, logit(0.8))
    batch = random_rows(SCRIPTED, count=1, rows=4)
    batch["is_terminal"] = torch.tensor([[False, False, False, True]])
    loss = model.loss(batch, torch.rand(1, 4, model.rssm.stoch_size))[0]["cont"]
    goes_on = -(discount * math.log(0.8) + (1 - discount) * math.log(0.2))
    assert loss.item() == pytest.approx((3 * goes_on - math.log(0.2)) / 4, rel=1e-5)
    assert model.predict_cont(torch.randn(2, model.rssm.feat_size)).tolist() == pytest.approx([0.8, 0.8])


def test_kl_terms_by_hand(monkeypatch: pytest.MonkeyPatch):
    """Two rows, one variable of four classes: one KL below the free nats, one above."""
    model = make_world_model(SCRIPTED, free_nats=0.2)
    even, sure = [0.0] * 4, [math.log(0.7)] + [math.log(0.1)] * 3
    slanted = [math.log(share) for share in (0.4, 0.2, 0.2, 0.2)]
    posterior = torch.tensor([[[even], [sure]]], requires_grad=True)
    prior = torch.tensor([[[slanted], [even]]], requires_grad=True)
    low = 0.25 * math.log(0.25 / 0.4) + 0.75 * math.log(0.25 / 0.2)
    high = 0.7 * math.log(0.7 / 0.25) + 0.3 * math.log(0.1 / 0.25)
    # 0.05 and 0.45 nats, of which 0.2 are free.
    assert low < 0.2 < high
    latents = Latent(torch.randn(1, 2, model.rssm.deter_size), torch.randn(1, 2, 4, 4))

    def observed(*_arguments: object) -> tuple[Latent, OneHotDist, OneHotDist]:
        return latents, OneHotDist(posterior), OneHotDist(prior)

    monkeypatch.setattr(model.rssm, "observe", observed)
    losses, _, _ = model.loss(random_rows(SCRIPTED, count=1, rows=2), torch.rand(1, 2, 4))
    for name, pulled, other in (("dyn", prior, posterior), ("rep", posterior, prior)):
        assert losses[name].item() == pytest.approx((0.2 + high) / 2, rel=1e-5)
        mine, theirs = torch.autograd.grad(losses[name], (pulled, other), allow_unused=True)
        # Only the row above the free nats pulls.
        assert theirs is None and mine[0].any(-1)[:, 0].tolist() == [False, True]


def test_observe_goes_on_from_the_row_before():
    """What `memory` keeps is a half-precision latent: a window that goes on from it is close to the whole."""
    model, batch = make_world_model(SCRIPTED), random_rows(SCRIPTED, rows=8)
    noise = torch.rand(4, 8, model.rssm.stoch_size)
    whole = model.observe(batch, noise).latents
    kept = model.memory(Latent(*(part[:, 4] for part in whole)))
    window = {name: value[:, 5:] for name, value in batch.items()}
    resumed = model.observe({**window, **kept}, noise[:, 5:]).latents
    torch.testing.assert_close(resumed.deter, whole.deter[:, 5:], atol=1e-3, rtol=1e-3)
    assert torch.equal(resumed.stoch, whole.stoch[:, 5:])
    forgetful = model.observe(window, noise[:, 5:]).latents
    assert not torch.allclose(forgetful.deter, whole.deter[:, 5:], atol=1e-2)


def test_mask_head_is_built_and_taught_where_actions_are_masked():
    model, batch = make_world_model(SWITCHING), switches_episodes(8)
    losses, metrics, observed = model.loss(batch, torch.rand(8, SWITCHES + 1, model.rssm.stoch_size))
    logits = model.heads["mask"](observed.latents.feat())
    expected = nn.functional.binary_cross_entropy_with_logits(logits, batch["action_mask"].float())
    torch.testing.assert_close(losses["mask"], expected)
    predicted = model.predict_mask(observed.latents.feat(), None)
    agreed = predicted == batch["action_mask"]
    torch.testing.assert_close(metrics["mask_accuracy"], agreed.float().mean())
    torch.testing.assert_close(metrics["mask_exact"], agreed.all(-1).float().mean())
    assert metrics["mask_rules_wrong"] == 0


def test_open_loop_of_a_masked_task_sees_the_mask():
    model, batch = make_world_model(SWITCHING), switches_episodes(2)
    noise = torch.rand(2, SWITCHES + 1, model.rssm.stoch_size)
    assert model.open_loop(batch, seen=2, noise=noise)["values"].shape == batch["values"].shape


def test_open_loop_observes_first_and_imagines_then():
    model, batch = make_world_model(SCRIPTED), random_rows(SCRIPTED, rows=7)
    assert model.decoder is not None
    noise = torch.rand(4, 7, model.rssm.stoch_size)
    shown = model.open_loop(batch, seen=3, noise=noise)
    with torch.no_grad():
        decoded = model.decoder.predict(model.observe(batch, noise).latents.feat())
    other = {**batch, **{name: batch[name].clone() for name in SCRIPTED.observations}}
    for name in SCRIPTED.observations:
        other[name][:, 3:] += 10.0
    blind = model.open_loop(other, seen=3, noise=noise)
    steered = model.open_loop({**batch, "prev_action": (batch["prev_action"] + 1) % 3}, seen=3, noise=noise)
    assert shown.keys() == decoded.keys() == SCRIPTED.observations.keys()
    for name, values in shown.items():
        assert values.shape == batch[name].shape
        torch.testing.assert_close(values[:, :3], decoded[name][:, :3])
        assert not torch.allclose(values[:, 3:], decoded[name][:, 3:])
        assert torch.equal(blind[name], values)
        assert not torch.allclose(steered[name][:, 3:], values[:, 3:])
