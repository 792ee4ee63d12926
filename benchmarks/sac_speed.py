"""Updates per second of continuous SAC beside those of stable-baselines3's, at the same batch, networks and data.

    pip install -e ".[peers]" -c constraints.txt && python -m benchmarks.sac_speed

Both sample their own replay of random transitions and take turns, so that a machine that is not always as fast is fair
to both. Acting and environments are no part of it. What is printed is the median of each, and of the ratios.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks import sac_peer
from benchmarks.flags import CONFIGS
from config import ConfigError, one_line_errors, parse_command_line
from envs.gym_tasks import make_gym
from guard import Guard
from sac import SAC
from settings.environment import WrapperSettings
from training import devices, launch, setup
from training.replay import Replay

ENTRY_KEYS = {"rounds": "turns of each (default: 15)"}
UPDATES = 40
ROWS = 20000


def random_replay(task: Any) -> Replay:
    """A replay full of noise in the shape of a task with continuous actions."""
    spaces = {name: (key.shape, key.dtype) for name, key in task.observations.items()}
    replay = Replay(
        {**spaces, "action": (task.actions.shape, task.actions.dtype)},
        num_envs=1,
        capacity=ROWS,
        device=torch.device("cpu"),
    )
    for row in range(ROWS):
        replay.add(
            {
                **{name: torch.randn(1, *key.shape) for name, key in task.observations.items()},
                "action": torch.rand(1, *task.actions.shape) * 2 - 1,
                "reward": torch.randn(1),
                "is_first": torch.tensor([row == 0]),
                "is_last": torch.tensor([False]),
                "is_terminal": torch.tensor([False]),
            }
        )
    return replay


def our_updates(config: Any) -> Callable[[], None]:
    """What makes `UPDATES` of ours."""
    cpu = torch.device("cpu")
    task = setup.make_setup(config, cpu).task
    agent = SAC.of(task, config, device=cpu, generators=devices.make_generators(0, cpu), guard=Guard("cpu"))
    replay = random_replay(task)

    def update() -> None:
        for _ in range(UPDATES):
            agent.update(replay, progress=0.5)

    return update


def their_updates(config: Any) -> Callable[[], None]:
    """What makes as many of stable-baselines3's."""
    env = make_gym(config.task, imports=config["import"], settings=WrapperSettings.of(config))()
    agent = sac_peer.make_peer(config.replace(replay_capacity=ROWS), env)
    # The package is there: the peer has been made.
    from stable_baselines3.common.logger import Logger

    agent.set_logger(Logger(None, []))
    seen, acts, draws = agent.observation_space.shape, agent.action_space.shape, np.random.default_rng(0)
    assert seen is not None and acts is not None
    for _ in range(ROWS):
        agent.replay_buffer.add(
            draws.normal(size=(1, *seen)),
            draws.normal(size=(1, *seen)),
            draws.uniform(-1, 1, size=(1, *acts)),
            draws.normal(size=1),
            np.zeros(1),
            [{}],
        )

    def update() -> None:
        agent.train(gradient_steps=UPDATES, batch_size=config.batch_size)

    return update


def main(argv: list[str]) -> None:
    """Read the command line, let both take turns, and print a table."""
    with one_line_errors("sac_speed", *launch.USER_ERRORS):
        command = parse_command_line(
            ["--configs", "sac", "sac_pendulum", *argv],
            config_path=CONFIGS,
            description=__doc__ or "",
            entry_keys=ENTRY_KEYS,
        )
        rounds = command.entry["rounds"] or "15"
        if not (rounds.isdecimal() and int(rounds)):
            raise ConfigError(f"--rounds is {rounds!r}; it takes a whole number, at least 1")
        torch.manual_seed(0)
        torch.set_num_threads(command.config.threads)
        sac_peer.validate(command.config)
        # The peers come first, since they say what is wrong with a task that they cannot play.
        theirs = their_updates(command.config)
        contestants = {"ours": our_updates(command.config), "stable-baselines3": theirs}
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    # The first round warms up.
    for _ in range(1 + int(rounds)):
        for name, update in contestants.items():
            begin = time.perf_counter()
            update()
            rates[name].append(UPDATES / (time.perf_counter() - begin))
    print("| | updates per second |\n|---|---|")
    for name, each in rates.items():
        print(f"| {name} | {statistics.median(each[1:]):.1f} |")
    ratios = [ours / theirs for ours, theirs in list(zip(*rates.values(), strict=True))[1:]]
    print(f"\nratio: {statistics.median(ratios):.2f} (median of {rounds}, from {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main(sys.argv[1:])
