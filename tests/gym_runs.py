"""Short runs on gymnasium tasks, with networks too small to learn anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dreamer
from comparing.runs import METRICS

STEPS, ENVS = 200, 4
COMMAND = [
    *("--configs", "debug", "--device", "cpu", "--steps", str(STEPS), "--envs", str(ENVS), "--prefill", "48"),
    *("--train_ratio", "4", "--log_every", "50", "--eval_every", "200", "--checkpoint_every", "100"),
    *("--valid_episodes", "2", "--eval_episodes", "3"),
]

Rows = list[dict[str, Any]]


def train(logdir: Path, env_id: str, *arguments: str) -> Rows:
    """A run in this process, and its metrics."""
    dreamer.main([*COMMAND, "--task", f"gym_{env_id}", *arguments, "--logdir", str(logdir)])
    return [json.loads(line) for line in (logdir / METRICS).read_text().splitlines()]
