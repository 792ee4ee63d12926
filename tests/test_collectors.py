"""Runs whose environments are stepped by other processes: some are killed, some are refused, and the numbers hold."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

import config
import dreamer
import sac
from checkpoint import LATEST
from comparing.runs import METRICS
from system.sockets import Hub, new_key
from tests.run_scenes import ROOT, is_group, loaded, read_metrics
from tests.sweep_scenes import until
from training import messages
from training.replay import Replay
from training.ring import REWARD_AND_ENDS
from training.run_lock import RunLock

CPU = torch.device("cpu")
CARTPOLE = ["--task", "gym_CartPole-v1", "--configs", "debug", "--log_every", "20", "--eval_every", "0"]
CARTPOLE += ["--train_ratio", "4", "--eval_episodes", "1"]
STEPS = 200


def in_background(target: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread


def require_ratio(state: dict[str, Any], settings: config.Config, *, rows: int) -> None:
    """Check that as many updates were made, or are owed, as the steps behind the prefill bring."""
    least = (state["step"] - settings.prefill) * settings.train_ratio / rows
    most = least + settings.envs * settings.train_ratio / rows
    assert least <= state["updates"] + state["updates_owed"] + 1e-6 and state["updates"] + state["updates_owed"] <= most
    assert 0 <= state["updates_owed"] < 1


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose collector was killed."""
    logdir = tmp_path_factory.mktemp("killed") / "run"

    def kill() -> None:
        until(lambda: (logdir / METRICS).exists() and len(read_metrics(logdir)) > 3)
        (process,) = multiprocessing.active_children()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)

    thread = in_background(kill)
    dreamer.main([*CARTPOLE, "--steps", str(STEPS), "--logdir", str(logdir), "--collectors", "1"])
    thread.join(1)
    return logdir


@pytest.mark.run
def test_run_whose_collector_is_killed_has_its_steps_and_updates(killed: Path):
    state = loaded(killed / LATEST)
    settings = config.read(killed / "config.yaml")
    assert state["finished"] and STEPS <= state["step"] < STEPS + settings.envs
    require_ratio(state, settings, rows=settings.batch_size * settings.batch_length)
    rows = read_metrics(killed)
    last = next(row for row in reversed(rows) if "collect/lost" in row)
    assert last["collect/lost"] == 1 and last["collect/steps_1"] == state["step"]
    assert all(row["collect/weights_age"] >= 0 for row in rows if "collect/weights_age" in row)
    assert multiprocessing.active_children() == []


@pytest.mark.run
def test_rows_of_collectors_are_those_of_whole_stretches_of_episodes(killed: Path):
    state = loaded(killed / LATEST)
    manifest = state["replay"]
    spaces = {"observation": ((4,), torch.float32), "action": ((), torch.int64)}
    replay = Replay(spaces, num_envs=manifest["num_envs"], capacity=10**4, device=CPU)
    replay.load_chunks(killed / "replay", {**manifest, "memory_chunks": []})
    rows = {name: value[:, : replay.total] for name, value in replay.rows.items()}
    assert rows.keys() == {"observation", "action", *REWARD_AND_ENDS}
    assert int((~rows["is_last"]).sum()) == state["step"]
    # A cart moves on by a fiftieth of its speed, unless another episode begins.
    now, later = rows["observation"][:, :-1], rows["observation"][:, 1:]
    moved = (now[..., 0] + 0.02 * now[..., 1] - later[..., 0]).abs() < 1e-6
    assert moved[~rows["is_first"][:, 1:]].all() and not moved[rows["is_first"][:, 1:]].any()
    assert torch.equal(rows["is_last"][:, :-1], rows["is_first"][:, 1:])


@pytest.mark.run
def test_run_with_collectors_goes_on_with_them_alone(killed: Path, capsys: pytest.CaptureFixture[str]):
    command = [*CARTPOLE, "--steps", str(STEPS + 60), "--logdir", str(killed)]
    with pytest.raises(SystemExit):
        dreamer.main(command)
    assert re.search("latest.pt is of a run with collectors; give --collectors", capsys.readouterr().err)
    before = loaded(killed / LATEST)["updates"]
    dreamer.main([*command, "--collectors", "1"])
    state = loaded(killed / LATEST)
    assert state["finished"] and state["step"] >= STEPS + 60 and state["updates"] > before
    settings = config.read(killed / "config.yaml")
    require_ratio(state, settings, rows=settings.batch_size * settings.batch_length)


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.run
def test_collector_waits_for_a_learner_that_was_killed(tmp_path: Path, port: int, capsys: pytest.CaptureFixture[str]):
    logdir, address = tmp_path / "run", f"127.0.0.1:{port}"
    same = ["--configs", "tsp_sac", "debug", "--steps", "1500", "--checkpoint_every", "300", "--log_every", "100"]
    same += ["--eval_every", "0", "--logdir", str(logdir)]
    learners: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        with (tmp_path / f"learner{len(learners)}.txt").open("wb") as log:
            learners.append(
                subprocess.Popen(
                    [sys.executable, "sac.py", *same, "--listen", address],
                    cwd=ROOT,
                    stderr=log,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
            )

    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit) as end:
            sac.main([*same, "--collect", address, *arguments])
        assert end.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    start()
    until(lambda: (logdir / "collectors.key").exists())
    assert "the learner has nodes 6, the collector 7: give both the same" in refused("--nodes", "7")
    (tmp_path / "other").write_text(new_key())
    assert "has another key; give its own with --key FILE" in refused("--key", str(tmp_path / "other"))

    def kill() -> None:
        until(lambda: (logdir / LATEST).exists())
        learners[0].send_signal(signal.SIGKILL)
        learners[0].wait()
        start()

    thread = in_background(kill)
    sac.main([*same, "--collect", address])
    thread.join(60)
    lines = capsys.readouterr().err
    assert f"the learner at {address} is gone; waiting for it for 10 minutes" in lines
    assert lines.splitlines()[-1].startswith("the run has ended at step 15")
    assert [learner.wait(60) for learner in learners] == [-signal.SIGKILL, 0]
    state = loaded(logdir / LATEST)
    settings = config.read(logdir / "config.yaml")
    require_ratio(state, settings, rows=settings.batch_size * (settings.nodes + 1))
    assert state["collected"] == {socket.gethostname(): state["step"]}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["once", "twice", "SIGTERM", "SIGKILL"])
def test_run_that_is_stopped_leaves_nothing_of_its_collectors(how: str, tmp_path: Path, port: int):
    logdir, address = tmp_path / "run", f"127.0.0.1:{port}"
    command = [*CARTPOLE, "--steps", "100000", "--logdir", str(logdir), "--collectors", "2", "--listen", address]
    with (tmp_path / "told.txt").open("wb") as told:
        run = subprocess.Popen(
            [sys.executable, "dreamer.py", *command], cwd=ROOT, stderr=told, stdout=told, start_new_session=True
        )
    until(lambda: (logdir / METRICS).exists() and len(read_metrics(logdir)) > 3)
    if how == "SIGKILL":
        run.send_signal(signal.SIGKILL)
    elif how == "SIGTERM":
        os.killpg(run.pid, signal.SIGTERM)
    else:
        # As a terminal does.
        os.killpg(run.pid, signal.SIGINT)
        if how == "twice":
            time.sleep(0.02)
            os.killpg(run.pid, signal.SIGINT)
    lines = (tmp_path / "told.txt").read_text
    assert run.wait(60) == {"twice": 130, "SIGKILL": -signal.SIGKILL}.get(how, 0), lines()
    assert "Traceback" not in lines()
    until(lambda: not is_group(run.pid))
    with closing(Hub(address, key=new_key())):
        pass
    RunLock(logdir).release()
    assert not [*logdir.rglob("*.tmp")]


MISTAKES = [
    (["--collectors", "none"], "--collectors is none; it takes a number"),
    (["--collectors", "0"], "--collectors is 0, so that nobody collects"),
    (["--listen", "here"], "'here' is no HOST:PORT"),
    (["--collectors", "1", "--log_regret", "true"], "log_regret is True; collectors need it at False"),
    (["--collect", "127.0.0.1:1", "--key", "nowhere"], "cannot read the key nowhere"),
]


@pytest.mark.parametrize(("arguments", "line"), MISTAKES, ids=lambda each: str(each[-1]))
def test_mistake_about_collectors_is_told_in_one_line(
    arguments: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as end:
        dreamer.main(["--configs", "debug", "--logdir", str(tmp_path / "run"), *arguments])
    (told,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line in told and not (tmp_path / "run").exists()


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(config.ConfigError, match=r'zmq and safetensors: pip install -e "\.\[collectors\]"'):
        messages.require_packages()
