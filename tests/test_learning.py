"""A general task that must be learnt: what a misaligned index or a wrong dtype would spoil without any error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import dreamer
from comparing.runs import METRICS

SHORT = ["--steps", "2800", "--eval_every", "2800", "--valid_episodes", "2", "--eval_episodes", "20"]


@pytest.mark.slow
def test_dreamer_learns_cartpole_to_100(tmp_path: Path):
    dreamer.main(["--configs", "cartpole", "--device", "cpu", *SHORT, "--logdir", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    # Random actions keep the pole up for 22 steps.
    assert rows[-1]["eval_return"] >= 100
