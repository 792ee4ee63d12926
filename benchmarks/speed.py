"""How fast an agent is on this machine: environments, acting, and an update by its phases.

    python -m benchmarks.speed --configs tsp_attn
    python -m benchmarks.speed --configs cartpole --json
    python -m benchmarks.speed --configs sac sac_pendulum --agent sac
    python -m benchmarks.speed --configs tsp_attn --device cuda --updates 64

`--json` prints one object instead of tables. Times are by two clocks: the wall's, and the processor's for this process,
which says more where other programs run beside it. Phases are timed from outside, in updates of their own; one that is
part of another counts for itself alone. On a GPU the timer waits for the device before and after every phase, so that
those updates take longer than the others. What is compiled into one graph is one phase.

The share of the peak is that of an update's matrix products, as counted, in what large products of the type that the
config computes in reach in the same process.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.timing import PhaseTimer, Seconds, most_memory, name_of, now, operations, peak
from config import Config, ConfigError, one_line_errors, parse_command_line
from dreamer import Dreamer
from envs.gym_vector import GymVectorEnv
from envs.routing import RULES
from envs.tasks import ACTION_MASK, ActionSpec
from envs.vector import RoutingVectorEnv
from guard import Guard
from parts.acting import Sight
from sac import SAC
from settings.run import RunSettings
from training import devices, launch
from training.replay import Replay
from training.replay_room import make_replay
from training.setup import make_setup
from updates import learner

CONFIGS = Path(__file__).parents[1] / "configs.yaml"
AGENTS: dict[str, Any] = {"dreamer": Dreamer, "sac": SAC}
ENTRY_KEYS = {
    "agent": "dreamer (the default) or sac",
    "updates": "updates to time (default: 16, or what fits into 15 seconds, in whole cycles of model_every)",
}
JSON_FLAG = "--json"
# Routing is stepped as tensors, gymnasium's environments one by one.
TENSOR_COUNTS, GYM_COUNTS = (1, 8, 64, 512, 4096), (1, 8, 64)
# How long each number of environments is watched, at least, and the most that one episode of all of them may take.
ENV_SECONDS, MOST_SECONDS = 1.0, 5.0
UPDATES, UPDATE_SECONDS = 16, 15.0
# Sequences of each environment in replay.
SEQUENCES = 3
GUARD_PAIRS, LEAST_PAIRS, GUARD_SECONDS = 31, 3, 20.0


class EnvFigures(NamedTuple):
    """Env steps per second of so many environments: alone, and with the agent acting and storing."""

    environments: int
    alone: float
    acting: float


class UpdateFigures(NamedTuple):
    """What one update takes.

    Attributes:
        updates: how many were timed.
        seconds: of each.
        first: of the first cycle of `model_every` updates, which also prepares and, on request, compiles.
        imagined: decisions that each imagines.
        flop: floating-point operations of each.
        peak: floating-point operations a second of large products.
        share: of the peak, by the time that the device worked.
        memory: the most megabytes of host and device, in acting with the config's environments and in updates.
        memory_before: likewise, before there was an agent.
    """

    updates: int
    seconds: Seconds
    first: Seconds
    imagined: float
    flop: float
    peak: float
    share: float
    memory: dict[str, float]
    memory_before: dict[str, float]


class GuardFigures(NamedTuple):
    """How much longer an update takes with the guard, as a share, and of how many pairs this is the median."""

    share: float
    pairs: int


def make_env(config: Config, agent: Any, num_envs: int) -> RoutingVectorEnv | GymVectorEnv:
    """The environments of a run, any number of them."""
    return make_setup(_resized(config, agent, num_envs), agent.device).make_env(agent.generators)


def _resized(config: Config, agent: Any, num_envs: int) -> Config:
    """The same config for another number of environments, with room in replay for what is asked of it here."""
    rows = num_envs * 2 * SEQUENCES * _round(agent)
    return config.replace(envs=num_envs, steps=rows, prefill=rows, replay_capacity=rows)


def _round(agent: Any) -> int:
    """Steps of every environment that are made at a time: an episode of routing, or a few."""
    return max(16, agent.batch_length)


def any_action(spec: ActionSpec, obs: dict[str, Tensor]) -> Tensor:
    """An action for every environment, and a legal one: the first or the middle."""
    if ACTION_MASK in obs:
        return obs[ACTION_MASK].int().argmax(-1)
    some = next(iter(obs.values()))
    return torch.zeros((some.shape[0], *spec.shape), dtype=spec.dtype, device=some.device)


class Collector:
    """An agent that acts in environments and stores what it lives through, as a run does."""

    def __init__(self, agent: Any, env: RoutingVectorEnv | GymVectorEnv, config: Config) -> None:
        self.agent, self.env, self.scale = agent, env, config.reward_scale
        self.obs, self.info = env.reset()
        spec = agent.task.actions
        spaces = {key: (tuple(value.shape[1:]), value.dtype) for key, value in self.obs.items()}
        spaces["action"] = (spec.shape, spec.dtype)
        settings = RunSettings.of(config.replace(envs=env.num_envs))
        self.replay: Replay = make_replay(settings, spaces, memory=agent.memory_spaces, device=agent.device)
        self.state = agent.initial_state(env.num_envs)
        self.reward = torch.zeros(env.num_envs, device=agent.device)
        self.is_last = self.is_terminal = torch.zeros(env.num_envs, dtype=torch.bool, device=agent.device)

    def step(self) -> int:
        """One step of every environment; how many of them decided anything."""
        first = self.info["is_first"]
        sight = Sight.of(self.obs, self.info)
        action, self.state = self.agent.act(sight, self.state, generator=self.agent.generators["acting"])
        ends = {"is_first": first, "is_last": self.is_last, "is_terminal": self.is_terminal}
        row = {**self.obs, **ends, "reward": self.scale * self.reward, "action": action}
        self.replay.add({**row, **self.agent.memory(self.state)})
        self.obs, self.reward, self.is_terminal, truncated, self.info = self.env.step(action)
        self.is_last = self.is_terminal | truncated
        return self.info["decisions"]


def act_and_store(
    agent: Any,
    env: RoutingVectorEnv | GymVectorEnv,
    config: Config,
    *,
    sequences: int = SEQUENCES,
    seconds: float = 0.0,
) -> tuple[float, Replay]:
    """Env steps per second of the agent acting and storing, and the replay that it filled.

    Args:
        agent: acts.
        env: in these.
        config: says how large the replay is.
        sequences: how many of each environment to store, at least.
        seconds: how long to act, at least.
    """
    collector = Collector(agent, env, config)
    begin, steps, rounds = now(agent.device), 0, 0
    while rounds < sequences or (now(agent.device) - begin).wall < seconds:
        steps += sum(collector.step() for _ in range(_round(agent)))
        rounds += 1
    return steps / (now(agent.device) - begin).wall, collector.replay


def env_speed(env: RoutingVectorEnv | GymVectorEnv, agent: Any) -> float:
    """Env steps per second without an agent."""
    obs, _ = env.reset()
    begin, steps = now(env.device), 0
    while (seconds := (now(env.device) - begin).wall) < ENV_SECONDS:
        for _ in range(_round(agent)):
            obs, _, _, _, info = env.step(any_action(agent.task.actions, obs))
            steps += info["decisions"]
    return steps / seconds


def environments(config: Config, agent: Any) -> Iterator[EnvFigures]:
    """The figures of each number of environments, until acting for an episode in all of them would take too long."""
    counts = TENSOR_COUNTS if config.task in RULES else GYM_COUNTS
    acting = math.inf
    for count in counts:
        # That many more environments take that many times as long, at most.
        if count * _round(agent) / acting > MOST_SECONDS:
            return
        with closing(make_env(config, agent, count)) as env:
            alone = env_speed(env, agent)
            sized = _resized(config, agent, count)
            acting, _ = act_and_store(agent, env, sized, sequences=1, seconds=ENV_SECONDS)
        yield EnvFigures(count, alone, acting)


def update_seconds(agent: Any, replay: Replay, updates: int) -> Seconds:
    """Of one update."""
    begin = now(agent.device)
    for _ in range(updates):
        agent.update(replay, progress=0.1)
    return (now(agent.device) - begin) / updates


@contextmanager
def counting_decisions(agent: Any) -> Iterator[list[int]]:
    """A list that gets, of every update made within, how many decisions it imagined."""
    counts: list[int] = []
    if not isinstance(agent, Dreamer):
        yield counts
        return
    roll_out = agent.behavior._roll_out

    def counted(*args: Any, **kwargs: Any) -> Any:
        trajectory = roll_out(*args, **kwargs)
        # Imagination may end before its horizon.
        counts.append(trajectory.survival.numel())
        return trajectory

    with patch.object(agent.behavior, "_roll_out", counted):
        yield counts


def cycle(agent: Any) -> int:
    """Updates after which the same kinds of updates come again."""
    return getattr(agent, "model_every", 1)


def measure_updates(
    agent: Any, replay: Replay, *, updates: int | None, dtype: torch.dtype, before: dict[str, float]
) -> UpdateFigures:
    """Make updates and measure them.

    Args:
        agent: learns.
        replay: from this.
        updates: how many to time; None for `UPDATES`, or as many as fit into `UPDATE_SECONDS`, in whole cycles.
        dtype: the type that the agent computes its products in.
        before: the most memory before there was an agent.
    """
    # The first updates warm the allocator up, and the cycle of model updates begins anew behind them.
    first = update_seconds(agent, replay, cycle(agent))
    if updates is None:
        usual = update_seconds(agent, replay, cycle(agent))
        fitting = int(UPDATE_SECONDS / (usual.wall * cycle(agent))) * cycle(agent)
        updates = max(cycle(agent), min(UPDATES, fitting))
    with counting_decisions(agent) as decisions:
        seconds = update_seconds(agent, replay, updates)
    memory = most_memory(agent.device)
    flop = operations(lambda: update_seconds(agent, replay, cycle(agent))) / cycle(agent)
    best = peak(dtype, agent.device)
    return UpdateFigures(
        updates=updates,
        seconds=seconds,
        first=first,
        imagined=sum(decisions) / updates,
        flop=flop,
        peak=best,
        share=flop / best / seconds.of_work(agent.device),
        memory=memory,
        memory_before=before,
    )


def guard_figures(agent: Any, replay: Replay, pairs: int) -> GuardFigures:
    """How much longer an update takes with the guard; cycles of updates with and without it alternate.

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
                seconds[settings.enabled] = update_seconds(agent, replay, cycle(agent)).of_work(agent.device)
        ratios.append(seconds[True] / seconds[False])
    agent.guard.settings = on
    return GuardFigures(statistics.median(ratios) - 1, pairs)


def phases_of(agent: Any, replay: Replay) -> dict[str, tuple[Any, str]]:
    """What computes each phase of an update, as an object and a method."""
    sampling = {"replay sample": (replay, "sample")}
    applying = {"backward and step": (learner, "update_together")}
    if not isinstance(agent, Dreamer):
        return {**sampling, "losses": (agent.soft, "losses"), **applying}
    behavior = agent.behavior
    before = {
        **sampling,
        "observe": (agent.model, "observe"),
        "model": (agent.model, "loss"),
        "reward updates": (agent, "_update_reward"),
        "start": (agent.imagination, "start"),
        "encode": (behavior.actor, "tables"),
        "imagine": (behavior, "_roll_out"),
    }
    judging = {
        "reward": (agent.imagination, "reward"),
        "targets": (behavior.returns, "targets"),
        "worth": (behavior, "worth"),
        "score": (behavior, "_actor_loss"),
        "critic": (behavior, "_critic_loss"),
    }
    if agent.compiled != "none":
        # One graph, in which no clock can be read.
        judging = {"losses": (behavior, "losses_of")}
    return {**before, **judging, "replayed value": (behavior, "replay_value_loss"), **applying}


def phase_seconds(agent: Any, replay: Replay, updates: int) -> dict[str, Seconds]:
    """Of each phase of an update, with the rest and the whole of it."""
    timer = PhaseTimer(agent.device)
    with ExitStack() as patches:
        for phase, (owner, name) in phases_of(agent, replay).items():
            function: Callable[..., Any] = timer.timed(phase, getattr(owner, name))
            patches.enter_context(patch.object(owner, name, function))
        whole = update_seconds(agent, replay, updates)
    parts = {phase: seconds / updates for phase, seconds in timer.seconds.items() if seconds.wall}
    return {**parts, "the rest": whole - sum(parts.values(), Seconds()), "update": whole}


class Report(NamedTuple):
    """All that is measured of an agent.

    `guard` is None where too few pairs fit into `GUARD_SECONDS`, and where parts are compiled, which would be compiled
    anew without it.
    """

    machine: dict[str, Any]
    environments: list[EnvFigures]
    update: UpdateFigures
    phases: dict[str, Seconds]
    guard: GuardFigures | None


def measure(agent: Any, config: Config, *, updates: int | None, before: dict[str, float]) -> Report:
    """All figures of an agent; updates come first, since the most memory is theirs."""
    sized = _resized(config, agent, config.envs)
    with closing(make_env(config, agent, config.envs)) as env:
        _, replay = act_and_store(agent, env, sized)
    if replay.device != agent.device:
        agent.generators["replay"] = devices.make_generator(config.seed, "replay", replay.device)
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    update = measure_updates(agent, replay, updates=updates, dtype=dtype, before=before)
    phases = phase_seconds(agent, replay, update.updates)
    compiled = getattr(agent, "compiled", "none")
    pairs = min(GUARD_PAIRS, int(GUARD_SECONDS / (2 * cycle(agent) * update.seconds.wall)))
    measured = compiled == "none" and pairs >= LEAST_PAIRS
    guard = guard_figures(agent, replay, pairs) if measured else None
    machine = {
        "device": str(agent.device),
        "name": name_of(agent.device),
        "threads": config.threads,
        "torch": torch.__version__,
        "precision": config.precision,
        "compile": compiled,
    }
    return Report(machine, list(environments(config, agent)), update, phases, guard)


def as_json(report: Report) -> str:
    """One object; times in seconds, memory in megabytes, shares of 1."""
    update = report.update._asdict()
    return json.dumps(
        {
            "machine": report.machine,
            "environments": [each._asdict() for each in report.environments],
            "update": {key: asdict(value) if isinstance(value, Seconds) else value for key, value in update.items()},
            "phases": {phase: asdict(seconds) for phase, seconds in report.phases.items()},
            "guard": report.guard and report.guard._asdict(),
        },
        indent=2,
        allow_nan=False,
    )


def as_tables(report: Report) -> str:
    """Three tables for a page."""
    machine, update = report.machine, report.update
    lines = [
        f"{machine['name']} ({machine['device']}), {machine['threads']} thread(s), PyTorch {machine['torch']},"
        f" {machine['precision']}, compile: {machine['compile']}, {update.updates} updates",
        "\n| environments | env steps per second | with acting and storing |\n|---|---|---|",
        *(f"| {each.environments:,} | {each.alone:,.0f} | {each.acting:,.0f} |" for each in report.environments),
        "\n| one update | |\n|---|---|",
        f"| ms, wall clock | {1000 * update.seconds.wall:,.1f} |",
        f"| ms, processor | {1000 * update.seconds.processor:,.1f} |",
        f"| ms, wall clock, each of the first cycle | {1000 * update.first.wall:,.1f} |",
        f"| updates per second | {1 / update.seconds.wall:,.2f} |",
    ]
    if update.imagined:
        lines += [
            f"| imagined decisions | {update.imagined:,.0f} |",
            f"| imagined decisions per second | {update.imagined / update.seconds.wall:,.0f} |",
        ]
    lines += [
        f"| GFLOP | {update.flop / 1e9:,.3f} |",
        f"| peak of products, GFLOP per second | {update.peak / 1e9:,.0f} |",
        f"| share of the peak, % | {100 * update.share:.1f} |",
        *(f"| peak memory of the {part}, MB | {size:,.0f} |" for part, size in update.memory.items()),
        *(f"| before there was an agent, {part}, MB | {size:,.0f} |" for part, size in update.memory_before.items()),
        "\n| phase | ms, wall clock | ms, processor | share, % |\n|---|---|---|---|",
    ]
    whole = report.phases["update"]
    for phase, seconds in report.phases.items():
        share = 100 * seconds.wall / whole.wall
        lines.append(f"| {phase} | {1000 * seconds.wall:.2f} | {1000 * seconds.processor:.2f} | {share:.1f} |")
    if report.guard is not None:
        share, pairs = report.guard
        lines.append(f"\nguard: {100 * share:+.2f} % of an update (median of {pairs} pairs, with and without)")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Read the command line, measure, and print tables or JSON."""
    with one_line_errors("speed", *launch.USER_ERRORS):
        arguments = [argument for argument in argv if argument != JSON_FLAG]
        command = parse_command_line(arguments, config_path=CONFIGS, description=__doc__ or "", entry_keys=ENTRY_KEYS)
        config, asked, name = command.config, command.entry["updates"], command.entry["agent"] or "dreamer"
        if asked is not None and not (asked.isdecimal() and int(asked)):
            raise ConfigError(f"--updates is {asked!r}; it takes a whole number, at least 1")
        if name not in AGENTS:
            raise ConfigError(f"--agent is {name!r}; it takes one of {', '.join(AGENTS)}")
        device = devices.prepare_torch(config)
        before = most_memory(device)
        setup = make_setup(config, device)
        setup.close()
        agent = AGENTS[name].of(
            setup.task,
            config,
            device=device,
            generators=devices.make_generators(config.seed, device),
            guard=Guard(device),
        )
        report = measure(agent, config, updates=None if asked is None else int(asked), before=before)
    print(as_json(report) if len(arguments) < len(argv) else as_tables(report))


if __name__ == "__main__":
    main(sys.argv[1:])
