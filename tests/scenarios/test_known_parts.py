"""Samples of driving: what a file holds is what each ego alone observes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from driving.features import FEATURES, TARGETS, features
from driving.scene import Log
from scenarios import caching
from scenarios.builder import build
from scenarios.cache import Cache
from scenarios.known_parts import KNOWN
from scenarios.parts import Needs
from scenarios.samples import compute
from tests.driving_scenes import crossing
from tests.scenario_scenes import scenario_settings, write_logs

NEEDS = Needs(tuple(FEATURES), tuple(TARGETS))


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
