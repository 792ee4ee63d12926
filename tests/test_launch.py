"""What is looked at, and said, before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest

import launch
from tests.run_scenes import COMMAND, STEPS
from tests.scenes import debug_config, refusal


def test_replay_that_memory_cannot_hold_is_refused_before_the_first_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(launch, "memory_at_hand", lambda: 20_000)
    line = refusal(capsys, *COMMAND, "--logdir", str(tmp_path / "run"))
    assert f"{STEPS} rows" in line and "20 kB" in line and "--replay_capacity" in line
    assert not (tmp_path / "run").exists()


def test_replay_holds_no_more_rows_than_a_run_has_steps_and_memory_is_asked_for_those() -> None:
    config = debug_config(steps=500, replay_capacity=10**6)
    assert launch.rows_when_full(config) == 500
    assert launch.rows_when_full(config.replace(replay_capacity=400)) == 400
