from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from envs.routing import TSPRules
from envs.tasks import ActionSpec, ObservationKey, ObservationTask
from envs.vector import RoutingVectorEnv
from parts.acting import Sight
from parts.actors import saturation
from settings.learning import PointerSettings
from settings.sac import InitialAlpha, SoftSettings
from soft.losses import ContinuousSoft, RoutingSoft, VectorSoft

CPU = torch.device("cpu")
SETTINGS = SoftSettings(
    critic="mse",
    units=8,
    layers=1,
    depth=2,
    bins=63,
    lr=1e-3,
    tau=0.5,
    initial_alpha=InitialAlpha(mse=1.0, symlog_disc=0.03),
    max_grad_norm=math.inf,
    entropy_share=0.98,
)
POINTER = PointerSettings(width=16, layers=1, heads=2, hidden=32, latent=0, clip=10.0, cost_units=0)
OBSERVATIONS = {"x": ObservationKey("vector", (2,), torch.float32)}


def continuous(**changes: Any) -> ContinuousSoft:
    task = ObservationTask(actions=ActionSpec("continuous", (1,)), observations=OBSERVATIONS)
    return ContinuousSoft(task, replace(SETTINGS, **changes), discount=0.9, device=CPU)


CAMERA = {
    **OBSERVATIONS,
    "eye": ObservationKey("image", (16, 16, 3), torch.uint8),
    "points": ObservationKey("set", (4, 2), torch.float32, validity="points_mask"),
    "points_mask": ObservationKey("validity", (4,), torch.bool),
}


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_encoders_of_images_and_sets_are_trained_by_the_loss_of_the_q_functions_alone(kind):
    make: Any = ContinuousSoft if kind == "continuous" else VectorSoft
    actions = ActionSpec(kind, (3,))
    soft = make(ObservationTask(actions=actions, observations=CAMERA), SETTINGS, discount=0.9, device=CPU)
    no = torch.zeros(5, 2, dtype=torch.bool)
    batch = {
        "x": torch.randn(5, 2, 2),
        "eye": torch.randint(0, 256, (5, 2, 16, 16, 3), dtype=torch.uint8),
        "points": torch.randn(5, 2, 4, 2),
        "points_mask": torch.rand(5, 2, 4) < 0.5,
        "action": torch.zeros(5, 2, dtype=torch.int64) if kind == "discrete" else torch.rand(5, 2, 3),
        "reward": torch.randn(5, 2),
        **{name: no for name in ("is_first", "is_last", "is_terminal")},
    }
    losses, _ = soft.losses(batch, torch.Generator().manual_seed(0))
    encoders = [*soft.read.parameters()]
    for name in ("policy", "alpha"):
        assert all(g is None for g in torch.autograd.grad(losses[name], encoders, retain_graph=True, allow_unused=True))
    gradients = torch.autograd.grad(losses["q"], encoders, allow_unused=True)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    assert soft.judging() == {"q": soft.values, "read": soft.read}
    # The slow copies of the encoders follow with those of the Q functions, by tau = 0.5.
    with torch.no_grad():
        encoders[0] += 1
    soft.follow({"q": torch.ones(()), "policy": torch.ones(())})
    torch.testing.assert_close(next(soft.target_read.parameters()), encoders[0] - 0.5)


def test_target_is_read_by_the_slow_encoders():
    soft: Any = ContinuousSoft(
        ObservationTask(actions=ActionSpec("continuous", (1,)), observations={"eye": CAMERA["eye"]}),
        SETTINGS,
        discount=0.9,
        device=CPU,
    )
    read: list[str] = []
    for name, reader in (("fast", soft.read), ("slow", soft.target_read)):
        reader.register_forward_hook(lambda _module, inputs, _output, name=name: read.append(name))
    no = torch.zeros(2, 2, dtype=torch.bool)
    batch = {
        "eye": torch.zeros(2, 2, 16, 16, 3, dtype=torch.uint8),
        **{"action": torch.zeros(2, 2, 1), "reward": torch.zeros(2, 2)},
        **{name: no for name in ("is_first", "is_last", "is_terminal")},
    }
    soft.losses(batch, torch.Generator().manual_seed(0))
    assert read == ["fast", "fast", "slow"]


def test_temperature_begins_lower_where_values_are_divided_by_their_scale():
    assert continuous().temperature().item() == 1
    assert continuous(critic="symlog_disc").temperature().item() == pytest.approx(0.03)


ALPHA = 0.3


def midway(soft: Any) -> Any:
    """As in training: the slow Q functions are others than Q, the temperature another than 1."""
    with torch.no_grad():
        for parameter in soft.target_values.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise(7)))
        soft.temperature.log_alpha.fill_(math.log(ALPHA))
    return soft


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def transitions(count: int = 4) -> dict[str, Tensor]:
    """Windows of two rows, none of them crossing the end of an episode."""
    no = torch.zeros(count, 2, dtype=torch.bool)
    return {
        "x": torch.randn(count, 2, 2),
        "action": torch.rand(count, 2, 1) * 2 - 1,
        "reward": torch.randn(count, 2),
        "is_first": no,
        "is_terminal": no,
    }


def with_row(batch: dict[str, Tensor], name: str, row: int, value: Any) -> dict[str, Tensor]:
    changed = batch[name].clone()
    changed[row, 1] = value
    return {**batch, name: changed}


# Continuous actions


def test_terminal_transition_does_not_bootstrap():
    soft, batch = continuous(), transitions()
    batch["is_terminal"] = torch.tensor([[False, True]]).expand(4, 2)
    losses, _ = soft.losses(batch, noise())
    q = soft.values.mean(soft.values(batch["x"][:, 0], batch["action"][:, 0]))
    torch.testing.assert_close(losses["q"], (0.5 * (q - batch["reward"][:, 1]).square().sum(0)).mean())


def test_time_limit_bootstraps_with_the_soft_value_of_the_slow_twins():
    soft, batch = midway(continuous()), transitions()
    losses, _ = soft.losses(batch, noise())
    draws = torch.randn(2, 4, 1, generator=noise())
    action, log_prob = soft.policy(batch["x"][:, 1]).sample(draws[0])
    next_q = soft.target_values.mean(soft.target_values(batch["x"][:, 1], action)).amin(0)
    target = batch["reward"][:, 1] + 0.9 * (next_q - ALPHA * log_prob)
    q = soft.values.mean(soft.values(batch["x"][:, 0], batch["action"][:, 0]))
    torch.testing.assert_close(losses["q"], (0.5 * (q - target.detach()).square().sum(0)).mean())


def test_policy_and_temperature_learn_from_the_lower_twin_and_the_entropy_of_rows_that_count():
    soft, batch = midway(continuous()), with_row(transitions(), "is_first", 2, True)
    losses, _ = soft.losses(batch, noise())
    obs, counted = batch["x"][:, 0], [0, 1, 3]
    action, log_prob = soft.policy(obs).sample(torch.randn(2, 4, 1, generator=noise())[1])
    q1, q2 = soft.values.mean(soft.values(obs, action))
    torch.testing.assert_close(losses["policy"], (ALPHA * log_prob - torch.minimum(q1, q2))[counted].mean())
    # One action, so that an entropy of -1 is aimed at.
    torch.testing.assert_close(losses["alpha"], math.log(ALPHA) * (1 - log_prob[counted].detach()).mean())


def test_windows_across_the_end_of_an_episode_count_for_nothing():
    soft, batch = continuous(), with_row(transitions(), "is_first", 2, True)
    losses, _ = soft.losses(batch, noise())
    other, _ = soft.losses(with_row(batch, "reward", 2, 1e6), noise())
    for name, loss in losses.items():
        assert torch.equal(loss, other[name])


def test_temperature_rises_where_entropy_is_below_its_target():
    soft, batch = continuous(), transitions()
    for log_std, sign in ((-30.0, -1), (0.5, 1)):
        last = soft.policy.mlp[-1]
        with torch.no_grad():
            last.weight.zero_()
            last.bias.copy_(torch.tensor([0.0, log_std]))
        losses, _ = soft.losses(batch, noise())
        (gradient,) = torch.autograd.grad(losses["alpha"], soft.temperature.log_alpha)
        assert torch.sign(gradient) == sign


def test_policy_loss_reaches_no_q_function():
    soft = continuous()
    losses, _ = soft.losses(transitions(), noise())
    gradients = torch.autograd.grad(losses["policy"], list(soft.values.parameters()), allow_unused=True)
    assert all(gradient is None for gradient in gradients)


def test_two_hot_values_are_plain_returns_whatever_the_temperature():
    soft, batch = continuous(critic="symlog_disc"), transitions()
    cold, _ = soft.losses(batch, noise())
    with torch.no_grad():
        soft.temperature.log_alpha.fill_(5.0)
    hot, _ = soft.losses(batch, noise())
    assert torch.equal(cold["q"], hot["q"]) and not torch.equal(cold["policy"], hot["policy"])


def test_two_hot_policy_objective_is_divided_by_the_scale_of_q():
    soft, batch = continuous(critic="symlog_disc"), transitions()
    with torch.no_grad():
        soft.values.mlp.get_parameter(f"weight{soft.values.mlp.layers - 1}").normal_()
    soft.scale.high.fill_(1e6)
    soft.scale.rate = 0.0
    far, _ = soft.losses(batch, noise())
    soft.scale.high.fill_(2e6)
    farther, _ = soft.losses(batch, noise())
    _, log_prob = soft.policy(batch["x"][:, 0]).sample(torch.randn(2, 4, 1, generator=noise())[1])
    bonus = soft.temperature() * log_prob.mean()
    torch.testing.assert_close(far["policy"] - bonus, 2 * (farther["policy"] - bonus))


def test_scale_of_q_follows_the_policys_own_values_where_the_policy_was_updated():
    soft, batch = continuous(critic="symlog_disc"), transitions()
    with torch.no_grad():
        soft.values.mlp.get_parameter(f"weight{soft.values.mlp.layers - 1}").normal_()
    soft.scale.high.fill_(2.0)
    soft.losses(batch, noise())
    obs = batch["x"][:, 0]
    action, _ = soft.policy(obs).sample(torch.randn(2, 4, 1, generator=noise())[1])
    size = soft.values.mean(soft.values(obs, action)).amin(0).abs().mean()
    moved = 2 + soft.scale.rate * (size.detach() - 2)
    soft.follow({"q": torch.tensor(1.0), "policy": torch.tensor(1.0)})
    torch.testing.assert_close(soft.scale.high, moved)
    soft.losses(batch, noise())
    soft.follow({"q": torch.tensor(1.0), "policy": torch.tensor(0.0)})
    torch.testing.assert_close(soft.scale.high, moved)


def test_target_values_follow_by_tau_and_only_applied_updates():
    soft = continuous()
    with torch.no_grad():
        for parameter in soft.values.parameters():
            parameter.add_(1.0)
    before = [parameter.clone() for parameter in soft.target_values.parameters()]
    for applied, moved in ((0.0, 0.0), (1.0, 0.5)):
        soft.follow({"q": torch.tensor(applied), "policy": torch.tensor(1.0)})
        for parameter, old in zip(soft.target_values.parameters(), before, strict=True):
            torch.testing.assert_close(parameter, old + moved)


# Discrete actions


class Constant(nn.Module):
    """Gives the same whatever it sees."""

    def __init__(self, *values: list[float]) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values if len(values) > 1 else values[0]))

    def forward(self, x: Tensor) -> Tensor:
        if self.values.dim() == 1:
            return self.values.expand(*x.shape[:-1], -1)
        return self.values[:, None].expand(-1, x.shape[0], -1)


def discrete(*, logits: list[float], values: list[list[float]], slow: list[list[float]]) -> VectorSoft:
    """Known functions of 3 actions."""
    task = ObservationTask(actions=ActionSpec("discrete", (3,), masked=True), observations=OBSERVATIONS)
    soft = VectorSoft(task, SETTINGS, discount=0.5, device=CPU)
    soft.policy, soft.values, soft.target_values = Constant(logits), Constant(*values), Constant(*slow)
    with torch.no_grad():
        soft.temperature.log_alpha.fill_(math.log(ALPHA))
    return soft


def masked_batch(mask: list[list[bool]], *, action: int = 0, terminal: bool = False) -> dict[str, Tensor]:
    """One transition from a state with the first mask to one with the second, for a reward of 1."""
    no = torch.zeros(1, 2, dtype=torch.bool)
    # What is done after it has another value in every test.
    later = (action + 1) % 3
    return {
        "x": torch.zeros(1, 2, 2),
        "action": torch.tensor([[action, later]]),
        "reward": torch.tensor([[0.0, 1.0]]),
        "is_first": no,
        "is_terminal": torch.tensor([[False, terminal]]),
        "action_mask": torch.tensor([mask]),
    }


def test_masked_target_is_the_expectation_over_legal_actions_only():
    soft = discrete(logits=[0.0, 0.0, 0.0], values=[[2.0, 0, 0], [3.0, 0, 0]], slow=[[4.0, 8, 1e9], [6.0, 6, 1e9]])
    losses, _ = soft.losses(masked_batch([[True] * 3, [True, True, False]]), noise())
    # Next: half of min(4, 6) and min(8, 6), and log 2 of entropy.
    target = 1 + 0.5 * (5 + ALPHA * math.log(2))
    assert losses["q"].item() == pytest.approx(0.5 * (2 - target) ** 2 + 0.5 * (3 - target) ** 2)


def test_masked_terminal_transition_does_not_bootstrap():
    soft = discrete(logits=[0.0, 0.0, 0.0], values=[[2.0, 0, 0], [3.0, 0, 0]], slow=[[4.0, 8, 1e9], [6.0, 6, 1e9]])
    losses, _ = soft.losses(masked_batch([[True] * 3, [True, True, False]], terminal=True), noise())
    assert losses["q"].item() == pytest.approx(0.5 * (2 - 1) ** 2 + 0.5 * (3 - 1) ** 2)


def test_masked_policy_objective_is_the_expectation_over_legal_actions_only():
    soft = discrete(logits=[math.log(3), 0.0, 50.0], values=[[2.0, 4, 1e9], [3.0, 0, 1e9]], slow=[[0.0] * 3] * 2)
    losses, _ = soft.losses(masked_batch([[True, True, False], [True] * 3]), noise())
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert losses["policy"].item() == pytest.approx(-(0.75 * 2 + 0.25 * 0 + ALPHA * entropy))
    (gradient,) = torch.autograd.grad(losses["policy"], soft.policy.values)
    assert gradient.isfinite().all() and gradient[2] == 0


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([True, True, True], math.log(3) * (1 - 0.98)),
        ([True, True, False], math.log(2) * (1 - 0.98)),
    ],
)
def test_target_entropy_depends_on_the_legal_actions(mask: list[bool], expected: float):
    soft = discrete(logits=[0.0, 0.0, 0.0], values=[[0.0] * 3] * 2, slow=[[0.0] * 3] * 2)
    losses, _ = soft.losses(masked_batch([mask, [True] * 3], action=1), noise())
    (gradient,) = torch.autograd.grad(losses["alpha"], soft.temperature.log_alpha)
    assert gradient.item() == pytest.approx(expected, abs=1e-6)


def test_states_with_one_legal_action_do_not_train_the_temperature():
    soft = discrete(logits=[0.0, 0.0, 0.0], values=[[0.0] * 3] * 2, slow=[[0.0] * 3] * 2)
    choice, none = (masked_batch([mask, [True] * 3], action=1) for mask in ([True] * 3, [False, True, False]))
    both = {name: torch.cat((choice[name], none[name])) for name in choice}
    for batch, expected in ((both, math.log(3) * (1 - 0.98)), (none, 0.0)):
        (gradient,) = torch.autograd.grad(soft.losses(batch, noise())[0]["alpha"], soft.temperature.log_alpha)
        # Counted with a miss of 0, the state without a choice would halve it.
        assert gradient.item() == pytest.approx(expected, rel=1e-5)


def test_discrete_sac_refuses_a_two_hot_critic():
    task = ObservationTask(actions=ActionSpec("discrete", (3,)), observations=OBSERVATIONS)
    with pytest.raises(ValueError, match="'symlog_disc', which is for continuous actions"):
        VectorSoft(task, replace(SETTINGS, critic="symlog_disc"), discount=1.0, device=CPU)


def test_windows_across_the_end_of_an_episode_count_nowhere():
    soft, batch = continuous(), transitions()
    counted, _ = soft.losses({name: value[:3] for name, value in batch.items()}, noise())
    crossing = with_row(batch, "is_first", 3, True)
    crossing["x"][3] = 1e3
    _, metrics = soft.losses(crossing, noise())
    q = soft.values.mean(soft.values(batch["x"][:3, 0], batch["action"][:3, 0]))
    assert metrics["train/q_mean"].item() == pytest.approx(q.mean().item(), rel=1e-4)
    assert metrics["train/q_std"].item() == pytest.approx(q.std(correction=0).item(), rel=1e-4)
    none, _ = soft.losses({**batch, "is_first": torch.ones(4, 2, dtype=torch.bool)}, noise())
    (gradient,) = torch.autograd.grad(none["alpha"], [soft.temperature.log_alpha])
    assert gradient.item() == 0
    (gradient,) = torch.autograd.grad(counted["alpha"], [soft.temperature.log_alpha])
    assert gradient.item() != 0


def test_saturated_pointer_of_the_policy_gets_a_gradient():
    soft, batch = routing_batch(noise(1))
    with torch.no_grad():
        for parameter in soft.policy.parameters():
            parameter.mul_(30)
    losses, metrics = soft.losses(batch, noise(1))
    gradients = torch.autograd.grad(losses["policy"], list(soft.policy.parameters()), allow_unused=True)
    assert metrics["actor_saturation"].item() > 0.5
    assert sum(float(gradient.abs().sum()) for gradient in gradients if gradient is not None) > 0.1


def routing_batch(generator: torch.Generator, *, nodes: int = 5) -> tuple[RoutingSoft, dict[str, Tensor]]:
    """A fresh agent, and tours that it walked."""
    soft = RoutingSoft(TSPRules, SETTINGS, pointer=POINTER, discount=1.0, device=CPU)
    env = RoutingVectorEnv(TSPRules, num_envs=3, num_nodes=nodes, device=CPU, generator=generator, check_actions=True)
    obs, info = env.reset()
    static: dict[str, Tensor] = {}
    rows, reward, ended = [], torch.zeros(3), torch.zeros(3, dtype=torch.bool)
    for _ in range(nodes + 1):
        action, static = soft.act(Sight.of(obs, info), static, generator=generator)
        rows.append({**obs, "action": action, "reward": reward, "is_first": info["is_first"], "is_terminal": ended})
        obs, reward, ended, _, info = env.step(action)
    return soft, {key: torch.stack([row[key] for row in rows], 1) for key in rows[0]}


def test_rows_of_the_next_episode_count_for_nothing():
    soft, batch = routing_batch(noise(1))
    batch["is_first"][:, 3] = True
    losses, metrics = soft.losses(batch, noise(1))
    for column, changes in ((2, True), (3, False), (4, False), (5, False)):
        reward = batch["reward"].clone()
        reward[:, column] += 100
        other, other_metrics = soft.losses({**batch, "reward": reward}, noise(1))
        assert (losses["q"] != other["q"]) == changes
        assert other_metrics["target_entropy"] == metrics["target_entropy"]
    # Over the states before it that have a choice: 4 and 3 open nodes.
    assert metrics["target_entropy"].item() == pytest.approx(0.98 * (math.log(4) + math.log(3)) / 2, rel=1e-5)


def test_saturation_of_rows_of_the_next_episode_is_not_punished():
    soft, batch = routing_batch(noise(1))
    with torch.no_grad():
        for parameter in soft.policy.parameters():
            parameter.mul_(1.6)
    cut = {**batch, "is_first": batch["is_first"].clone()}
    cut["is_first"][:, 2] = True
    # Only the first row goes on within the episode.
    scores = soft.judge(batch).scores
    assert scores is not None
    _, share = saturation(scores[:, :1], batch["action_mask"][:, :1])
    assert soft.losses(cut, noise(1))[1]["actor_saturation"].item() == pytest.approx(share.item())
    assert soft.losses(batch, noise(1))[1]["actor_saturation"].item() != pytest.approx(share.item())


def test_routing_has_two_twins_and_slow_ones_of_their_own():
    soft, batch = routing_batch(noise(1))
    before = soft.judge(batch)
    after = midway(soft).judge(batch)
    legal = before.mask
    assert not torch.allclose(before.value[0][legal], before.value[1][legal])
    assert torch.equal(before.value, after.value)
    assert not torch.allclose(before.slow_value[0][legal], after.slow_value[0][legal])


def test_routing_values_learn_what_is_left_of_a_tour():
    generator = noise(1)
    soft, batch = routing_batch(generator)
    losses, metrics = soft.losses(batch, generator)
    assert all(loss.isfinite() for loss in losses.values())
    # The entropy aimed at, over the states with a choice: 4, 3 and 2 open nodes.
    assert metrics["target_entropy"].item() == pytest.approx(0.98 * math.log(24) / 3, abs=1e-5)
    parameters = [*soft.policy.parameters(), *soft.values.parameters()]
    for gradient in torch.autograd.grad(losses["q"] + losses["policy"], parameters, allow_unused=True):
        assert gradient is None or gradient.isfinite().all()
