"""How many steps a second collectors bring from an environment that takes its time, beside one process and a pool.

    python -m benchmarks.collectors

A cart's pole whose steps each wait for 5 ms, as a simulator elsewhere would have it, so that cores that are shared with
other programs change little. Each run is one of dreamer.py, small, with few updates, so that collecting is what takes
time; its speed is that of all steps after the first quarter, when everybody is there. `processes` has each environment
in a process of its own, by `env_processes`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import gymnasium
from gymnasium.envs.classic_control.cartpole import CartPoleEnv

from comparing.runs import METRICS
from system.errors import UserError
from system.terminal import one_line_errors

WAIT = 0.005
ENVS = 8
TASK = "SlowCartPole-v0"
ROOT = Path(__file__).parents[1]


class SlowCartPole(CartPoleEnv):
    """A cart's pole whose steps take a while."""

    def step(self, action: Any) -> Any:
        time.sleep(WAIT)
        return super().step(action)


gymnasium.register(TASK, entry_point=f"{__name__}:SlowCartPole", max_episode_steps=500)


def speed(folder: Path, *flags: str, steps: int) -> float:
    """Env steps a second of a run with these flags.

    Raises:
        UserError: it fails.
    """
    settings = {"task": f"gym_{TASK}", "import": "benchmarks.collectors", "envs": ENVS, "prefill": 200}
    settings |= {"train_ratio": 0.1, "steps": steps, "log_every": max(1, steps // 20), "checkpoint_every": steps}
    settings |= {"eval_every": 0, "eval_episodes": 0, "logdir": folder}
    own = [f"--{key}={value}" for key, value in settings.items()]
    if subprocess.run([sys.executable, "dreamer.py", "--configs", "debug", *own, *flags], cwd=ROOT).returncode:
        raise UserError(f"the run with {' '.join(flags) or 'no flags'} has failed; its message is above")
    rows = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    rows = [row for row in rows if "fps" in row and row["step"] >= steps / 4]
    return (rows[-1]["step"] - rows[0]["step"]) / (rows[-1]["seconds"] - rows[0]["seconds"])


def main(argv: list[str]) -> None:
    """Measure one after another."""
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--counts", default="1,2,4", help="numbers of collectors (1,2,4)")
    parser.add_argument("--steps", type=int, default=4000, help="of each run (4000)")
    given = parser.parse_args(argv)
    ways = {"one process": [], "processes": ["--env_processes", "true"]}
    ways |= {f"{count} collectors": ["--collectors", count] for count in given.counts.split(",")}
    with one_line_errors("collectors"):
        measure(ways, steps=given.steps)


def measure(ways: dict[str, list[str]], *, steps: int) -> None:
    """Print a row for each."""
    print("| environments in | env steps/s |")
    print("|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, flags) in enumerate(ways.items()):
            found = speed(Path(folder) / str(number), *flags, steps=steps)
            print(f"| {name} | {found:.0f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
