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
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.collecting import EnvFigures, act_and_store, environments, make_env
from benchmarks.flags import CONFIGS
from benchmarks.timing import PhaseTimer, Seconds, most_memory, name_of, now, operations, peak
from config import Config, ConfigError, one_line_errors, parse_command_line
from dreamer import Dreamer
from guard import Guard
from sac import SAC
from training import devices, launch
from training.replay import Replay
from training.setup import make_setup
from updates import learner

AGENTS: dict[str, Any] = {"dreamer": Dreamer, "sac": SAC}
ENTRY_KEYS = {
    "agent": "dreamer (the default) or sac",
    "updates": "updates to time (default: 16, or what fits into 15 seconds, in whole cycles of model_every)",
}
JSON_FLAG = "--json"
UPDATES, UPDATE_SECONDS = 16, 15.0
GUARD_PAIRS, LEAST_PAIRS, GUARD_SECONDS = 31, 3, 20.0


class UpdateFigures(NamedTuple):
    """What one update takes.

    Attributes:
        updates: how many were timed.
        seconds: of each.
        first: of the first cycle of `model_every` updates, which also prepares and, on request, compiles.
        imagined: decisions that each imagines before all episodes are over.
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


def update_seconds(agent: Any, replay: Replay, updates: int) -> Seconds:
    """Of one update."""
    begin = now(agent.device)
    for _ in range(updates):
        agent.update(replay, progress=0.1)
    return (now(agent.device) - begin) / updates


@contextmanager
def counting_decisions(agent: Any) -> Iterator[list[Tensor]]:
    """A list that gets, of every update made within, how many decisions it imagined before all episodes were over."""
    counts: list[Tensor] = []
    if not isinstance(agent, Dreamer):
        yield counts
        return
    roll_out = agent.behavior._roll_out

    def counted(*args: Any, **kwargs: Any) -> Any:
        trajectory = roll_out(*args, **kwargs)
        # Where episodes differ in length, the last steps before the horizon may be those of none.
        steps = (trajectory.survival > 0).flatten(0, 1).any(0).sum()
        counts.append(steps * trajectory.survival[:, :, 0].numel())
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
        imagined=sum(map(int, decisions)) / updates,
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
    with closing(make_env(config, agent, config.envs)) as env:
        _, replay = act_and_store(agent, env, config)
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
