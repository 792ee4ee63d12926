"""Drivers without a network: constant velocity, and following a line by the intelligent driver model."""

from __future__ import annotations

import numpy as np
import pytest

from driving.baselines import Observation, brake, constant_velocity, idm, idm_by_candidate
from driving.candidates import FREE
from driving.features import features
from driving.scene import Light, Log
from tests.driving_scenes import AHEAD, crossing, log_of, straight

ROAD_MAP = crossing()


def seen(log: Log, frame: int = 0) -> Observation:
    found = features(log, ROAD_MAP, np.array([1]), frame, targets=False)
    return {key: value[0] for key, value in found.items()}


def test_constant_velocity_goes_straight_on():
    found = constant_velocity(seen(log_of({1: straight(10, 8, 1)})))
    assert found[:, 0] == pytest.approx(4.0 * np.arange(1, 17)) and not found[:, 1:].any()


def test_idm_comes_to_the_limit_on_a_free_road():
    found = idm(seen(log_of({1: straight(20, 4, 1)})))
    speeds = np.diff(found[:, 0], prepend=0) / 0.5
    assert (np.diff(speeds) > 0).all() and 9 < speeds[-1] < 10 and np.abs(found[:, 1]).max() < 1e-4


def test_idm_stops_behind_who_stands():
    found = idm(seen(log_of({1: straight(20, 8, 1), 2: straight(60, 0, 1)})))
    # 36 m between the bumpers, of which it keeps some 2 m.
    assert 30 < found[-1, 0] < 34.5 and np.diff(found[:, 0])[-1] < 0.5


def test_idm_follows_who_drives():
    close = idm(seen(log_of({1: straight(20, 8, 1), 2: straight(34, 8, 1)})))
    free = idm(seen(log_of({1: straight(20, 8, 1), 2: straight(34, 8, 1, y=3)})))
    assert 50 < close[-1, 0] < free[-1, 0] - 3


def test_idm_stops_at_a_red_light_and_passes_a_green_one():
    log = log_of({1: straight(60, 8, 1)}, lights={0: (AHEAD, Light.RED)})
    found = idm(seen(log))
    # The line is 40 m ahead of the middle of the car, 38 m ahead of its bumper.
    assert 33 < found[-1, 0] < 38.5
    assert idm(seen(log_of({1: straight(60, 8, 1)})))[-1, 0] > 60


def test_idm_drives_on_where_it_is_too_late_to_stop():
    near = {1: straight(92, 10, 1)}
    assert idm(seen(log_of(near, lights={0: (AHEAD, Light.AMBER)})))[-1, 0] > 70
    far = idm(seen(log_of({1: straight(60, 10, 1)}, lights={0: (AHEAD, Light.AMBER)})))
    assert far[-1, 0] < 39


def test_idm_takes_the_straightest_line_of_its_own_lane():
    # The turn to the left is the other branch, and the lane beside begins 3 m away.
    found = idm(seen(log_of({1: straight(85, 8, 1)})))
    assert np.abs(found[:, 1]).max() < 1e-4 and found[-1, 0] > 50


def test_without_a_line_idm_brakes():
    obs = seen(log_of({1: straight(20, 8, 1, y=-9)}))
    assert (idm(obs) == brake(obs)).all() and brake(obs)[-1, 0] == pytest.approx(8**2 / 3, abs=1e-3)


def test_the_candidate_nearest_to_idm_is_legal_and_near():
    # 6 m/s towards 10 m/s is mode 5 of the first line; nothing but to brake is left off the road.
    assert idm_by_candidate(seen(log_of({1: straight(20, 6, 1)}))) == 5
    assert idm_by_candidate(seen(log_of({1: straight(20, 8, 1), 2: straight(31, 0, 1)}))) == 0
    assert idm_by_candidate(seen(log_of({1: straight(20, 8, 1, y=-9)}))) == FREE
