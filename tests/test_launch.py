"""What is looked at, and said, before the first step."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import checkpoint
from settings.run import RunSettings
from tests.run_scenes import COMMAND, STEPS, train
from tests.scenes import debug_config, refusal
from training import replay_room
from training.trainer import Trainer


def test_replay_that_memory_cannot_hold_is_refused_before_the_first_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(replay_room, "memory_at_hand", lambda: 20_000)
    line = refusal(capsys, *COMMAND, "--logdir", str(tmp_path / "run"))
    assert f"{STEPS} rows" in line and "20 kB" in line and "--replay_capacity" in line
    assert not (tmp_path / "run").exists()


def test_replay_holds_no_more_rows_than_a_run_has_steps_and_memory_is_asked_for_those() -> None:
    config = debug_config(steps=500, replay_capacity=10**6)
    assert replay_room.rows_when_full(RunSettings.of(config)) == 500
    assert replay_room.rows_when_full(RunSettings.of(config.replace(replay_capacity=400))) == 400


def opening(capsys: pytest.CaptureFixture[str], logdir: Path, *arguments: str) -> tuple[dict[str, str], list[str]]:
    """What a short run says of itself first, and the lines that follow."""
    capsys.readouterr()
    train(logdir, "--steps", "56", "--log_every", "28", "--eval_every", "28", *arguments)
    lines = capsys.readouterr().err.splitlines()
    facts = [line.split(maxsplit=1) for line in lines[: len(FACTS)]]
    return {name: value for name, value in facts}, lines[len(FACTS) :]


FACTS = ("logdir", "device", "sees", "replay", "curves")


@pytest.mark.run
def test_run_says_at_the_start_where_it_stands_and_what_it_takes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    logdir = tmp_path / "a run"
    facts, _ = opening(capsys, logdir)
    assert tuple(facts) == FACTS
    assert str(logdir) in facts["logdir"] and "new run" in facts["logdir"]
    assert "cpu" in facts["device"] and "coords" in facts["sees"]
    assert "56 rows of 91 bytes" in facts["replay"] and "5.1 kB" in facts["replay"]
    assert facts["curves"] == f"tensorboard --logdir {tmp_path}"
    facts, _ = opening(capsys, logdir, "--steps", "84")
    assert "step 56" in facts["logdir"] and "step 84" in facts["logdir"] and "84 rows" in facts["replay"]


@pytest.mark.run
def test_run_that_ends_with_its_prefill_says_that_it_learns_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _, (first, *_) = opening(capsys, tmp_path, "--prefill", "56")
    assert first.startswith("warning") and "prefill (56)" in first


@pytest.mark.run
def test_run_without_terminal_prints_one_line_a_log(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _, lines = opening(capsys, tmp_path)
    steps = [line.split()[1] for line in lines if line.startswith("step ")]
    assert steps == ["0/56", "28/56", "56/56"]
    assert all(line.split("  ")[1].startswith("gap ") for line in lines if line.startswith("step "))


@pytest.mark.run
def test_checkpoint_that_a_run_goes_on_from_does_not_stay_in_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train(tmp_path, "--steps", "56")
    copies: list[weakref.ref[Tensor]] = []
    load, run = checkpoint.load, Trainer.run

    def remembered(path: Path, device: torch.device) -> dict[str, Any]:
        state = load(path, device)
        weights = {} if "agent" not in state else state["agent"]["model"]
        copies.extend(map(weakref.ref, weights.values()))
        return state

    def run_alone(trainer: Trainer) -> None:
        gc.collect()
        assert copies and [copy() for copy in copies if copy() is not None] == []
        run(trainer)

    monkeypatch.setattr(checkpoint, "load", remembered)
    monkeypatch.setattr(Trainer, "run", run_alone)
    train(tmp_path, "--steps", "84")
