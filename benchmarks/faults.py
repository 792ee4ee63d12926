"""Breaks training on purpose: a long run under random faults, and what the suite of faults finds without the guard.

    python -m benchmarks.faults soak --configs tsp_attn --faults 200 --seed 0 --logdir logdir/soak
    python -m benchmarks.faults off

`soak` takes dreamer.py's arguments beside `--faults`. The same seed gives the same faults, in a run that is not
interrupted. `off` runs tests/faults with `--guard.enabled false` and says how many of the faults then do harm.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import checkpoint
import dreamer
from comparing.runs import METRICS
from config import ConfigError, one_line_errors
from dreamer import Dreamer

ROOT = Path(__file__).parents[1]
# The environment variable that switches the guard off in tests/faults.
GUARD_OFF = "FAULTS_WITHOUT_GUARD"
# Faults come at random moments of this share of a run.
FIRST, LAST = 0.02, 0.9
# Every kind of fault comes this often. Further faults are of kinds that need no way back to the last good state, since
# each way back loses the updates since then.
LEAST = 5

# Entered around one update of an agent.
Fault = Callable[[Dreamer, random.Random], Any]


@torch.no_grad()
def _write(tensor: Tensor, value: float, rng: random.Random) -> None:
    tensor.view(-1)[rng.randrange(tensor.numel())] = value


def in_batch(key: str, value: float) -> Fault:
    """One number of a replayed key, in each batch of the update: rewards of a step, a coordinate of an episode."""

    @contextmanager
    def fault(agent: Dreamer, rng: random.Random) -> Iterator[None]:
        sample = agent._sample

        def corrupted(replay: Any) -> dict[str, Tensor]:
            batch = sample(replay)
            values = batch[key].clone(memory_format=torch.contiguous_format)
            rows = values[rng.randrange(len(values))].flatten(1) if values.dim() > 2 else values
            rows[:, rng.randrange(rows.shape[1])] = value
            return {**batch, key: values}

        with patch.object(agent, "_sample", corrupted):
            yield

    return fault


def empty_masks() -> Fault:
    """No action is legal in some rows of the batch."""

    @contextmanager
    def fault(agent: Dreamer, rng: random.Random) -> Iterator[None]:
        sample = agent._sample

        def corrupted(replay: Any) -> dict[str, Tensor]:
            batch = sample(replay)
            mask = batch["action_mask"].clone()
            mask[rng.randrange(len(mask))] = False
            return {**batch, "action_mask": mask}

        with patch.object(agent, "_sample", corrupted):
            yield

    return fault


def in_gradient(group: str) -> Fault:
    """NaN in the gradient of one parameter."""

    @contextmanager
    def fault(agent: Dreamer, rng: random.Random) -> Iterator[None]:
        optimizer = agent.learner.optimizers[group]
        apply = optimizer.apply

        def corrupted(gradients: Any, **arguments: Any) -> Any:
            gradients = list(gradients)
            index = rng.choice([i for i, each in enumerate(gradients) if each is not None])
            gradients[index] = gradients[index].clone(memory_format=torch.contiguous_format)
            _write(gradients[index], math.nan, rng)
            return apply(gradients, **arguments)

        with patch.object(optimizer, "apply", corrupted):
            yield

    return fault


def in_moments(group: str, kind: str, value: float) -> Fault:
    """One entry of an optimiser's first or second moments."""
    names = {"first": ("exp_avg", "momentum"), "second": ("exp_avg_sq", "square")}[kind]

    @contextmanager
    def fault(agent: Dreamer, rng: random.Random) -> Iterator[None]:
        moments = agent.learner.optimizers[group].moments()
        chosen = [tensor for name, tensor in moments.items() if name.endswith(names)]
        _write(rng.choice(chosen), value, rng)
        yield

    return fault


def in_parameter(group: str, value: float) -> Fault:
    """One entry of a parameter."""

    @contextmanager
    def fault(agent: Dreamer, rng: random.Random) -> Iterator[None]:
        _write(rng.choice(agent.learner.optimizers[group].parameters), value, rng)
        yield

    return fault


def in_slow_critic() -> Fault:
    """NaN in the slow critic."""

    @contextmanager
    def fault(agent: Dreamer, rng: random.Random) -> Iterator[None]:
        _write(rng.choice(list(agent.behavior.slow_critic.parameters())), math.nan, rng)
        yield

    return fault


def in_return_scale() -> Fault:
    """NaN in the running statistic of returns."""

    @contextmanager
    def fault(agent: Dreamer, rng: random.Random) -> Iterator[None]:
        _write(agent.behavior.scale.high, math.nan, rng)
        yield

    return fault


def in_advantages(value: float) -> Fault:
    """Advantages that are not finite, as an imagined reward would make them."""

    @contextmanager
    def fault(agent: Dreamer, rng: random.Random) -> Iterator[None]:
        reward = agent.imagination.reward

        def corrupted(*arguments: Any) -> Tensor:
            rewards = reward(*arguments).clone(memory_format=torch.contiguous_format)
            _write(rewards, value, rng)
            return rewards

        with patch.object(agent.imagination, "reward", corrupted):
            yield

    return fault


def in_noise() -> Fault:
    """NaN in the noise that the latents are drawn with."""

    @contextmanager
    def fault(agent: Dreamer, rng: random.Random) -> Iterator[None]:
        noise = agent._noise

        def corrupted(batch: dict[str, Tensor], role: str) -> Tensor:
            values = noise(batch, role)
            _write(values, math.nan, rng)
            return values

        with patch.object(agent, "_noise", corrupted):
            yield

    return fault


GROUPS = ("model", "actor", "critic")
# Faults after which skipping the update is enough, if that.
PASSING: dict[str, Fault] = {
    "NaN in a coordinate": in_batch("coords", math.nan),
    "infinity in a coordinate": in_batch("coords", math.inf),
    "NaN in a replayed reward": in_batch("reward", math.nan),
    "infinity in a replayed reward": in_batch("reward", math.inf),
    "a replayed reward of -2.2e6": in_batch("reward", -2.2e6),
    "a replayed reward of 1e30": in_batch("reward", 1e30),
    "NaN in an imagined reward": in_advantages(math.nan),
    "an imagined reward of -infinity": in_advantages(-math.inf),
    "rows without a legal action": empty_masks(),
    "NaN in the noise of the latents": in_noise(),
    **{f"NaN in a gradient of the {group}": in_gradient(group) for group in GROUPS},
}
# Faults after which the last good state has to be taken up again.
LASTING: dict[str, Fault] = {
    **{f"NaN in a parameter of the {group}": in_parameter(group, math.nan) for group in GROUPS},
    **{f"infinity in second moments of the {group}": in_moments(group, "second", math.inf) for group in GROUPS},
    **{f"NaN in first moments of the {group}": in_moments(group, "first", math.nan) for group in GROUPS},
    "a parameter of 1e30 in the actor": in_parameter("actor", 1e30),
    "NaN in the slow critic": in_slow_critic(),
    "NaN in the return statistics": in_return_scale(),
}
KINDS = PASSING | LASTING


def plan(count: int, rng: random.Random) -> list[tuple[float, str]]:
    """When, as a share of the run, which fault comes: every kind `LEAST` times, and then those that pass."""
    kinds = [*KINDS] * LEAST
    kinds += [rng.choice([*PASSING]) for _ in range(count - len(kinds))]
    rng.shuffle(kinds)
    return list(zip(sorted(rng.uniform(FIRST, LAST) for _ in kinds), kinds, strict=True))


@contextmanager
def injecting(planned: list[tuple[float, str]], rng: random.Random) -> Iterator[Counter[str]]:
    """Every Dreamer's updates meet the planned faults, one each; yields how many came, by kind."""
    update, waiting, came = Dreamer.update, list(planned), Counter[str]()

    def with_fault(agent: Dreamer, replay: Any, *, progress: float) -> dict[str, Tensor]:
        if not waiting or progress < waiting[0][0]:
            return update(agent, replay, progress=progress)
        _, kind = waiting.pop(0)
        came[kind] += 1
        with KINDS[kind](agent, rng):
            return update(agent, replay, progress=progress)

    with patch.object(Dreamer, "update", with_fault):
        yield came


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested dicts and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_of(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_of(part)


def is_finite(logdir: Path) -> bool:
    """Whether weights, moments and statistics in a run's checkpoint are finite."""
    agent = checkpoint.load(logdir / checkpoint.LATEST, torch.device("cpu"))["agent"]
    return all(bool(tensor.isfinite().all()) for tensor in tensors_of(agent))


def soak(arguments: list[str]) -> None:
    """Train under random faults, and print a summary."""
    count = _count(_take(arguments, "--faults", "200"), "--faults", least=1)
    # Only looked at: dreamer.py takes them, too.
    seed, logdir = _take(list(arguments), "--seed", "0"), _take(list(arguments), "--logdir", "logdir/soak")
    if "--logdir" not in arguments:
        arguments += ["--logdir", logdir]
    rng = random.Random(_count(seed, "--seed", least=0))
    with ExitStack() as stack:
        came = stack.enter_context(injecting(plan(count, rng), rng))
        dreamer.main(arguments)
    print("| fault | times |\n|---|---|")
    for kind in KINDS:
        print(f"| {kind} | {came[kind]} |")
    rows = [json.loads(line) for line in (Path(logdir) / METRICS).read_text().splitlines()]
    latest: dict[str, Any] = {}
    for row in rows:
        latest |= row
    skips = ", ".join(f"{group} {latest[f'{group}_skips_max']:.0f}" for group in GROUPS)
    print(f"\n{came.total()} faults, at least {min(came[kind] for kind in KINDS)} of each of {len(KINDS)} kinds")
    print(f"updates skipped: {skips}; returns to the last good state: {latest['rollbacks_max']:.0f}")
    print(f"parameters and moments finite: {'yes' if is_finite(Path(logdir)) else 'NO'}")
    figures = {name: value for name, value in latest.items() if name in ("valid_gap", "eval_gap", "eval_return")}
    print("at the end: " + ", ".join(f"{name} {value}" for name, value in figures.items()))


def off(arguments: list[str]) -> None:
    """Run the suite of faults without the guard, and print which of them do harm then."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfp", "--tb=no", "-p", "no:cacheprovider", *arguments]
    result = subprocess.run(
        [*command, "tests/faults"], cwd=ROOT, env={**os.environ, GUARD_OFF: "1"}, capture_output=True, text=True
    )
    lines = result.stdout.splitlines()
    failed = [line.split("::", 1)[1].split(" - ")[0] for line in lines if line.startswith("FAILED")]
    passed = [line.split("::", 1)[1] for line in lines if line.startswith("PASSED")]
    for title, names in (("harmed", failed), ("survived all the same", passed)):
        print(f"{title}: {len(names)}")
        for name in names:
            print(f"  {name}")


def _take(arguments: list[str], flag: str, default: str) -> str:
    """The value of a flag, which is taken out of the arguments."""
    if flag not in arguments:
        return default
    index = arguments.index(flag)
    if index + 1 == len(arguments):
        raise ConfigError(f"{flag} needs a value")
    _, value = arguments[index : index + 2]
    del arguments[index : index + 2]
    return value


def _count(text: str, flag: str, *, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{flag} is {text!r}; it takes a whole number, at least {least}")
    return int(text)


def main(argv: list[str]) -> None:
    """Read the command line."""
    commands: dict[str, Callable[[list[str]], None]] = {"soak": soak, "off": off}
    if not argv or argv[0] not in commands:
        print(__doc__, file=sys.stderr)
        raise SystemExit(2)
    with one_line_errors("faults"):
        commands[argv[0]](argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
