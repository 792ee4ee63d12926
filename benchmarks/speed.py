"""How fast the parts are, on this machine: environments, acting, and an update by its phases.

    python -m benchmarks.speed --configs tsp_attn
    python -m benchmarks.speed --configs tsp_attn --device cuda --updates 64

Phases are timed from outside, in updates of their own. On a GPU the timer waits for the device before and after every
phase, so that those updates take longer than the ones behind the first table. "Replay sample" is all sampling,
that for the reward updates included.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from config import Config, ConfigError, one_line_errors, parse_command_line
from dreamer import Dreamer
from envs.routing import RULES
from envs.tasks import RoutingTask
from envs.vector import RoutingVectorEnv
from guard import Guard
from parts.acting import Sight
from training import devices, launch
from training.replay import Replay
from training.setup import make_task
from updates import learner

CONFIGS = Path(__file__).parents[1] / "configs.yaml"
ENTRY_KEYS = {"updates": "updates to time (default: 16, or one cycle of model_every if that is more)"}
ENV_COUNTS = (64, 4096)
ENV_SECONDS = 1.0
EPISODES = 3
GUARD_PAIRS = 31


def now(device: torch.device) -> float:
    """The clock, once the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def make_env(config: Config, agent: Dreamer, num_envs: int) -> RoutingVectorEnv:
    """The environments of a run, any number of them."""
    assert isinstance(agent.task, RoutingTask)
    return RoutingVectorEnv(
        agent.task.rules,
        num_envs=num_envs,
        num_nodes=config.nodes,
        device=agent.device,
        generator=agent.generators["environment"],
    )


def env_speed(env: RoutingVectorEnv) -> float:
    """Env steps per second, always to the first open node."""
    obs, _ = env.reset()
    begin, steps = now(env.device), 0
    while (seconds := now(env.device) - begin) < ENV_SECONDS:
        for _ in range(env.num_nodes):
            obs, _, _, _, info = env.step(obs["action_mask"].int().argmax(-1))
            steps += info["decisions"]
    return steps / seconds


def act_and_store(agent: Dreamer, env: RoutingVectorEnv, config: Config) -> tuple[float, Replay]:
    """Env steps per second of the agent acting and storing, and the replay that it filled."""
    obs, info = env.reset()
    spaces = {key: (tuple(value.shape[1:]), value.dtype) for key, value in obs.items()} | {"action": ((), torch.int64)}
    replay = Replay(spaces, num_envs=env.num_envs, capacity=config.replay_capacity, device=agent.device)
    state = agent.initial_state(env.num_envs)
    reward, ended = torch.zeros(env.num_envs, device=agent.device), torch.zeros_like(info["is_first"])
    begin, steps = now(agent.device), 0
    for _ in range(EPISODES * (env.num_nodes + 1)):
        first = info["is_first"]
        action, state = agent.act(Sight.of(obs, info), state, generator=agent.generators["acting"])
        ends = {"is_first": first, "is_last": ended, "is_terminal": ended}
        replay.add({**obs, **ends, "reward": reward, "action": action})
        obs, reward, ended, _, info = env.step(action)
        steps += info["decisions"]
    return steps / (now(agent.device) - begin), replay


def update_seconds(agent: Dreamer, replay: Replay, updates: int) -> float:
    """Seconds per update."""
    begin = now(agent.device)
    for _ in range(updates):
        agent.update(replay, progress=0.1)
    return (now(agent.device) - begin) / updates


def imagined_decisions(agent: Dreamer, replay: Replay) -> int:
    """Decisions that one update imagines."""
    behavior = agent.behavior
    start = behavior.imagination.start(
        agent._sample(replay), None, needs_latent=False, generator=agent.generators["imagination"]
    )
    return start.weight.numel() * behavior.imagination.horizon


def guard_share(agent: Dreamer, replay: Replay, pairs: int) -> float:
    """How much longer an update takes with the guard, as a share; cycles of updates with and without it alternate.

    Each is a whole cycle of `model_every`; the median of the pairs' ratios, as the machine is not always as fast.
    """
    on, off = (replace(agent.guard.settings, enabled=enabled) for enabled in (True, False))
    ratios = []
    for pair in range(pairs):
        seconds = {}
        # What comes first in a pair alternates, too.
        for settings in (on, off) if pair % 2 else (off, on):
            agent.guard.settings = settings
            watch = nullcontext() if settings.enabled else patch.object(agent.guard, "watch_all")
            with watch, nullcontext() if settings.enabled else patch.object(agent.guard, "watch"):
                seconds[settings.enabled] = update_seconds(agent, replay, agent.model_every)
        ratios.append(seconds[True] / seconds[False])
    agent.guard.settings = on
    return statistics.median(ratios) - 1


def phase_seconds(agent: Dreamer, replay: Replay, updates: int) -> dict[str, float]:
    """Seconds per update of each phase."""
    seconds: dict[str, float] = {}
    behavior = agent.behavior
    phases: dict[str, tuple[Any, str]] = {
        "replay sample": (agent, "_sample"),
        "model": (agent.model, "loss"),
        "reward updates": (agent, "_update_reward"),
        "start": (agent.imagination, "start"),
        "encode": (behavior.actor, "tables"),
        "imagine": (behavior, "_roll_out"),
        "reward": (agent.imagination, "reward"),
        "targets": (behavior.returns, "targets"),
        "score": (behavior, "_actor_loss"),
        "critic": (behavior, "_critic_loss"),
        "backward and step": (learner, "update_together"),
    }

    def timed(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = now(agent.device)
            result = function(*args, **kwargs)
            seconds[phase] += (now(agent.device) - begin) / updates
            return result

        return call

    with ExitStack() as patches:
        for phase, (owner, name) in phases.items():
            seconds[phase] = 0.0
            patches.enter_context(patch.object(owner, name, timed(phase, getattr(owner, name))))
        whole = update_seconds(agent, replay, updates)
    return seconds | {"the rest": whole - sum(seconds.values()), "update": whole}


def main(argv: list[str]) -> None:
    """Read the command line, measure, and print two tables."""
    with one_line_errors("speed", *launch.USER_ERRORS):
        command = parse_command_line(argv, config_path=CONFIGS, description=__doc__ or "", entry_keys=ENTRY_KEYS)
        config, asked = command.config, command.entry["updates"]
        if asked is not None and not (asked.isdigit() and int(asked)):
            raise ConfigError(f"--updates is {asked!r}; it takes a whole number, at least 1")
        if config.task not in RULES:
            raise ConfigError(f"task is {config.task!r}; the parts are those of routing: {', '.join(RULES)}")
        updates = int(asked or max(16, config.model_every))
        torch.set_num_threads(config.threads)
        torch.set_flush_denormal(True)
        torch.manual_seed(config.seed)
        device = devices.choose_device(config.device)
        generators = devices.make_generators(config.seed, device)
        agent = Dreamer.of(make_task(config), config, device=device, generators=generators, guard=Guard(device))
    print(f"{device}, {config.threads} thread(s), {updates} updates\n")
    print("| what | per second |\n|---|---|")
    for count in ENV_COUNTS:
        print(f"| env steps, {count} environments | {env_speed(make_env(config, agent, count)):,.0f} |")
    acting, replay = act_and_store(agent, make_env(config, agent, config.envs), config)
    print(f"| env steps with acting, {config.envs} environments | {acting:,.0f} |")
    # The first updates warm the allocator up, and the cycle of model updates begins anew behind them.
    update_seconds(agent, replay, config.model_every)
    whole = update_seconds(agent, replay, updates)
    print(f"| updates | {1 / whole:,.2f} |")
    print(f"| imagined decisions | {imagined_decisions(agent, replay) / whole:,.0f} |\n")
    print("| phase | ms per update | share, % |\n|---|---|---|")
    share = guard_share(agent, replay, GUARD_PAIRS)
    phases = phase_seconds(agent, replay, updates)
    for phase, seconds in phases.items():
        print(f"| {phase} | {1000 * seconds:.2f} | {100 * seconds / phases['update']:.1f} |")
    print(f"\nguard: {100 * share:+.2f} % of an update (median of {GUARD_PAIRS} pairs, with and without)")


if __name__ == "__main__":
    main(sys.argv[1:])
