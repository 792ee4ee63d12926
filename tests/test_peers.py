"""Agents of other projects, on our environments as they are."""

from __future__ import annotations

import math

import gymnasium
import numpy as np
import pytest
import torch
from torch.nn import functional

import envs  # noqa: F401
from soft import networks as sac_networks
from tests.sac_scenes import pendulum_agent


def mean_return(agent, env, *, episodes, masks):
    total = 0.0
    for seed in range(episodes):
        obs, _ = env.reset(seed=seed)
        ended = False
        while not ended:
            action, _ = agent.predict(obs, action_masks=masks(env), deterministic=True)
            obs, reward, terminated, truncated, _ = env.step(action)
            total += float(reward)
            ended = terminated or truncated
    return total / episodes


@pytest.mark.slow
# The peer's own deprecations are no business of ours.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["TSP-v0", "CVRP-v0"])
def test_maskable_ppo_learns_on_the_environments_unchanged(name):
    sb3_contrib = pytest.importorskip("sb3_contrib")
    masks = pytest.importorskip("sb3_contrib.common.maskable.utils").get_action_masks
    torch.set_num_threads(1)
    env = gymnasium.make(name, num_nodes=8)
    settings = {"n_steps": 256, "batch_size": 64, "learning_rate": 1e-3, "seed": 0, "device": "cpu"}
    agent = sb3_contrib.MaskablePPO("MultiInputPolicy", env, **settings)
    before = mean_return(agent, env, episodes=50, masks=masks)
    agent.learn(6144)
    after = mean_return(agent, env, episodes=50, masks=masks)
    assert np.isfinite(after)
    assert after > before


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_sac_has_the_losses_and_gradients_of_stable_baselines3(monkeypatch):
    """With the same weights, batch and noise, and deviations bounded as theirs."""
    peers = pytest.importorskip("stable_baselines3")

    def bounded_as_theirs(dist, mean, log_std):
        dist.mean, dist.log_std = mean, log_std.clamp(-20, 2)

    monkeypatch.setattr(sac_networks.TanhNormal, "__init__", bounded_as_theirs)
    agent, _ = pendulum_agent()
    env = gymnasium.make("Pendulum-v1")
    peer = peers.SAC("MlpPolicy", env, gamma=0.99, seed=0, device="cpu", policy_kwargs={"net_arch": [16, 16]})
    soft, alpha, rows = agent.soft, 0.3, 64
    actor, (critic, target) = peer.actor, (peer.critic, peer.critic_target)
    with torch.no_grad():
        soft.temperature.log_alpha.fill_(math.log(alpha))
        theirs = [actor.latent_pi[0], actor.latent_pi[2]]
        for ours, layer in zip((soft.policy.mlp[0], soft.policy.mlp[2]), theirs, strict=True):
            ours.load_state_dict(layer.state_dict())
        soft.policy.mlp[4].weight.copy_(torch.cat((actor.mu.weight, actor.log_std.weight)))
        soft.policy.mlp[4].bias.copy_(torch.cat((actor.mu.bias, actor.log_std.bias)))
        # Apart, so that bootstrapping from the wrong one shows.
        for parameter in target.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for ours, layers in ((soft.values, critic), (soft.target_values, target)):
            (twins,) = (module for module in ours.modules() if isinstance(module, sac_networks.TwinMLP))
            for index in range(3):
                for twin, network in enumerate((layers.qf0, layers.qf1)):
                    getattr(twins, f"weight{index}")[twin] = network[2 * index].weight.T
                    getattr(twins, f"bias{index}")[twin, 0] = network[2 * index].bias
    # So large that some actions are all but 1.
    obs, next_obs, action = 4 * torch.randn(rows, 3), 4 * torch.randn(rows, 3), torch.rand(rows, 1) * 2 - 1
    reward, terminated = -10 * torch.rand(rows), torch.rand(rows) < 0.2
    no = torch.zeros(rows, 2, dtype=torch.bool)
    batch = {
        "observation": torch.stack((obs, next_obs), 1),
        "action": torch.stack((action, action), 1),
        "reward": torch.stack((torch.zeros(rows), reward), 1),
        "is_first": no,
        "is_last": no,
        "is_terminal": torch.stack((no[:, 0], terminated), 1),
    }
    losses, _ = soft.losses(batch, torch.Generator().manual_seed(5))
    noise = torch.randn((2, rows, 1), generator=torch.Generator().manual_seed(5))

    def act(seen, drawn):
        mean, log_std, _ = actor.get_action_dist_params(seen)
        before = mean + log_std.exp() * drawn
        chosen = torch.tanh(before)
        return chosen, actor.action_dist.proba_distribution(mean, log_std).log_prob(chosen, before)[:, None]

    chosen, log_prob = act(obs, noise[1])
    next_chosen, next_log_prob = act(next_obs, noise[0])
    with torch.no_grad():
        value = torch.cat(target(next_obs, next_chosen), 1).amin(1, keepdim=True) - alpha * next_log_prob
        bootstrapped = reward[:, None] + 0.99 * (~terminated)[:, None] * value
    q_loss = 0.5 * torch.stack([functional.mse_loss(q, bootstrapped) for q in critic(obs, action)]).sum()
    policy_loss = (alpha * log_prob - torch.cat(critic(obs, chosen), 1).amin(1, keepdim=True)).mean()
    alpha_loss = -(math.log(alpha) * (log_prob + peer.target_entropy).detach()).mean()
    for name, expected in (("q", q_loss), ("policy", policy_loss), ("alpha", alpha_loss)):
        assert losses[name].item() == pytest.approx(expected.item(), rel=1e-4), name
    parameters = dict(soft.policy.named_parameters())
    ours = torch.autograd.grad(losses["policy"], [parameters["mlp.0.weight"], parameters["mlp.4.weight"]])
    wanted = torch.autograd.grad(policy_loss, [theirs[0].weight, actor.mu.weight, actor.log_std.weight])
    torch.testing.assert_close(ours[0], wanted[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(ours[1], torch.cat(wanted[1:]), rtol=1e-3, atol=1e-5)
    (twins,) = (module for module in soft.values.modules() if isinstance(module, sac_networks.TwinMLP))
    (gradient,) = torch.autograd.grad(losses["q"], [dict(twins.named_parameters())["weight1"]])
    wanted = torch.autograd.grad(q_loss, [critic.qf0[2].weight, critic.qf1[2].weight])
    torch.testing.assert_close(gradient, torch.stack([part.T for part in wanted]), rtol=1e-3, atol=1e-4)
