"""Whole runs that plan, and whose policies imitate plans."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import dreamer
from tests.run_scenes import CHECKPOINT_EVERY, same_weights, train
from tests.scenes import without_times

PLANNING = (
    *("--act", "plan", "--eval_by", "both", "--imag_policy", "0", "--imag_teacher", "1", "--actor.pointer.latent", "0"),
    *("--log_regret", "true", "--model.move_heads", "2", "--plan.thompson", "true", "--valid_instances", "4"),
    *("--eval_instances", "4", "--teacher.plans", "2", "--teacher.batch", "4", "--teacher.stock", "8"),
)
# Planning takes time that no other run takes.
TIMES = ("valid_plan_seconds", "eval_plan_seconds")


def rows_of(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in without_times(rows)]


@pytest.mark.run
def test_planning_run_goes_on_as_if_it_had_never_stopped(tmp_path: Path):
    whole = train(tmp_path / "whole", *PLANNING, "--checkpoint_numbered", "true")
    (halfway,) = (tmp_path / "whole").glob(f"step_*{CHECKPOINT_EVERY}.pt")
    parts = train(tmp_path / "parts", *PLANNING, "--resume", str(halfway))
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    last, again = rows_of(whole)[-1], rows_of(parts)[-1]
    assert last == again
    assert {"eval_gap", "eval_plan_gap", "eval_plan_spread", "eval_plan_error"} <= last.keys()
    assert any({"valid_plan_spread", "valid_plan_error"} <= row.keys() for row in whole)
    assert any("regret" in row and "teacher_agreement" in row for row in whole)


@pytest.mark.run
def test_evaluation_of_a_run_plays_by_policy_and_plan_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train(tmp_path, *PLANNING, "--steps", "200")
    capsys.readouterr()
    dreamer.main(["--evaluate", str(tmp_path), "--eval_by", "plan", "--plan.pessimism", "0.5", "--eval_instances", "3"])
    (line,) = capsys.readouterr().out.splitlines()
    assert "3 instances" in line and "policy:" not in line
    dreamer.main(["--evaluate", str(tmp_path), "--eval_by", "both"])
    (line,) = capsys.readouterr().out.splitlines()
    assert "policy: 4 instances" in line and "; plan: 4 instances" in line
    assert re.search(r"heads are [\d.]+ % apart about its moves, and wrong by [\d.]+ %$", line)


@pytest.mark.parametrize(
    "arguments", [("--task", "pickup", "--imag_first", "stored"), ("--model.reward_latent", "true")]
)
def test_run_that_nobody_can_plan_is_refused(
    arguments: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        dreamer.main(["--configs", "debug", "--act", "plan", *arguments, "--logdir", str(tmp_path / "run")])
    assert "act asks for plan, and this agent plays by policy alone" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
