"""Short real runs to break, with the guard; or without it where benchmarks/faults.py asks for that."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import dreamer
from benchmarks.faults import GUARD_OFF, is_finite
from comparing.runs import METRICS

GUARDED = not os.environ.get(GUARD_OFF)
COMMON = [
    *("--configs", "debug", "--device", "cpu", "--log_every", "50", "--eval_every", "1000", "--checkpoint_every", "50"),
    *("--guard.enabled", str(GUARDED).lower()),
    *("--guard.max_skips", "4", "--guard.snapshot_every", "5", "--guard.recovery", "5", "--guard.max_rollbacks", "2"),
]
ROUTING = ["--steps", "150", "--model_every", "2", "--reward_updates", "1"]
CARTPOLE = [
    *("--task", "gym_CartPole-v1", "--steps", "150", "--envs", "4", "--prefill", "60", "--train_ratio", "8"),
    *("--valid_episodes", "1", "--eval_episodes", "1"),
]


class Outcome(NamedTuple):
    """What a run leaves behind."""

    logdir: Path
    rows: list[dict[str, Any]]
    text: str

    def last(self, name: str) -> float:
        """The value of a metric that was logged last."""
        return [row[name] for row in self.rows if name in row][-1]

    def reports(self) -> list[Path]:
        """Those that the guard saved."""
        return sorted((self.logdir / "guard").glob("*.pt"))


class Runner:
    """Starts runs in a test's own folder, as a user would."""

    def __init__(self, logdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.logdir, self.capsys = logdir, capsys

    def train(self, *arguments: str) -> Outcome:
        """A run that is to reach its end: finite parameters and moments, and a final evaluation."""
        dreamer.main([*COMMON, *arguments, "--logdir", str(self.logdir)])
        run = self.result()
        assert "final evaluation: " in run.text
        assert any("eval_return" in row for row in run.rows)
        assert is_finite(self.logdir)
        return run

    def take(self, logdir: Path) -> None:
        """Let the next run go on in a copy of another."""
        shutil.copytree(logdir, self.logdir)

    def refused(self, *arguments: str) -> str:
        """The one line that a run ends with whose exit status is 2."""
        with pytest.raises(SystemExit) as stopped:
            dreamer.main([*COMMON, *arguments, "--logdir", str(self.logdir)])
        assert stopped.value.code == 2
        last = self.capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("dreamer.py: ")
        return last

    def result(self) -> Outcome:
        """What is there by now."""
        rows = [json.loads(line) for line in (self.logdir / METRICS).read_text().splitlines()]
        return Outcome(self.logdir, rows, self.capsys.readouterr().err)


@pytest.fixture
def runner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(tmp_path / "run", capsys)


@pytest.fixture(scope="session")
def routing_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has ended, at step 152."""
    logdir = tmp_path_factory.mktemp("routing") / "run"
    dreamer.main([*COMMON, *ROUTING, "--logdir", str(logdir)])
    return logdir


@pytest.fixture
def routing() -> list[str]:
    return ROUTING


@pytest.fixture
def cartpole() -> list[str]:
    return CARTPOLE
