"""The reward of driving: contact and whose fault it is, metres along the road, leaving it, and discomfort."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from driving import maps
from driving.reward import CONTACT, DISCOMFORT, OFF_ROAD, Reward, rewards, touch
from driving.scene import Kind, Log
from tests.driving_scenes import crossing, log_of, straight

ROAD_MAP = crossing()


def reward(log: Log, agent: int = 1, frame: int = 1) -> Reward:
    found = rewards(log, ROAD_MAP, np.array([agent]), frame)
    return Reward(*(column[0] for column in found))


@pytest.mark.parametrize(
    ("other", "touches"),
    [
        ((3.9, 0.0, 0.0), True),
        ((4.1, 0.0, 0.0), False),
        ((0.0, 1.9, 0.0), True),
        ((0.0, 2.1, 0.0), False),
        # Across, it is half as long and half as wide in the way: 2 + 1 and 1 + 2.
        ((2.9, 0.0, np.pi / 2), True),
        ((3.1, 0.0, np.pi / 2), False),
        # By the corner of a square box's diagonal: both are near on every axis of the first, not on the other's.
        ((3.4, 2.4, np.pi / 4), True),
        ((4.3, 2.4, np.pi / 4), False),
        ((0.5, 0.2, 1.0), True),
    ],
)
def test_footprints_touch(other: tuple[float, float, float], touches: bool):
    one, two = np.array([[0.0, 0.0, 0.0, 4.0, 2.0]]), np.array([[*other, 4.0, 2.0]])
    assert touch(one, two).tolist() == touch(two, one).tolist() == [touches]


def test_metres_along_the_road_are_rewarded():
    found = reward(log_of({1: straight(10, 10, 2)}))
    assert found.metres == pytest.approx(5) and found.total == pytest.approx(0.5)
    assert not found.contact and not found.off_road and found.discomfort == 0


def test_only_metres_along_the_lane_count():
    found = reward(log_of({1: [(10.0, 0.0, 0.0, 10.0), (14.0, 1.0, 0.0, 10.0)]}))
    assert found.metres == pytest.approx(4)


def test_running_into_somebody_is_an_own_fault():
    found = reward(log_of({1: straight(10, 10, 2), 2: straight(18, 0, 2)}))
    assert found.contact and found.own_fault and found.total == pytest.approx(0.5 - CONTACT)


def test_a_touch_of_less_than_the_slack_is_none():
    for apart, contact in ((3.85, False), (3.75, True)):
        assert reward(log_of({1: straight(10, 2, 2), 2: straight(11 + apart, 0, 2)})).contact == contact


def test_being_run_into_from_behind_is_not():
    log = log_of({1: straight(18, 2, 2), 2: straight(10, 12, 2)})
    assert reward(log).contact and not reward(log).own_fault and reward(log).total == pytest.approx(0.1)
    assert reward(log, agent=2).own_fault


def test_who_stands_is_at_no_fault():
    side = [(20.0, -4.0, np.pi / 2, 8.0), (20.0, -2.0, np.pi / 2, 8.0)]
    found = reward(log_of({1: straight(20, 0, 2), 2: side}))
    assert found.contact and not found.own_fault


def test_contact_between_frames_is_found():
    across = [(14.0, -6.0, np.pi / 2, 24.0), (14.0, 6.0, np.pi / 2, 24.0)]
    found = reward(log_of({1: straight(10, 16, 2), 2: across}))
    assert found.contact and found.own_fault
    assert not reward(log_of({1: straight(40, 16, 2), 2: across})).contact


def test_who_has_just_come_is_run_into_by_nobody():
    assert not reward(log_of({1: straight(10, 10, 2), 2: straight(16, 0, 1)}, begin={2: 1})).contact


def test_leaving_the_road_costs_and_earns_no_metres():
    found = reward(log_of({1: straight(10, 10, 2, y=-4)}))
    assert found.off_road and found.metres == 0 and found.total == pytest.approx(-OFF_ROAD)


def test_the_wrong_way_is_off_the_road():
    back = [(150.0, -0.5, np.pi, 10.0), (145.0, -0.5, np.pi, 10.0)]
    assert reward(log_of({1: back})).off_road


def test_discomfort_by_hand():
    log = log_of({1: [(10.0, 0.0, 0.0, 10.0), (15.0, 0.0, 0.05, 10.0)]})
    log = dataclasses.replace(log, acceleration=np.array([0, 2], np.float32))
    # Along 2 of 4 m/s^2, across 10 m/s * 0.1 rad/s of 4 m/s^2, a jerk of 4 of 10 m/s^3.
    expected = 0.25 + 0.0625 + 0.16
    assert reward(log).discomfort == pytest.approx(expected)
    assert reward(log).total == pytest.approx(0.5 - DISCOMFORT * expected)


def test_discomfort_has_an_end():
    log = log_of({1: straight(10, 10, 2)})
    assert reward(dataclasses.replace(log, acceleration=np.array([0, -9], np.float32))).discomfort == 1


def test_no_ego_has_no_reward():
    found = rewards(log_of({1: straight(10, 10, 2)}), ROAD_MAP, np.zeros(0, np.int64), 1)
    assert all(len(column) == 0 for column in found)


def test_rewards_of_real_traffic(ingolstadt: Log):
    """Simulated drivers stay on the road, come along it as fast as they drive, and hardly ever touch one another."""
    road_map, found = maps.road_map("ingolstadt"), []
    for frame in range(1, ingolstadt.frames):
        rows = ingolstadt.rows(frame)
        cars = ingolstadt.id[rows][ingolstadt.kind[rows] == Kind.CAR]
        cars = cars[ingolstadt.find(cars, np.full(len(cars), frame - 1)) >= 0]
        together = rewards(ingolstadt, road_map, cars, frame)
        found.append(np.stack([column.astype(np.float32) for column in together], 1))
        if frame == 30:
            alone = [rewards(ingolstadt, road_map, cars[place : place + 1], frame) for place in range(len(cars))]
            for name in Reward._fields:
                assert [getattr(one, name)[0] for one in alone] == getattr(together, name).tolist()
    columns = dict(zip(Reward._fields, np.concatenate(found).T, strict=True))
    assert columns["off_road"].mean() < 0.005 and columns["own_fault"].mean() < 0.005
    assert 0 < columns["total"].mean() < 1.4
