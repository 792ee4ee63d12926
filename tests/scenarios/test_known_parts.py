"""Samples of driving: what a file holds is what each ego alone observes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from driving.features import FEATURES, TARGETS, features
from driving.scene import Log
from envs.tasks import ObservationTask
from scenarios import caching, dataset
from scenarios.builder import build
from scenarios.cache import Cache
from scenarios.known_parts import KNOWN
from scenarios.parts import Needs
from scenarios.samples import Samples, compute
from scenarios.scenario import Scenario
from tests.driving_scenes import crossing, log_of, straight
from tests.scenario_scenes import scenario_settings, settings, write_logs
from tests.scenes import CPU
from training import setup
from training.episode_files import EpisodeFolder
from training.recorded import Record

NEEDS = Needs(tuple(FEATURES), (*TARGETS, "reward"))


def test_samples_are_what_each_ego_alone_observes(ingolstadt: Log):
    from driving import maps

    log, road_map = dataclasses.replace(ingolstadt, name="real"), maps.road_map("ingolstadt")
    scenarios = build(log, road_map).scenarios
    assert len(scenarios) > 20
    for scenario, samples, fault in list(compute(log, road_map, scenarios, KNOWN))[::6]:
        assert not fault
        for row in range(0, scenario.rows, 7):
            alone = features(log, road_map, np.array([scenario.agent]), scenario.frame + row)
            for name, values in alone.items():
                # Bit for bit, so that files are the same however the work is divided.
                assert np.array_equal(samples[name][row], values[0]), (name, scenario)


def test_every_array_is_built_by_one_part_in_the_shape_that_it_says():
    arrays = [name for part in KNOWN for name in part.arrays]
    assert len(arrays) == len(set(arrays)) and {*FEATURES, *TARGETS} <= set(arrays)


def test_action_of_a_car_that_keeps_its_speed_is_on_its_lane(tmp_path: Path):
    write_logs(tmp_path, "a")
    report = caching.fill(scenario_settings(tmp_path), NEEDS, KNOWN, seed=0)
    (whole,) = (entry.scenario for entry in report.entries if (entry.scenario.agent, entry.scenario.frame) == (3, 0))
    samples = Cache(tmp_path / "cache").read(whole, KNOWN)
    # 4 m/s of the 10 m/s allowed are mode 2 of the first line.
    assert samples["action"][0] == 2 and samples["ego"][0, 5] == crossing().limits[0]
    assert samples["future"][0, -1].tolist() == pytest.approx([32.0, 0.0, 0.0], abs=1e-4)


def worth(log: Log, scenario: Scenario) -> Samples:
    (done,) = compute(log, crossing(), [scenario], KNOWN)
    return done.samples


def test_reward_of_a_row_is_that_of_the_way_to_it():
    log = log_of({1: straight(0, 4.0, 6)}, road_map=crossing())
    (whole,) = build(log, crossing()).scenarios
    # 2 m in half a second, 10 m being worth 1.
    assert worth(log, whole)["reward"].tolist() == pytest.approx([0.0] + [0.2] * 5)
    assert not worth(log, whole)["is_terminal"].any()
    # Of one that begins later in the log, too, nothing has been earned before.
    later = whole._replace(frame=2, rows=3)
    assert worth(log, later)["reward"].tolist() == pytest.approx([0.0, 0.2, 0.2])


def test_contact_ends_a_scenario_with_its_cost():
    # At 10 m/s into one that stands: 0, 5, 10 m, and 10 m is within the 4 m of a car at 13 m.
    log = log_of({1: straight(0, 10.0, 6), 2: straight(13, 0.0, 6)}, road_map=crossing())
    moving = build(log, crossing()).scenarios[0]
    samples = worth(log, moving)
    assert samples["is_terminal"].tolist() == [False, False, True]
    assert samples["reward"].tolist() == pytest.approx([0.0, 0.5, 0.5 - 10.0])
    assert len(samples["agents"]) == 3


def test_leaving_the_road_ends_a_scenario():
    off = [(2.0 * frame, -4.0 * frame, -1.1, 8.0) for frame in range(4)]
    log = log_of({1: off}, road_map=crossing())
    samples = worth(log, build(log, crossing()).scenarios[0])
    assert samples["is_terminal"].tolist()[-1] and len(samples["reward"]) < 4 and samples["reward"][-1] < -4


def test_dreamer_reads_the_cache_as_episodes_of_drive(tmp_path: Path):
    pytest.importorskip("libsumo")
    write_logs(tmp_path, "a-0-00000", "a-0-00060")
    caching.fill(scenario_settings(tmp_path), NEEDS, KNOWN, seed=0)
    world = setup.make_setup(settings(task="gym_Drive-v0"), CPU)
    try:
        assert isinstance(world.task, ObservationTask)
        record = Record(EpisodeFolder(tmp_path / "cache"), task=world.task, spaces=world.task.spaces)
    finally:
        world.close()
    assert record.faults == [] and (len(record), record.rows) == (8, 100)
    assert {*FEATURES, "action", "reward"} <= record.spaces.keys()
    # 4 and 6 m/s for 10 and for 1.5 s, in two logs.
    assert sum(record.returns) == pytest.approx(2 * (4 + 6) * (10 + 1.5) / 10, rel=1e-3)


def test_rows_of_which_no_future_is_known_are_not_trained_on(tmp_path: Path):
    write_logs(tmp_path, "a")
    report = caching.fill(scenario_settings(tmp_path), NEEDS, KNOWN, seed=0)
    rows = dataset.load(Cache(tmp_path / "cache"), report.entries, KNOWN, what="train on")
    # The last frame of each of two cars.
    assert sum(entry.scenario.rows for entry in report.entries) == 50 and len(rows) == 48
    assert rows.arrays["future_valid"].any(1).all() and len(rows.arrays["ego"]) == 48
