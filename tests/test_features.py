"""What an ego observes: numbers by hand, frames, padding, and that no other ego changes anything."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from driving import maps
from driving.candidates import FREE, STEPS
from driving.features import AGENTS, FEATURES, MOMENTS, ROADS, TARGETS, features
from driving.roads import PIECE_POINTS
from driving.scene import Kind, Light, Log
from tests.driving_scenes import LIMIT, TURN, crossing, log_of, straight

ROAD_MAP = crossing()


def seen(log: Log, agent: int, frame: int, *, targets: bool = True) -> dict[str, np.ndarray]:
    found = features(log, ROAD_MAP, np.array([agent]), frame, targets=targets)
    return {key: value[0] for key, value in found.items()}


def test_an_ego_knows_itself():
    turning = [(10.0, 0.0, 0.0, 8.0), (14.0, 0.0, 0.05, 8.0), (18.0, 0.2, 0.1, 8.0)]
    log = dataclasses.replace(log_of({1: turning}), acceleration=np.array([0, 1, 2], np.float32))
    assert seen(log, 1, 2)["ego"] == pytest.approx([8, 2, 0.1, 4, 2, LIMIT])
    assert seen(log, 1, 0)["ego"] == pytest.approx([8, 0, 0, 4, 2, LIMIT])


def test_a_turn_over_the_seam_of_angles_is_small():
    log = log_of({1: [(10.0, 60.0, 3.1, 1.0), (10.0, 60.0, -3.1, 1.0)]})
    assert seen(log, 1, 1)["ego"][2] == pytest.approx((2 * np.pi - 6.2) / 0.5, abs=1e-5)


def test_others_are_in_the_frame_of_the_ego_the_nearest_first():
    ego = [(50.0, 0.0, np.pi / 2, 0.0)] * 3
    other = [(50.0 - 2 * n, 10.0, np.pi, 4.0) for n in range(3)]
    log = log_of({1: ego, 2: straight(0, 10, 3, y=-30), 3: other}, kinds={2: Kind.BICYCLE})
    found = seen(log, 1, 2)
    # What goes west is to the left of who looks north.
    assert found["agents"][0, 2] == pytest.approx([10, 4, 0, 1, 0, 4, 4, 2], abs=1e-5)
    assert found["agents"][0, 0] == pytest.approx([10, 0, 0, 1, 0, 4, 4, 2], abs=1e-5)
    assert found["agents"][1, 2] == pytest.approx([-30, 40, 0, -1, 0, -10, 4, 2], abs=1e-5)
    assert found["agents_valid"].sum() == 6 and not found["agents"][2:].any()


def test_moments_before_an_agent_came_are_missing():
    log = log_of({1: straight(0, 10, 3), 2: straight(20, 10, 2)}, begin={2: 1})
    found = seen(log, 1, 2)
    assert found["agents_valid"][0].tolist() == [False, True, True] and not found["agents"][0, 0].any()
    assert seen(log, 1, 0)["agents_valid"].sum() == 0


def test_far_agents_are_not_seen_and_the_nearest_are_kept():
    crowd = {n: straight(3.0 * n, 0, 1) for n in range(1, 40)}
    log = log_of({0: straight(0, 0, 1), **crowd})
    found = seen(log, 0, 0)
    assert found["agents"][:, 2, 0] == pytest.approx(3.0 * np.arange(1, AGENTS + 1))
    far = seen(log_of({0: straight(0, 0, 1), 1: straight(101, 0, 1), 2: straight(99, 0, 1)}), 0, 0)
    assert far["agents_valid"].sum() == 1


def test_roads_are_the_nearest_pieces():
    found = seen(log_of({1: straight(50, 0, 1)}), 1, 0)
    assert found["roads"].shape == (ROADS, PIECE_POINTS, 5)
    distance = np.linalg.norm(found["roads"][..., :2].mean(1), axis=-1)[found["roads_valid"][:, 0]]
    assert (np.diff(distance) > -1e-3).all() and distance[0] < 9 and distance[-1] <= 100
    assert set(found["roads"][found["roads_valid"]][:, 4].tolist()) == {LIMIT, LIMIT / 2}
    assert not found["roads"][~found["roads_valid"]].any()


def test_the_future_and_its_label():
    log = log_of({1: straight(20, 10, 12)})
    found = seen(log, 1, 1)
    assert found["future"][:10, 0] == pytest.approx(5.0 * np.arange(1, 11)) and not found["future"][10:].any()
    assert found["future_valid"].tolist() == [True] * 10 + [False] * (STEPS - 10)
    assert found["action"] == 5 and found["action_mask"][found["action"]]


def test_lights_are_in_the_lines():
    found = seen(log_of({1: straight(40, 0, 1)}, lights={0: (TURN, Light.RED)}), 1, 0)
    assert found["lines"][1, 31:, 4].tolist() == [1] * 20 and not found["lines"][0, :, 4].any()


def test_an_ego_off_the_road_has_the_last_action_alone():
    found = seen(log_of({1: straight(40, 5, 20, y=-20)}), 1, 0)
    assert not found["lines_valid"].any() and found["action_mask"].sum() == 1 and found["action"] == FREE
    assert found["ego"][5] == 0 and found["roads_valid"].any()


def test_shapes_and_types_are_as_declared():
    log = log_of({1: straight(0, 10, 20), 2: straight(20, 10, 20)})
    found = features(log, ROAD_MAP, np.array([1, 2]), 3)
    assert found.keys() == FEATURES.keys() | TARGETS.keys()
    for name, (shape, dtype) in {**FEATURES, **TARGETS}.items():
        assert found[name].shape == (2, *shape) and found[name].dtype == dtype, name
    assert features(log, ROAD_MAP, np.array([1]), 3, targets=False).keys() == FEATURES.keys()
    assert MOMENTS == 3


def test_an_agent_that_is_not_there_is_no_ego():
    with pytest.raises(AssertionError, match="not in the frame"):
        seen(log_of({1: straight(0, 10, 3)}), 2, 0)


def test_egos_of_real_traffic_are_alike_alone_and_together(ingolstadt: Log):
    road_map, frame = maps.road_map("ingolstadt"), 30
    rows = ingolstadt.rows(frame)
    egos = ingolstadt.id[rows][ingolstadt.kind[rows] == Kind.CAR]
    together = features(ingolstadt, road_map, egos, frame)
    assert len(egos) > 10 and all(np.isfinite(value).all() for value in together.values())
    for index, ego in enumerate(egos):
        alone = features(ingolstadt, road_map, np.array([ego]), frame)
        assert all((alone[key][0] == together[key][index]).all() for key in together)


def test_labels_of_real_traffic_are_legal_and_vary(ingolstadt: Log):
    road_map = maps.road_map("ingolstadt")
    actions = []
    for frame in range(2, 40, 4):
        rows = ingolstadt.rows(frame)
        found = features(ingolstadt, road_map, ingolstadt.id[rows][ingolstadt.kind[rows] == Kind.CAR], frame)
        assert found["action_mask"][np.arange(len(found["action"])), found["action"]].all()
        actions += found["action"].tolist()
    assert len(set(actions)) > 8 and np.mean(np.array(actions) == FREE) < 0.1
