"""Short runs of `dreamer.py`, and what they leave behind."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

import checkpoint
import dreamer
from comparing.runs import METRICS

CPU = torch.device("cpu")
NODES = 6
STEPS, CHECKPOINT_EVERY = 400, 200
ROOT = Path(dreamer.__file__).parent
COMMAND = ["--configs", "debug", "--steps", str(STEPS), "--checkpoint_every", str(CHECKPOINT_EVERY)]

Rows = list[dict[str, Any]]


def train(logdir: Path, *arguments: str) -> Rows:
    """A run in this process, and its metrics."""
    dreamer.main([*COMMAND, *arguments, "--logdir", str(logdir)])
    return read_metrics(logdir)


def read_metrics(logdir: Path) -> Rows:
    return [json.loads(line) for line in (logdir / METRICS).read_text().splitlines()]


def loaded(path: Path) -> dict[str, Any]:
    return checkpoint.load(path, CPU)


def same_weights(one: Path, other: Path) -> bool:
    mine, theirs = (loaded(logdir / checkpoint.LATEST)["agent"] for logdir in (one, other))
    return all(
        torch.equal(value, theirs[part][name]) for part in ("model", "behavior") for name, value in mine[part].items()
    )


def is_group(number: int) -> bool:
    """Whether any process of a group is there."""
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True


class Reference:
    """An undisturbed run."""

    def __init__(self, logdir: Path) -> None:
        self.logdir = logdir
        self.rows = train(logdir, "--checkpoint_numbered", "true")
