"""Where logs come from: files of others, and simulations that are cut into logs."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from config import UserError
from driving.scene import Light, Log
from scenarios.logs import LogFolder, Recording, cut, prepared
from scenarios.work import LocalWorker, workers_of
from settings.scenarios import LogSettings
from tests.driving_scenes import TURN, crossing, log_of, straight
from tests.library import ROOT
from tests.scenario_scenes import settings, write_logs


def traffic(frames: int = 10) -> Log:
    """One car that comes in frame 2 and one that is always there; a light is red in frames 4 and 5."""
    lights = {frame: (TURN, Light.RED) for frame in (4, 5)}
    return log_of({1: straight(0, 4, frames), 2: straight(50, 4, frames - 2)}, begin={2: 2}, lights=lights)


def test_cut_is_the_frames_between():
    piece = cut(traffic(), 3, 6, name="piece")
    assert (piece.name, piece.map_name, piece.frames) == ("piece", "crossing", 3)
    assert piece.first.tolist() == [0, 2, 4, 6] and piece.id.tolist() == [1, 2] * 3
    assert piece.x.tolist() == [6, 52, 8, 54, 10, 56]
    assert [piece.lights(frame)[0].tolist() for frame in range(3)] == [[], [TURN], [TURN]]


def test_cut_is_a_log_like_any_other(tmp_path: Path):
    cut(traffic(), 1, 7, name="piece").save(tmp_path / "piece.npz")
    assert Log.load(tmp_path / "piece.npz").find(np.array([2, 2]), np.array([0, 1])).tolist() == [-1, 2]


def test_cut_beyond_the_end_is_what_there_is():
    assert cut(traffic(), 8, 30, name="piece").frames == 2


def test_recording_is_cut_into_logs_that_are_named_by_their_time():
    recording = Recording("crossing", 3, 300.0, 5.0, 2.0)
    assert recording.names == ["crossing-3-00300", "crossing-3-00302", "crossing-3-00304"]
    pieces = list(recording.pieces(traffic(11)))
    assert [piece.name for piece in pieces] == recording.names
    # What is over goes with the last one.
    assert [piece.frames for piece in pieces] == [4, 4, 3]
    assert np.concatenate([piece.x for piece in pieces]).tolist() == traffic(11).x.tolist()


def log_settings(**changes: Any) -> LogSettings:
    return LogSettings.of(settings(**{f"logs.{key}": value for key, value in changes.items()}))


def test_logs_of_a_folder_are_all_that_are_there(tmp_path: Path):
    logs = write_logs(tmp_path, "b", "a")
    logs.log_path(".half").write_bytes(b"")
    folder, names = prepared(log_settings(path=str(logs.folder)), LogFolder(tmp_path / "none"), LocalWorker())
    assert names == ["a", "b"] and folder.open("a")[0].name == "a"


class Simulated:
    """A simulator that counts what it has to record."""

    def __init__(self) -> None:
        self.recorded: list[tuple[Any, ...]] = []

    def record(self, map_name: str, seed: int, seconds: float, *, start: float) -> Log:
        self.recorded.append((map_name, seed, seconds, start))
        return dataclasses.replace(traffic(11), map_name=map_name)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Simulated:
    simulator = Simulated()
    monkeypatch.setattr("driving.simulator.record", simulator.record)
    monkeypatch.setattr("driving.maps.road_map", lambda name: crossing())
    return simulator


def test_simulations_are_recorded_once(simulated: Simulated, tmp_path: Path):
    wanted = log_settings(maps=["one", "two"], recordings=2, start=300.0, seconds=5.0, piece=2.5)
    recorded = LogFolder(tmp_path / "logs")
    folder, names = prepared(wanted, recorded, LocalWorker())
    assert simulated.recorded == [(name, seed, 5.0, 300.0) for name in ("one", "two") for seed in (0, 1)]
    assert names == [
        f"{name}-{seed}-{time}" for name in ("one", "two") for seed in (0, 1) for time in ("00300", "00302")
    ]
    assert folder.open(names[0])[0].map_name == "one"
    # One piece is missing, as after a kill.
    recorded.log_path(names[1]).unlink()
    prepared(wanted, recorded, LocalWorker())
    assert simulated.recorded[4:] == [("one", 0, 5.0, 300.0)] and recorded.log_path(names[1]).exists()


def test_only_the_logs_that_are_asked_for_are_taken(simulated: Simulated, tmp_path: Path):
    recorded = LogFolder(tmp_path / "logs")
    for maps in (["one"], ["two"]):
        _, names = prepared(log_settings(maps=maps, recordings=1, seconds=5.0, piece=5.0), recorded, LocalWorker())
    assert names == ["two-0-00300"] and recorded.names() == ["one-0-00300", "two-0-00300"]


def test_map_that_there_is_not_is_refused_by_name(tmp_path: Path):
    pytest.importorskip("libsumo")
    with pytest.raises(UserError, match="there is no map 'ingolstat'"):
        prepared(log_settings(maps=["ingolstat"]), LogFolder(tmp_path), LocalWorker())


def _double(number: int) -> int:
    return 2 * number


def _refuse(number: int) -> int:
    raise UserError(f"not {number}")


def _die(number: int) -> int:
    os._exit(number)


@pytest.mark.run
def test_processes_do_jobs_and_hand_on_what_goes_wrong():
    with workers_of(2) as workers:
        assert dict(workers.each(_double, [1, 2, 3])) == {1: 2, 2: 4, 3: 6}
        with pytest.raises(UserError, match="^not 1$"):
            list(workers.each(_refuse, [1]))
        with pytest.raises(UserError, match="a process that was computing has died, .* with fewer --cache.workers"):
            list(workers.each(_die, [1]))


RECORDED = """
import hashlib
from pathlib import Path
from driving.simulator import record
record("braunschweig", 0, 60.0, start=300.0).save(Path("log.npz"))
"""


@pytest.mark.run
def test_simulation_is_the_same_whatever_the_order_of_sets(tmp_path: Path):
    pytest.importorskip("libsumo")
    digests = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", RECORDED], cwd=tmp_path, env=environment, check=True)
        digests.add(hashlib.sha256((tmp_path / "log.npz").read_bytes()).hexdigest())
    assert len(digests) == 1
