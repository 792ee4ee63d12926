"""Whether two states of the code give the same numbers: short runs of every kind, their metrics compared bit for bit.

    python -m benchmarks.same_numbers record logdir/before        # at one commit
    python -m benchmarks.same_numbers record logdir/after         # at another
    python -m benchmarks.same_numbers compare logdir/before logdir/after

A change that is to change nothing changes none of these numbers. Times and speeds are left out, and so are metrics
named with `--except`, where a change is about them; a metric that only one side has counts as a difference.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# No two runs share these.
TIMES = frozenset({"seconds", "fps", "updates_per_second", "checkpoint_seconds", "checkpoint_megabytes", "memory_mb"})
STEPS = 2000
OFTEN = ["--steps", str(STEPS), "--log_every", "200", "--eval_every", "1000"]
# Few environments, so that the prefill ends early and many updates are compared.
ROUTING = [*OFTEN, "--envs", "8", "--batch_size", "8", "--valid_instances", "32", "--eval_instances", "32"]
GYM = [*OFTEN, "--valid_episodes", "2", "--eval_episodes", "4"]
RUNS: dict[str, list[str]] = {
    "tsp_attn": ["dreamer.py", "--configs", "tsp_attn", *ROUTING, "--prefill", "168", "--train_ratio", "8"],
    "tsp_stretch": [
        *("dreamer.py", "--configs", "tsp_few_steps", "tsp_stretch", *ROUTING),
        *("--prefill", "168", "--train_ratio", "8", "--model_every", "4"),
    ],
    "tsp_critic": ["dreamer.py", "--configs", "tsp_critic", *ROUTING, "--prefill", "168", "--train_ratio", "4"],
    "cvrp_attn": ["dreamer.py", "--configs", "cvrp_attn", *ROUTING, "--prefill", "336", "--train_ratio", "8"],
    "cartpole": ["dreamer.py", "--configs", "cartpole", *GYM, "--train_ratio", "16"],
    "switches": ["dreamer.py", "--configs", "switches", *GYM, "--train_ratio", "16"],
    "pixelgrid": ["dreamer.py", "--configs", "pixelgrid", *GYM, "--train_ratio", "8", "--replay_capacity", "4000"],
    "sac_pendulum": ["sac.py", "--configs", "sac_pendulum", *GYM, "--train_ratio", "64"],
    "tsp_sac": ["sac.py", "--configs", "tsp_sac", *ROUTING, "--prefill", "168", "--train_ratio", "8"],
}


def record(folder: Path, names: Sequence[str]) -> None:
    """Make the runs that `folder` doesn't have yet, one after the other."""
    for name in names:
        logdir = folder / name
        if not (logdir / "metrics.jsonl").exists():
            program, *arguments = RUNS[name]
            command = [sys.executable, program, *arguments, "--logdir", str(logdir)]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        print(f"{name}: {len(rows_of(logdir))} rows", flush=True)


def rows_of(logdir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics."""
    return [json.loads(line) for line in (logdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def differences(
    before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], *, ignored: frozenset[str] = frozenset()
) -> list[str]:
    """One line for each metric that differs, with the first step at which it does.

    Args:
        before: rows of metrics.
        after: likewise.
        ignored: metrics that may differ, beside times.
    """
    first: dict[str, str] = {}
    for row, other in zip(_flat(before, ignored), _flat(after, ignored), strict=False):
        for name in sorted({*row, *other}):
            # Written as text, since NaN differs from itself.
            values = [repr(each.get(name, "missing")) for each in (row, other)]
            if values[0] != values[1]:
                first.setdefault(name, f"{name} at step {row.get('step')}: {values[0]} before, {values[1]} after")
    if len(before) != len(after):
        first["rows"] = f"{len(before)} rows before, {len(after)} after"
    return list(first.values())


def _flat(rows: Sequence[dict[str, Any]], ignored: frozenset[str]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMES | ignored} for row in rows]


def main(arguments: Sequence[str]) -> int:
    """Record or compare, as the command line says; 1 where numbers differ."""
    parser = argparse.ArgumentParser(prog="same_numbers", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="make the runs", allow_abbrev=False)
    recording.add_argument("folder", type=Path)
    recording.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="some of the runs")
    comparing = commands.add_parser("compare", help="compare two folders of runs", allow_abbrev=False)
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.add_argument("--except", dest="ignored", nargs="*", default=[], help="metrics that may differ")
    given = parser.parse_args(arguments)
    if given.command == "record":
        record(given.folder, given.only)
        return 0
    names = [name for name in RUNS if (given.before / name).exists() and (given.after / name).exists()]
    if not names:
        print(f"{given.before} and {given.after} have no run in common; record both first", file=sys.stderr)
        return 2
    different = False
    for name in names:
        found = differences(rows_of(given.before / name), rows_of(given.after / name), ignored=frozenset(given.ignored))
        different |= bool(found)
        print(f"{name}: {'the same' if not found else f'{len(found)} metrics differ'}")
        print("".join(f"  {line}\n" for line in found), end="")
    return int(different)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
