"""stable-baselines3's SAC on the task of a config, logged as a run of ours, for compare.py to lay beside it.

    pip install -e ".[peers]" && python -m benchmarks.sac_peer --configs sac_halfcheetah --logdir logdir/peer

Steps, prefill, batch, networks, discount, tau and learning rate are the config's; everything else is theirs. Their
policy plays its mean for `valid_return` and, over `eval_episodes` episodes, for `eval_return`, as ours does.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

import launch
from benchmarks.speed import CONFIGS
from config import Config, ConfigError, one_line_errors, parse_command_line
from envs.gym_tasks import make_gym
from envs.instances import TEST_SEED, VALIDATION_SEED
from logger import METRICS, Logger, ProgressBar, save_run_facts


def make_peer(config: Config, env: gymnasium.Env) -> Any:
    """Their agent with the config's settings.

    Raises:
        ConfigError: stable-baselines3 is not installed.
    """
    try:
        import stable_baselines3
    except ImportError as error:
        raise ConfigError('stable-baselines3 is not installed: pip install -e ".[peers]"') from error
    return stable_baselines3.SAC(
        "MlpPolicy",
        env,
        device="cpu",
        batch_size=config.batch_size,
        buffer_size=config.replay_capacity,
        learning_starts=config.prefill,
        gamma=config.discount,
        tau=config.sac.tau,
        learning_rate=config.sac.lr,
        policy_kwargs={"net_arch": [config.sac.units] * config.sac.layers},
        seed=config.seed,
    )


def mean_return(peer: Any, env: gymnasium.Env, *, episodes: int, seed: int) -> float:
    """Of episodes that begin with fixed seeds, the policy playing its mean."""
    total = 0.0
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed + episode)
        ended = False
        while not ended:
            action, _ = peer.predict(obs, deterministic=True)
            obs, reward, terminated, truncated, _ = env.step(action)
            total += float(reward)
            ended = terminated or truncated
    return total / episodes


def train(config: Config, logger: Logger) -> None:
    """Train, validate as often as the config says, and play the final episodes."""
    make_env = make_gym(config.task, imports=config["import"], render_mode=None)
    env, other = make_env(), make_env()
    peer = make_peer(config, env)
    bar = ProgressBar(config.steps)
    # Evaluation is part of the time, as it is in our runs.
    begin = time.monotonic()
    for step in range(config.eval_every, config.steps + config.eval_every, config.eval_every):
        peer.learn(min(step, config.steps) - peer.num_timesteps, reset_num_timesteps=False)
        value = mean_return(peer, other, episodes=config.valid_episodes, seed=VALIDATION_SEED)
        returns = [episode["r"] for episode in peer.ep_info_buffer]
        values = {"train_return": float(np.mean(returns)), "valid_return": value}
        logger.scalars(peer.num_timesteps, time.monotonic() - begin, values)
        bar.update(peer.num_timesteps, {"valid": value})
    final = mean_return(peer, other, episodes=config.eval_episodes, seed=TEST_SEED)
    logger.scalars(peer.num_timesteps, time.monotonic() - begin, {"eval_return": final})
    bar.say(f"final evaluation: {config.eval_episodes} episodes, mean return {final:.4g}")
    bar.close()
    env.close()
    other.close()


def main(argv: list[str]) -> None:
    """Read the command line and train."""
    with one_line_errors("sac_peer", *launch.USER_ERRORS):
        command = parse_command_line(
            ["--configs", "sac", *argv], config_path=CONFIGS, description=__doc__ or "", entry_keys={}
        )
        config = command.config
        if config.logdir is None or (Path(config.logdir) / METRICS).exists():
            raise ConfigError(f"--logdir is {config.logdir}; name a folder that has no run yet")
        torch.set_num_threads(config.threads)
        logdir = Path(config.logdir)
        logdir.mkdir(parents=True, exist_ok=True)
        logger = Logger(logdir)
        try:
            facts = save_run_facts(logdir, config, ["benchmarks/sac_peer.py", *argv], defaults=command.defaults)
            logger.text("config", facts)
            train(config, logger)
        finally:
            logger.close()


if __name__ == "__main__":
    main(sys.argv[1:])
