"""Reference lines: which ways an ego has, in its own frame, how far they go, and where lights close them."""

from __future__ import annotations

import numpy as np
import pytest

from driving.lines import LINES, POINTS, Lines, closed_lanes, lane_of, reference_lines, ways_of
from driving.roads import Lane, RoadMap
from driving.scene import Light
from tests.driving_scenes import AHEAD, BESIDE, TURN, WEST, crossing, line


def lines_at(
    x: float, y: float, heading: float = 0.0, *, road_map: RoadMap | None = None, red: tuple[int, ...] = ()
) -> Lines:
    road_map = crossing() if road_map is None else road_map
    points, headings = np.array([[x, y]]), np.array([heading])
    lights = closed_lanes(road_map, np.array(red, np.int32), np.full(len(red), Light.RED, np.uint8))
    return reference_lines(road_map, lane_of(road_map, points, headings), points, headings, lights)


def counts(lines: Lines) -> list[int]:
    """How many points each line has."""
    return lines.valid[0].sum(1).tolist()


def test_lines_are_branches_and_the_lane_beside():
    found = lines_at(40.0, 0.5)
    # The way ahead and the turn, each 100 m, and the lane on the left, which ends after 60 m.
    assert counts(found) == [POINTS, POINTS, 31, 0, 0, 0]
    ahead, turn, beside = found.points[0, :3]
    assert ahead[0] == pytest.approx([0, -0.5, 1, 0, 0], abs=1e-4)
    assert ahead[50] == pytest.approx([100, -0.5, 1, 0, 0], abs=1e-4)
    assert beside[0] == pytest.approx([0, 2.5, 1, 0, 0], abs=1e-4)
    # 60 m to the junction, a quarter of a circle of 20 m (31.4 m), then north: 8.6 m.
    assert turn[50, :2] == pytest.approx([80, 20 - 0.5 + 8.6], abs=0.2)
    assert turn[50, 2:4] == pytest.approx([0, 1], abs=1e-6)


def test_lines_are_in_the_frame_of_the_ego():
    found = lines_at(120.0, 50.0, np.pi / 2)
    assert counts(found)[:2] == [26, 0]
    assert found.points[0, 0, 10] == pytest.approx([20, 0, 1, 0, 0], abs=1e-5)
    turned = lines_at(120.0, 50.0, np.pi / 2 - 0.5)
    assert turned.points[0, 0, 10] == pytest.approx([20 * np.cos(0.5), 20 * np.sin(0.5), np.cos(0.5), np.sin(0.5), 0])


def test_branches_beyond_the_horizon_are_one_line():
    long = crossing()
    ways = ways_of(long, WEST)
    assert len(ways.metres) == 2 and ways.parted.tolist() == [-np.inf, 100]
    assert counts(lines_at(5.0, 0.0))[0] == POINTS and counts(lines_at(5.0, 0.0))[1] == 48
    assert counts(lines_at(12.0, 0.0))[1] == POINTS


def test_both_branches_are_open_until_they_part():
    assert counts(lines_at(103.0, 0.1))[:2] == [POINTS - 2, POINTS]
    parted = lines_at(112.0, 4.5, 0.6)
    assert sum(count > 0 for count in counts(parted)) == 1
    assert parted.points[0, 0, 40, 1] > 20


@pytest.mark.parametrize(
    ("x", "y", "heading"), [(50.0, -3.5, 0.0), (50.0, 0.0, np.pi), (195.0, 0.0, 0.0), (120.0, 97.0, np.pi / 2)]
)
def test_an_ego_off_the_road_or_at_its_end_has_no_line(x: float, y: float, heading: float):
    found = lines_at(x, y, heading)
    assert not found.valid.any() and not found.points.any()


def test_a_red_light_closes_what_lies_behind_it():
    found = lines_at(40.0, 0.0, red=(TURN,))
    assert not found.points[0, 0, :, 4].any()
    light = found.points[0, 1, :, 4]
    assert light[:30].tolist() == [0] * 30 and light[31:].tolist() == [1] * 20


def test_a_light_that_was_passed_is_none():
    assert not lines_at(110.0, 0.0, red=(AHEAD,)).points[0, 0, :, 4].any()


def test_amber_is_half_of_red():
    found = closed_lanes(crossing(), np.array([TURN], np.int32), np.array([Light.AMBER], np.uint8))
    assert found[TURN] == 0.5 and found.sum() == 0.5


def test_there_are_six_lines_at_most_and_some_of_them_beside():
    ends = np.linspace(-0.5, 0.5, 9)
    fan = [Lane(f"fan_{n}", line((100, 0), (160, 60 * end)), 3.0, 10.0) for n, end in enumerate(ends)]
    road = Lane("road", line((0, 0), (100, 0)), 3.0, 10.0, successors=tuple(range(2, 11)), left=1)
    road_map = RoadMap("fan", [road, Lane("left", line((0, 3), (100, 3)), 3.0, 10.0, right=0), *fan])
    found = lines_at(50.0, 0.0, road_map=road_map)
    assert all(counts(found)) and len(counts(found)) == LINES
    assert found.points[0, -1, 0, 1] == pytest.approx(3) and np.abs(found.points[0, :-1, 0, 1]).max() == 0


def test_a_circle_of_lanes_has_an_end():
    angles = np.linspace(0, np.pi, 9)
    half = np.stack((5 * np.cos(angles), 5 * np.sin(angles)), 1).astype(np.float32)
    exits = [Lane(f"exit_{n}", line((x, 0), (3 * x, -1)), 3.0, 10.0) for n, x in enumerate((5, -5))]
    ring = RoadMap(
        "ring",
        [
            Lane("north", half, 3.0, 10.0, successors=(1, 3)),
            Lane("south", -half, 3.0, 10.0, successors=(0, 2)),
            *exits,
        ],
    )
    ways = ways_of(ring, 0)
    assert len(ways.metres) <= 24 and ways.metres.max() > 100


def test_a_lane_beside_begins_where_the_ego_is():
    found = lines_at(40.0, 3.0)
    assert found.points[0, 1, 0, :2] == pytest.approx([0, -3], abs=1e-4) and counts(found)[0] == 31
    assert BESIDE == 1


def test_egos_are_alike_alone_and_together():
    road_map, rng = crossing(), np.random.default_rng(0)
    points = rng.uniform((0, -4), (200, 8), (40, 2))
    headings = rng.uniform(-0.5, 0.5, 40)
    lights = closed_lanes(road_map, np.array([TURN], np.int32), np.array([Light.RED], np.uint8))
    together = reference_lines(road_map, lane_of(road_map, points, headings), points, headings, lights)
    assert 0 < together.valid.any((1, 2)).sum() < 40
    for ego in range(40):
        own = slice(ego, ego + 1)
        nearest = lane_of(road_map, points[own], headings[own])
        alone = reference_lines(road_map, nearest, points[own], headings[own], lights)
        assert (alone.points[0] == together.points[ego]).all() and (alone.valid[0] == together.valid[ego]).all()
