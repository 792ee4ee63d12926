"""What a run of several ranks costs, and what a model of its costs says: of 1, 2 and 4 here, and of more elsewhere.

    python -m benchmarks.ranks --configs tsp_attn
    python -m benchmarks.ranks --configs tsp_attn --envs 256 --batch_size 256 --counts 1,2,4

A step of all environments costs a + b x environments, an update c + d x batch: both from one process that has the
whole of them and one that has a quarter. Ranks exchange a number with every step at the most, and the gradients with
every update. Times are of the processor, summed over a rank's threads, since cores may be shared with other programs;
exchanges are timed on the wall, the fastest of many.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any, NamedTuple

import torch

import dreamer
from benchmarks.collecting import Collector
from benchmarks.timing import now
from config import ConfigError, parse_command_line
from dreamer import Dreamer
from guard import Guard
from system.ranks import here, joined
from training.devices import make_generators
from training.setup import make_setup
from training.shares import SHARED_KEYS, share_of

FLAGS = {"counts": "numbers of ranks, 1 to begin with (1,2,4)", "updates": "how many are timed (8)"}
# The smaller of the two processes that the model is taken from has this part of all.
PART = 4
EXCHANGES = 50


class Costs(NamedTuple):
    """Of one rank: seconds a step of all its environments, an update, a number exchanged, the gradients exchanged.

    `megabytes` are those of the gradients.
    """

    step: float
    update: float
    number: float
    gradients: float
    megabytes: float


def fastest(work: Callable[[], Any]) -> float:
    """Wall seconds of the fastest of many times."""
    found = []
    for _ in range(EXCHANGES):
        begin = time.perf_counter()
        work()
        found.append(time.perf_counter() - begin)
    return min(found)


def measure(argv: list[str], *, updates: int, part: int = 1) -> Costs:
    """The costs of this rank, of whose share only a `part`-th is taken."""
    config = dreamer.read_command(argv).config
    config = share_of(config, here())
    config = config.replace(**{key: config[key] // part for key in SHARED_KEYS})
    device = torch.device("cpu")
    torch.set_num_threads(config.threads)
    made = make_setup(config, device)
    generators = make_generators(config.seed, device)
    agent = Dreamer.of(made.task, config, device=device, generators=generators, guard=Guard(device))
    with closing(made.make_env(generators)) as env:
        collector = Collector(agent, env, config)
        steps = 3 * max(16, agent.batch_length)
        collector.step()
        begin = now(device)
        for _ in range(steps):
            collector.step()
        step = (now(device) - begin).processor / steps
        # Whole cycles of updates with and without the world model's.
        cycle = agent.model_every
        agent.update(collector.replay, progress=0.0)
        begin = now(device)
        for _ in range(-(-updates // cycle) * cycle):
            agent.update(collector.replay, progress=0.0)
        update = (now(device) - begin).processor / (-(-updates // cycle) * cycle)
    parameters = [p for each in agent.learner.optimizers.values() for p in each.parameters]
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    return Costs(
        step,
        update,
        fastest(lambda: here().add(1)),
        fastest(lambda: here().average(gradients, [])),
        sum(parameter.numel() * parameter.element_size() for parameter in parameters) / 1e6,
    )


def predicted(whole: Costs, part: Costs, count: int) -> tuple[float, float]:
    """Seconds of a step and of an update's own work on one of `count` ranks, by a straight line through two points."""
    share = 1 / count

    def line(large: float, small: float) -> float:
        slope = (large - small) / (1 - 1 / PART)
        return large - slope * (1 - share)

    return line(whole.step, part.step), line(whole.update, part.update)


def on_ranks(argv: list[str], *, count: int, part: int) -> Costs:
    """The mean costs of so many ranks, each a process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANKS_PART": str(part)}
    command = [sys.executable, "-m", "benchmarks.ranks", *argv]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    outputs = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise ConfigError(f"{count} ranks could not be measured; their messages are above")
    return Costs(*json.loads(outputs[0].splitlines()[-1]))


def main(argv: list[str]) -> None:
    """Measure, as a rank or of ranks that are started."""
    command = parse_command_line(argv, config_path=dreamer.CONFIGS, description=__doc__ or "", entry_keys=FLAGS)
    counts = [int(text) for text in (command.entry["counts"] or "1,2,4").split(",")]
    updates = int(command.entry["updates"] or 8)
    own = [f"--configs={name}" for name in command.sections]
    own += [f"--{key}={value}" for key, value in command.config.flat().items() if key in command.overrides]
    if "RANKS_PART" in os.environ:
        with joined() as ranks:
            every = ranks.collect(measure(own, updates=updates, part=int(os.environ["RANKS_PART"])))
        if ranks.is_first:
            print(json.dumps([sum(values) / len(values) for values in zip(*every, strict=True)]))
        return
    whole, part = (on_ranks(argv, count=1, part=part) for part in (1, PART))
    print("| ranks | ms a step | predicted | ms an update | predicted | ms for gradients | ms for a number |")
    print("|---|---|---|---|---|---|---|")
    for count in counts:
        found = whole if count == 1 else on_ranks(argv, count=count, part=1)
        step, update = predicted(whole, part, count)
        figures = (found.step, step, found.update, update, found.gradients, found.number)
        print(f"| {count} | " + " | ".join(f"{1e3 * each:.3g}" for each in figures) + " |")
    print(f"gradients: {whole.megabytes:.2f} MB")


if __name__ == "__main__":
    main(sys.argv[1:])
