"""Agents that nobody here wrote, on the environments as they are."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch

import envs  # noqa: F401


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
