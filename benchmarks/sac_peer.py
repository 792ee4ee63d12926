"""stable-baselines3's SAC on the task of a config, logged as a run of ours, for compare.py to lay beside it.

    pip install -e ".[peers,mujoco]" -c constraints.txt
    python -m benchmarks.sac_peer --configs sac_halfcheetah --logdir logdir/peer

HalfCheetah is of `mujoco`; `sac_pendulum` needs `peers` alone. Steps, prefill, batch, networks, discount, tau and
learning rate are the config's; everything else is theirs. `train_return` is the mean of the episodes that ended since
the last row, if any did. Their policy plays its mean for `valid_return` and, over `eval_episodes` episodes, for
`eval_return`, as ours does.
"""

from __future__ import annotations

import statistics
import sys
import time
from contextlib import ExitStack
from typing import Any

import gymnasium
import torch

from benchmarks.flags import CONFIGS
from config import Config, ConfigError, one_line_errors, parse_command_line
from envs.gym_tasks import make_gym
from routing.instances import TEST_SEED, VALIDATION_SEED
from settings.environment import WrapperSettings
from settings.run import RunSettings
from settings.sac import SACSettings
from settings.sections import Between, require_choice
from training import launch, logdirs
from training.logger import Logger
from training.progress import ProgressBar
from training.run_facts import save_run_facts

# Other values would change the task or the agent, and the peer does not know them.
CHOICES = {"reward_scale": (1.0,), "context": ("none",), "envs": (1,), "sac.critic": ("mse",)}


class Returns(gymnasium.Wrapper):
    """Notes what the episodes return."""

    def __init__(self, env: gymnasium.Env) -> None:
        """Begin with no episode."""
        super().__init__(env)
        self._running = 0.0
        self._ended: list[float] = []

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        """Begin an episode. One that is under way is not counted."""
        self._running = 0.0
        return super().reset(**options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step the environment."""
        obs, reward, terminated, truncated, info = super().step(action)
        self._running += float(reward)
        if terminated or truncated:
            self._ended.append(self._running)
        return obs, reward, terminated, truncated, info

    def fetch(self) -> dict[str, float]:
        """`train_return`, the mean of the episodes that ended since the last call; nothing where none did."""
        ended, self._ended = self._ended, []
        return {"train_return": statistics.fmean(ended)} if ended else {}


def validate(config: Config) -> None:
    """Raise a ConfigError where a setting is out of range, or is one that the peer knows nothing of."""
    RunSettings.of(config)
    SACSettings.of(config)
    flat = config.flat()
    for key, allowed in CHOICES.items():
        require_choice(key, flat[key], allowed)
    # Ours takes 0 for no validation; here it is the stride between two.
    Between(1).require("eval_every", config.eval_every)


def make_peer(config: Config, env: gymnasium.Env) -> Any:
    """Their agent with the config's settings.

    Raises:
        ConfigError: stable-baselines3 is not installed, or the actions are no numbers within bounds.
    """
    if not isinstance(env.action_space, gymnasium.spaces.Box):
        raise ConfigError(
            f"{config.task} has actions {env.action_space}; stable-baselines3's SAC plays continuous ones"
        )
    try:
        import stable_baselines3
    except ImportError as error:
        remedy = 'pip install -e ".[peers]" -c constraints.txt'
        raise ConfigError(f"stable-baselines3 is not installed: {remedy}") from error
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


def train(config: Config, logger: Logger, *, peer: Any, env: Returns, other: gymnasium.Env) -> None:
    """Train, validate as often as the config says, and play the final episodes.

    Args:
        config: the resolved config.
        logger: where the rows go.
        peer: from `make_peer`.
        env: what the peer plays to learn.
        other: another one of the kind, for validation.
    """
    bar = ProgressBar(config.steps)
    # Evaluation is part of the time, as it is in our runs.
    begin = time.monotonic()
    for step in range(config.eval_every, config.steps + config.eval_every, config.eval_every):
        peer.learn(min(step, config.steps) - peer.num_timesteps, reset_num_timesteps=False)
        value = mean_return(peer, other, episodes=config.valid_episodes, seed=VALIDATION_SEED)
        logger.scalars(peer.num_timesteps, time.monotonic() - begin, {**env.fetch(), "valid_return": value})
        bar.update(peer.num_timesteps, {"valid": value})
    final = mean_return(peer, other, episodes=config.eval_episodes, seed=TEST_SEED)
    logger.scalars(peer.num_timesteps, time.monotonic() - begin, {"eval_return": final})
    bar.say(f"final evaluation: {config.eval_episodes} episodes, mean return {final:.4g}")
    bar.close()


def main(argv: list[str]) -> None:
    """Read the command line and train."""
    with one_line_errors("sac_peer", *launch.USER_ERRORS):
        command = parse_command_line(
            ["--configs", "sac", *argv], config_path=CONFIGS, description=__doc__ or "", entry_keys={}
        )
        config = command.config
        validate(config)
        logdir = logdirs.unused_logdir(config)
        torch.set_num_threads(config.threads)
        with ExitStack() as stack:
            # Nothing is written before the peer is there: a package may be missing.
            make_env = make_gym(config.task, imports=config["import"], settings=WrapperSettings.of(config))
            env, other = Returns(make_env()), make_env()
            stack.callback(env.close)
            stack.callback(other.close)
            peer = make_peer(config, env)
            with logdirs.writing_to(logdir):
                logdir.mkdir(parents=True, exist_ok=True)
            logger = Logger(logdir)
            stack.callback(logger.close)
            facts = save_run_facts(logdir, config, ["benchmarks/sac_peer.py", *argv], defaults=command.defaults)
            logger.text("config", facts)
            train(config, logger, peer=peer, env=env, other=other)


if __name__ == "__main__":
    main(sys.argv[1:])
