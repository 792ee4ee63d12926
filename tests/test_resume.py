from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import checkpoint
from comparing import runs
from comparing.runs import METRICS
from tests.run_scenes import (
    COMMAND,
    ROOT,
    STEPS,
    Reference,
    loaded,
    same_weights,
    train,
)
from tests.scenes import without_times
from training.resuming import history


def start_process(logdir: Path) -> subprocess.Popen[bytes]:
    with (logdir.parent / f"{logdir.name}.stderr").open("ab") as stderr:
        return subprocess.Popen(
            [sys.executable, "dreamer.py", *COMMAND, "--logdir", str(logdir)], cwd=ROOT, stderr=stderr
        )


def send(number: signal.Signals, process: subprocess.Popen[bytes], *, when: Callable[[], bool]) -> int:
    """Send a signal as soon as the condition holds, and return the exit status."""
    deadline = time.monotonic() + 120
    while not when():
        assert process.poll() is None, "the run ended before its moment"
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.005)
    process.send_signal(number)
    return process.wait(timeout=60)


def has_logged(logdir: Path, step: int) -> bool:
    metrics = logdir / METRICS
    return metrics.exists() and f'"step": {step},' in metrics.read_text()


def test_run_that_is_killed_three_times_ends_like_an_undisturbed_one(reference: Reference, tmp_path: Path):
    logdir = tmp_path / "run"
    latest = logdir / checkpoint.LATEST

    def before_the_first_checkpoint() -> bool:
        return has_logged(logdir, 100)

    def right_after_a_checkpoint() -> bool:
        return latest.exists()

    def some_time_later() -> bool:
        reached = has_logged(logdir, 300)
        if reached:
            time.sleep(random.uniform(0, 0.1))
        return reached

    for moment in (before_the_first_checkpoint, right_after_a_checkpoint, some_time_later):
        assert send(signal.SIGKILL, start_process(logdir), when=moment) == -signal.SIGKILL
    assert loaded(latest)["step"] in (200, 400)
    rows = train(logdir)
    assert without_times(rows) == without_times(reference.rows)
    assert same_weights(logdir, reference.logdir)


def test_sigterm_saves_and_the_same_command_goes_on(reference: Reference, tmp_path: Path):
    logdir = tmp_path / "run"
    process = start_process(logdir)
    assert send(signal.SIGTERM, process, when=lambda: has_logged(logdir, 100)) == 0
    stopped_at = loaded(logdir / checkpoint.LATEST)["step"]
    assert 100 <= stopped_at < STEPS
    stderr = (tmp_path / "run.stderr").read_text()
    assert f"stopped by SIGTERM at step {stopped_at}; saved. The same command goes on from there." in stderr
    assert "Traceback" not in stderr
    assert without_times(train(logdir)) == without_times(reference.rows)


@pytest.mark.run
def test_signal_handlers_are_the_callers_again_after_a_run(tmp_path: Path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(tmp_path, "--steps", "48")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_run_that_has_ended_learns_nothing_more(reference: Reference, tmp_path: Path):
    logdir = tmp_path / "run"
    shutil.copytree(reference.logdir, logdir)
    rows = without_times(train(logdir))
    assert rows == without_times(reference.rows)
    assert same_weights(logdir, reference.logdir)


def test_resume_goes_on_from_the_named_checkpoint(reference: Reference, tmp_path: Path):
    start = reference.logdir / "step_000000200.pt"
    rows = train(tmp_path, "--resume", str(start))
    assert rows and all(row["step"] > 200 for row in rows)
    assert without_times(rows) == without_times([row for row in reference.rows if row["step"] > 200])
    assert rows[0]["seconds"] > loaded(start)["seconds"]


def test_init_takes_the_weights_and_nothing_else(reference: Reference, tmp_path: Path):
    latest = reference.logdir / checkpoint.LATEST
    rows = train(tmp_path, "--steps", "100", "--init", str(latest))
    assert rows[0]["step"] == 0
    (trained,) = [row for row in reference.rows if row["step"] == STEPS and "valid_gap" in row]
    assert rows[0]["valid_gap"] == trained["valid_gap"] != reference.rows[0]["valid_gap"]
    state = loaded(tmp_path / checkpoint.LATEST)
    assert state["step"] == 100
    assert state["agent"]["updates"] == state["updates"] < 20
    assert state["agent"]["optimizers"]["actor"]["updates"] == state["updates"]


def test_numbered_checkpoints_are_kept_on_request(reference: Reference, tmp_path: Path):
    names = sorted(path.name for path in reference.logdir.glob("step_*.pt"))
    assert names == ["step_000000200.pt", "step_000000400.pt"]
    train(tmp_path, "--steps", "100")
    assert not list(tmp_path.glob("step_*.pt"))


def test_changed_setting_of_a_run_that_goes_on_is_told(
    reference: Reference, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    logdir = tmp_path / "run"
    shutil.copytree(reference.logdir, logdir)
    train(logdir, "--steps", str(STEPS + 48), "--actor.entropy", "0.5")
    told = capsys.readouterr().err
    assert f"going on with the run in {logdir}, changed: actor.entropy 0.5 (was 0.0003)" in told
    (first, second) = runs.read(logdir).changes
    assert first == {"step": STEPS, "key": "actor.entropy", "was": 0.0003, "now": 0.5}
    assert second["key"] == "actor.entropy_final"


def changed(key: str, was: object, now: object, *, at: int) -> dict[str, object]:
    return {"step": at, "key": key, "was": was, "now": now}


def test_history_keeps_what_was_changed_before_and_moves_what_has_not_happened_yet(tmp_path: Path):
    past = [changed("lr", 1, 2, at=10), changed("lr", 2, 3, at=30), changed("clip", 5, 6, at=30)]
    (tmp_path / "run.json").write_text(json.dumps({"changes": past}))
    assert history(tmp_path, {}, step=40) == past
    assert history(tmp_path, {"lr": (3, 4)}, step=40) == [*past, changed("lr", 3, 4, at=40)]
    # Back to step 20, before the second change, with what was changed then, or as it was.
    assert history(tmp_path, {}, step=20) == [past[0], changed("lr", 2, 3, at=20), changed("clip", 5, 6, at=20)]
    assert history(tmp_path, {"lr": (3, 2), "clip": (6, 5)}, step=20) == [past[0]]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"changes": 3}', '{"changes": [{"step": 1}]}'])
def test_history_of_a_folder_that_tells_none_begins_now(content: str, tmp_path: Path):
    (tmp_path / "run.json").write_text(content)
    assert history(tmp_path, {"lr": (1, 2)}, step=5) == [changed("lr", 1, 2, at=5)]
