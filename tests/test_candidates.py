"""Candidates: trajectories along lines at some speeds, which of them there are, and which a logged future took."""

from __future__ import annotations

import numpy as np
import pytest

from driving.candidates import ACTIONS, FREE, MODES, STEPS, action_mask, candidates, follow, label
from driving.lines import LINE_FEATURES, LINES, POINTS, SPACING

LIMIT = 10.0
TIMES = 0.5 * np.arange(1, STEPS + 1)


def straight_lines(*offsets: float, points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Lines ahead, so many metres to the left."""
    lines = np.zeros((1, LINES, POINTS, LINE_FEATURES), np.float32)
    valid = np.zeros((1, LINES, POINTS), bool)
    for row, offset in enumerate(offsets):
        lines[0, row, :points, 0] = SPACING * np.arange(points)
        lines[0, row, :points, 1] = offset
        lines[0, row, :points, 2] = 1
        valid[0, row, :points] = True
    return lines, valid


def ego(speed: float, limit: float = LIMIT) -> np.ndarray:
    return np.array([[speed, 0, 0, 4, 2, limit]], np.float32)


def future(speed: float, y: float = 0.0) -> np.ndarray:
    return np.stack((speed * TIMES, np.full(STEPS, y), np.zeros(STEPS)), 1)[None].astype(np.float32)


def all_valid() -> np.ndarray:
    return np.ones((1, STEPS), bool)


def test_modes_come_to_shares_of_the_limit():
    lines, valid = straight_lines(0.0)
    found = candidates(lines, valid, ego(10.0))[0, :MODES, :, 0]
    # At the limit, mode 5 holds it; mode 4 loses 2 m/s in a second, 9 m, and holds 8 m/s for 7 s.
    assert found[5] == pytest.approx(10 * TIMES, abs=1e-4) and found[4, -1] == pytest.approx(9 + 56, abs=1e-3)
    # Mode 0 stops after 10^2 / (2 * 4.5) m, steps of a quarter of a second apart.
    assert found[0, -1] == pytest.approx(100 / 9, abs=0.15) and (np.diff(found[0, 6:]) == 0).all()
    assert (np.diff(found, axis=0) >= 0).all() and (np.diff(found[:, -1]) > 0).all()


def test_modes_gain_speed_from_rest():
    lines, valid = straight_lines(0.0)
    found = candidates(lines, valid, ego(0.0))[0, :MODES, :, 0]
    assert found[0].tolist() == [0] * STEPS
    # Mode 5: 5 s at 2 m/s^2, 25 m, and 3 s at 10 m/s.
    assert found[5, -1] == pytest.approx(55, abs=1e-3) and found[1, 1] == pytest.approx(1.0, abs=1e-4)


def test_a_candidate_comes_to_its_line_from_beside_it():
    lines, valid = straight_lines(3.0)
    found = candidates(lines, valid, ego(10.0))[0, 5]
    # A cubic over the way of 3 s, whose middle it reaches half way.
    assert found[2, :2] == pytest.approx([15, 1.5], abs=1e-3) and found[5, :2] == pytest.approx([30, 3], abs=1e-3)
    assert found[2, 2] == pytest.approx(np.arctan(1.5 * 3 / 30), abs=1e-3) and found[-1, 2] == pytest.approx(0)
    assert (np.diff(found[:, 1]) >= -1e-6).all()


def test_a_candidate_begins_with_the_heading_of_the_ego():
    lines, valid = straight_lines(0.0)
    turn = 0.3
    lines[0, 0, :, 1] = np.sin(turn) * lines[0, 0, :, 0]
    lines[0, 0, :, 0] *= np.cos(turn)
    lines[0, 0, :, 2:4] = np.cos(turn), np.sin(turn)
    found = candidates(lines, valid, ego(1.0))[0, 1]
    assert np.arctan2(found[0, 1], found[0, 0]) < turn / 3 and found[-1, 2] == pytest.approx(turn, abs=0.1)


def test_a_bend_is_not_taken_faster_than_is_comfortable():
    lines, valid = straight_lines(0.0)
    # A circle of 16 m: at 4 m/s^2 across it is driven at 8 m/s.
    angle = SPACING * np.arange(POINTS) / 16
    lines[0, 0, :, :4] = np.stack((16 * np.sin(angle), 16 * (1 - np.cos(angle)), np.cos(angle), np.sin(angle)), 1)
    found = candidates(lines, valid, ego(8.0, limit=20.0))[0, 5]
    driven = np.linalg.norm(np.diff(found[:, :2], axis=0), axis=1) / 0.5
    assert driven == pytest.approx(np.full(STEPS - 1, 8.0), abs=0.1)
    assert np.linalg.norm(found[:, :2] - [0, 16], axis=1) == pytest.approx(np.full(STEPS, 16.0), abs=0.1)


def test_a_bend_far_ahead_is_braked_for_in_time():
    lines, valid = straight_lines(0.0)
    angle = np.maximum(SPACING * np.arange(POINTS) - 40, 0) / 9
    lines[0, 0, :, 2:4] = np.stack((np.cos(angle), np.sin(angle)), 1)
    lines[0, 0, 1:, :2] = np.cumsum(SPACING * lines[0, 0, :-1, 2:4], 0)
    found = candidates(lines, valid, ego(15.0, limit=20.0))[0, 5]
    driven = np.linalg.norm(np.diff(found[:, :2], axis=0), axis=1) / 0.5
    assert driven[0] > 10 and driven.min() < 6.3 and np.diff(driven).min() > -1.5


def test_a_candidate_goes_straight_on_where_its_line_ends():
    lines, valid = straight_lines(0.0, points=11)
    found = candidates(lines, valid, ego(10.0))[0, 5]
    assert found == pytest.approx(future(10.0)[0], abs=1e-4)


def test_the_candidate_without_a_line_keeps_its_heading_and_stops():
    lines, valid = straight_lines()
    found = candidates(lines, valid, ego(6.0))[0]
    assert not found[:FREE].any()
    # 1.5 m/s^2 stop 6 m/s within 4 s and 12 m.
    assert found[FREE, 7, 0] == pytest.approx(12) and found[FREE, -1].tolist() == [12, 0, 0]
    assert found[FREE, 0, 0] == pytest.approx(3 - 0.1875)


def test_the_mask_names_the_lines_that_there_are():
    _, valid = straight_lines(0.0, 3.0, points=5)
    assert action_mask(valid)[0].tolist() == [True] * 12 + [False] * 24 + [True]
    assert action_mask(np.zeros_like(valid))[0].tolist() == [False] * FREE + [True]
    assert ACTIONS == 37


@pytest.mark.parametrize("action", [0, 1, 3, 5, 9, 11])
def test_the_label_of_a_candidate_is_itself(action: int):
    lines, valid = straight_lines(0.0, 3.2)
    own = ego(6.0)
    assert label(candidates(lines, valid, own)[:, action], all_valid(), lines, valid, own).tolist() == [action]


def test_labels_of_futures():
    lines, valid = straight_lines(0.0, 3.2)
    for speed, y, known, action in (
        (10.0, 0.3, STEPS, 5),
        (10.0, 2.9, STEPS, 11),
        (0.0, 0.0, STEPS, 0),
        (10.0, 0.3, 1, 5),
        (10.0, -5.0, STEPS, FREE),
        (10.0, 0.0, 0, FREE),
    ):
        found = label(future(speed, y), np.arange(STEPS)[None] < known, lines, valid, ego(10.0))
        assert found.tolist() == [action], (speed, y, known)


def test_a_future_beyond_the_horizon_keeps_its_line():
    lines, valid = straight_lines(0.0)
    assert label(future(30.0), all_valid(), lines, valid, ego(30.0, limit=30.0)).tolist() == [5]


def test_a_future_beyond_the_end_of_a_road_has_left_its_line():
    lines, valid = straight_lines(0.0, points=11)
    assert label(future(10.0), all_valid(), lines, valid, ego(10.0)).tolist() == [FREE]


def test_without_a_line_the_label_is_the_last():
    lines, valid = straight_lines()
    assert label(future(10.0), all_valid(), lines, valid, ego(10.0)).tolist() == [FREE]


def test_follow_measures_along_and_beside():
    lines, valid = straight_lines(1.0)
    found = follow(np.array([[[-5, 1], [3, 0], [7.5, 3], [110, 1]]], np.float32), lines, valid)
    assert found.arc[0, 0] == pytest.approx([-5, 3, 7.5, 110])
    assert found.distance[0, 0] == pytest.approx([3, 1, 2, 8]) and found.beyond[0, 0].tolist() == [False] * 3 + [True]


def test_all_candidates_are_finite_whatever_comes():
    rng = np.random.default_rng(0)
    lines = rng.normal(0, 20, (50, LINES, POINTS, LINE_FEATURES)).astype(np.float32)
    valid = rng.random((50, LINES, POINTS)) < 0.7
    own = np.abs(rng.normal(0, 10, (50, 6))).astype(np.float32)
    own[:10, 5] = 0
    assert np.isfinite(candidates(lines * valid[..., None], valid, own)).all()
