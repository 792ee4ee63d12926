"""From a log to scenarios: where a car's way is cut, what it does over each stretch, and the token of each."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest

from driving.roads import Lane, RoadMap
from driving.scene import COLUMNS, Kind, Log
from scenarios.builder import build
from scenarios.manoeuvres import Course, following, lane_changes, type_of
from scenarios.scenario import Scenario, token_of
from tests.driving_scenes import AHEAD, BESIDE, EAST, NORTH, TURN, WEST, crossing, line, log_of, straight


def built(log: Log) -> list[Scenario]:
    return build(log, crossing()).scenarios


def course(speeds: list[float], *, turn: float = 0.0, change_at: int = -1, follows: float = 0.0) -> Course:
    """Of an ego that turns evenly, changes lanes in one row, and follows somebody in the first share of the rows."""
    rows = np.arange(len(speeds))
    headings = np.linspace(0, turn, len(speeds))
    return Course(np.array(speeds), headings, rows == change_at, rows < follows * len(speeds))


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (course([0.4, 0.0, 0.4]), "stationary"),
        (course([0.4, 0.6, 0.4]), "free"),
        (course([8, 8, 8], change_at=1), "lane_change"),
        # That it has changed before its first row is no part of a scenario.
        (course([8, 8, 8], change_at=0), "free"),
        (course([8, 8, 8], turn=0.8), "turn_left"),
        (course([8, 8, 8], turn=-0.8), "turn_right"),
        (course([8, 8, 8], turn=0.7), "free"),
        (course([0, 1, 2.5]), "starting"),
        (course([0, 1, 1.5]), "free"),
        (course([2.5, 1, 0]), "stopping"),
        (course([8, 8, 8, 8], follows=0.75), "following"),
        (course([8, 8, 8, 8], follows=0.5), "free"),
        # The first that fits.
        (course([0, 1, 2.5], turn=0.8), "turn_left"),
        (course([0, 1, 2.5], turn=0.8, change_at=1), "lane_change"),
    ],
)
def test_type_is_what_the_ego_does(seen: Course, expected: str):
    assert type_of(seen) == expected


def test_turn_is_told_across_the_jump_of_headings():
    headings = np.array([3.0, 3.3, 3.6, 3.9])
    wrapped = np.arctan2(np.sin(headings), np.cos(headings))
    assert type_of(course([8] * 4)._replace(headings=wrapped)) == "turn_left"


def test_lane_changes_are_told_from_going_on():
    before, after = np.array(
        [
            [WEST, WEST],
            [WEST, AHEAD],
            [WEST, TURN],
            # Across a junction within half a second.
            [WEST, EAST],
            [WEST, NORTH],
            [WEST, BESIDE],
            [BESIDE, WEST],
            # And on from the lane beside it.
            [BESIDE, AHEAD],
            [WEST, -1],
            [-1, WEST],
        ]
    ).T
    expected = [False] * 5 + [True] * 3 + [False] * 2
    assert lane_changes(before, after, crossing()).tolist() == expected


def test_lane_changes_of_nobody_are_none():
    nobody = np.zeros(0, np.int32)
    assert lane_changes(nobody, nobody, crossing()).shape == (0,)


def test_following_is_behind_another_on_the_same_way():
    log = log_of(
        {
            # 12 m behind the next one, and it comes 20 m in 2.5 s.
            1: [(0, 0, 0, 8)],
            2: [(12, 0, 0, 0)],
            # Within a lane's width beside the first one.
            3: [(-4, 3, 0, 8)],
            # In front of the second one, in the other direction.
            4: [(18, 0, np.pi, 8)],
            # Too far behind for standing.
            5: [(-13, 0, 0, 0)],
        }
    )
    assert following(log).tolist() == [True, False, False, False, False]


def test_way_of_a_car_is_cut_every_ten_seconds():
    scenarios = built(log_of({5: straight(0, 2.0, 45)}, begin={5: 3}))
    assert [(one.frame, one.rows) for one in scenarios] == [(3, 21), (24, 21), (45, 3)]
    assert [one.displacement for one in scenarios] == [20.0, 20.0, 2.0]
    assert {(one.log, one.map, one.agent) for one in scenarios} == {("by_hand", "crossing", 5)}
    assert scenarios[2].speeds == (2.0, 2.0, 2.0) and scenarios[1].seconds == 12.0


def test_single_row_is_no_scenario_and_is_counted():
    found = build(log_of({5: straight(0, 2.0, 22)}), crossing())
    assert len(found.scenarios) == 1 and found.left_out == Counter({"stretches of a single row": 1})


def test_only_cars_are_egos():
    tracks = {agent: straight(10.0 * agent, 2.0, 3) for agent in range(4)}
    log = log_of(tracks, kinds={1: Kind.HEAVY, 2: Kind.BICYCLE, 3: Kind.PEDESTRIAN})
    assert [one.agent for one in built(log)] == [0]


def test_car_that_is_put_elsewhere_is_two_stretches():
    track = straight(0, 4.0, 5) + straight(100, 4.0, 4)
    assert [(one.frame, one.rows) for one in built(log_of({1: track}))] == [(0, 5), (5, 4)]


def test_car_that_is_away_for_a_frame_is_two_stretches():
    log = log_of({1: straight(0, 4.0, 9), 2: straight(50, 4.0, 9)})
    row = int(log.find(np.array(1), np.array(4)))
    columns: dict[str, Any] = {name: np.delete(getattr(log, name), row) for name in COLUMNS if name != "first"}
    first = log.first - (np.arange(len(log.first)) > 4)
    scenarios = built(dataclasses.replace(log, first=first, **columns))
    assert [(one.agent, one.frame, one.rows) for one in scenarios] == [(1, 0, 4), (1, 5, 4), (2, 0, 9)]


def test_goal_is_on_a_road_where_the_way_ends_on_a_lane():
    leaves = [*straight(0, 4.0, 27), *((54.0 + 2 * step, -3.0 * step, 0.0, 4.0) for step in (1, 2, 3))]
    tracks = {1: straight(0, 4.0, 30), 2: straight(0, 4.0, 30, y=-50), 3: leaves}
    scenarios = built(log_of(tracks, road_map=crossing()))
    assert [(one.agent, one.goal_on_road) for one in scenarios] == [
        *((1, True), (1, True)),
        *((2, False), (2, False)),
        *((3, False), (3, False)),
    ]


def test_change_between_two_stretches_belongs_to_none():
    # The 22nd row is the first one of the second stretch, on the lane beside.
    track = straight(0, 2.0, 21) + [(x, 3.0, 0.0, 2.0) for x in (21.0, 22.0, 23.0)]
    assert [one.type for one in built(log_of({1: track}, road_map=crossing()))] == ["free", "free"]
    earlier = straight(0, 2.0, 20) + [(x, 3.0, 0.0, 2.0) for x in (20.0, 21.0)]
    assert built(log_of({1: earlier}, road_map=crossing()))[0].type == "lane_change"


def test_token_is_ever_the_same_and_differs_by_what_it_names():
    assert token_of("log-a", 1, 0, rows=21) == "a542b4a8853da58c"
    named = [("log-a", 1, 0), ("log-b", 1, 0), ("log-a", 2, 0), ("log-a", 1, 2)]
    assert len({token_of(*what, rows=rows) for what in named for rows in (1, 2)}) == 8


def test_no_frame_of_an_agent_is_in_two_scenarios():
    scenarios = built(log_of({1: straight(0, 2.0, 50), 2: straight(40, 1.0, 33)}))
    rows = [(one.agent, one.frame + row) for one in scenarios for row in range(one.rows)]
    assert len(rows) == len(set(rows)) == 50 + 33


def test_lanes_of_a_map_that_leads_nowhere_are_no_change():
    road = RoadMap("two", [Lane("a", line((0, 0), (9, 0)), 3.0, 9.0), Lane("b", line((0, 3), (9, 3)), 3.0, 9.0)])
    assert lane_changes(np.array([0]), np.array([1]), road).tolist() == [False]
