"""Sweeps in this process, of a stand-in for programs that train: it logs, saves, goes on and stops as they do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import checkpoint
import sweep
from comparing import runs

# Each step is a row. What it logs depends on its settings and steps alone. `tricks` is a folder of files that make a
# run misbehave: `hang-NAME` has it ignore requests to stop, `fail-NAME` makes it end with a traceback at step 3.
STAND_IN = """
import fcntl, json, shutil, signal, sys, time
from pathlib import Path
flags = dict(each[2:].split("=", 1) for each in sys.argv[1:] if each.startswith("--") and "=" in each)
logdir, tricks = Path(flags["logdir"]), Path(__file__).with_name("tricks")
logdir.mkdir(exist_ok=True)
lock = (logdir / "lock").open("a+")
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
lock.write("1")
lock.flush()
stopped = []
def hangs():
    return (tricks / f"hang-{logdir.name}").exists()
signals = (signal.SIGTERM, signal.SIGINT)
for number in signals:
    signal.signal(number, lambda *_: stopped.append(1) if not stopped or hangs() else sys.exit(130))
latest, log = logdir / "latest.pt", logdir / "metrics.jsonl"
step = int((logdir / "step").read_text()) if latest.exists() else 0
rows = log.read_text().splitlines(keepends=True)[:step] if log.exists() else []
log.write_text("".join(rows))
def save(finished):
    (logdir / "step").write_text(str(step))
    shutil.copy(Path(__file__).with_name("finished.pt" if finished else "begun.pt"), logdir / "latest.pt.tmp")
    (logdir / "latest.pt.tmp").rename(latest)
steps = int(flags["steps"])
while step < steps and not stopped:
    step += 1
    with log.open("a") as file:
        row = {"step": step, "seconds": step, "valid_gap": float(flags.get("actor.lr", 0)) * 1000 + 1 / step}
        file.write(json.dumps(row) + "\\n")
    if step % 5 == 0:
        save(False)
    if step == 3 and (tricks / f"fail-{logdir.name}").exists():
        raise SystemExit(1)
    time.sleep(0.01)
while stopped and hangs():
    time.sleep(0.01)
save(step == steps)
lock.truncate(0)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of tricks of a stand-in that sweeps start in place of dreamer.py."""
    folder = tmp_path / "programs"
    (folder / "tricks").mkdir(parents=True)
    (folder / "dreamer.py").write_text(STAND_IN)
    for name, finished in (("finished", True), ("begun", False)):
        checkpoint.save(folder / f"{name}.pt", {"finished": finished})
    monkeypatch.setattr("sweeping.jobs.ROOT", folder)
    monkeypatch.setattr("sweeping.jobs._visible_gpus", lambda: [])
    monkeypatch.setattr("sweeping.runner.READ_EVERY", 0.0)
    monkeypatch.setattr("sweeping.runner.LOOK_EVERY", 0.01)
    return folder / "tricks"


def work(folder: Path, *arguments: str, during: Callable[[], None] | None = None) -> int:
    """A sweep of a few steps, and its exit status; `during` is called beside it, from another thread."""
    helper = threading.Thread(target=during or (lambda: None))
    helper.start()
    try:
        sweep.main(["--configs", "debug", "--logdir", str(folder), *arguments])
    except SystemExit as error:
        return int(error.code or 0)
    finally:
        helper.join(timeout=60)
    return 0


def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.005)


def steps_of(logdir: Path) -> int:
    """How many rows a run has logged."""
    log = logdir / runs.METRICS
    return log.read_bytes().count(b"\n") if log.exists() else 0
