"""Which scenarios a filter takes: every key by a case made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from config import ConfigError, UserError
from scenarios.filtering import apply, rises
from scenarios.scenario import Scenario, token_of
from tests.scenario_scenes import filter_settings, scenario

TURN = scenario(1, 0, log="a-0-00000", type="turn_left", displacement=30.0)
STOP = scenario(2, 0, log="a-0-00060", type="stopping", speeds=(9.0, 4.0, 0.0), displacement=12.0)
START = scenario(3, 0, log="b-0-00000", map="town", type="starting", speeds=(0.0, 5.0), goal_on_road=False)
FREE = scenario(1, 42, log="a-0-00000", displacement=60.0)
ALL = [TURN, STOP, START, FREE]


def taken(scenarios: list[Scenario] = ALL, *, seed: int = 0, **changes: Any) -> list[Scenario]:
    return apply(scenarios, filter_settings(**changes), seed=seed).scenarios


def test_filter_that_asks_nothing_takes_all_in_their_order():
    assert taken() == ALL


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"types": ["turn_left", "free"]}, [TURN, FREE]),
        ({"tokens": [STOP.token, FREE.token]}, [STOP, FREE]),
        ({"logs": ["a-0-00000"]}, [TURN, FREE]),
        ({"logs": ["a-*"]}, [TURN, STOP, FREE]),
        ({"logs": ["a-0-00000", "b-*"]}, [TURN, START, FREE]),
        ({"logs": ["a-0-0006?"]}, [STOP]),
        ({"maps": ["town"]}, [START]),
        ({"drop_invalid_goals": True}, [TURN, STOP, FREE]),
        ({"least_displacement": 12.0}, [TURN, STOP, FREE]),
        ({"least_displacement": 12.01}, [TURN, FREE]),
        ({"start_speed": 0.5}, [START]),
        ({"stop_speed": 0.5}, [STOP]),
        ({"stop_speed": 0.0}, [STOP]),
        # 9 m/s is above 8.9, but not by more than what counts as noise.
        ({"stop_speed": 8.9}, []),
        ({"stop_speed": 8.9, "speed_tolerance": 0.05}, [STOP]),
        ({"types": ["turn_left", "free"], "least_displacement": 40.0}, [FREE]),
    ],
    ids=str,
)
def test_filter_takes_what_fits(changes: dict[str, Any], expected: list[Scenario]):
    if expected:
        assert taken(**changes) == expected
    else:
        with pytest.raises(UserError, match="none is taken"):
            taken(**changes)


@pytest.mark.parametrize(
    ("speeds", "expected"),
    [
        ((0.5, 0.61), True),
        ((0.5, 0.6), False),
        ((0.61, 0.5), False),
        ((0.7, 0.5, 0.7), True),
        ((0.51, 0.9), False),
        ((0.5, 0.55, 0.5, 0.6), False),
    ],
)
def test_speed_rises_from_a_threshold_by_more_than_noise(speeds: tuple[float, ...], expected: bool):
    assert rises(speeds, 0.5, tolerance=0.1) == expected


def test_least_gap_is_between_scenarios_of_one_ego():
    # Of one ego at 0, 10.5, 21 and 31.5 s, and of another at 10.5 s.
    own = [scenario(1, frame) for frame in (0, 21, 42, 63)]
    other = scenario(2, 21)
    assert taken([own[0], own[1], other, own[2], own[3]], least_gap=20.0) == [own[0], other, own[2]]
    assert taken([*own], least_gap=10.5) == own


def test_least_gap_begins_with_the_earliest():
    early, late = scenario(1, 0), scenario(1, 21)
    assert taken([late, early], least_gap=20.0) == [early]


def test_scenarios_of_one_number_in_two_logs_are_of_two_egos():
    two = [scenario(1, 0, log="a"), scenario(1, 0, log="b")]
    assert taken(two, least_gap=20.0) == two


def test_expand_makes_a_scenario_of_every_row():
    rows = taken([STOP._replace(rows=3)], expand=True)
    assert [(one.frame, one.rows, one.type) for one in rows] == [(frame, 1, "stopping") for frame in (0, 1, 2)]
    assert [one.token for one in rows] == [token_of("a-0-00060", 2, frame, rows=1) for frame in (0, 1, 2)]
    assert all(one.speeds == STOP.speeds for one in rows)


def test_rows_of_what_is_expanded_are_counted_and_kept_apart():
    many = [scenario(1, 0, rows=21)]
    assert len(taken(many, expand=True, per_type=5)) == 5
    # From 0 to 10 s.
    assert [one.frame for one in taken(many, expand=True, least_gap=4.0)] == [0, 8, 16]


def test_numbers_of_each_type_and_in_all():
    many = [scenario(agent, type="free" if agent % 3 else "following") for agent in range(12)]
    kinds = [one.type for one in taken(many, per_type=3)]
    assert kinds.count("free") == kinds.count("following") == 3
    assert len(taken(many, total=5)) == 5 and len(taken(many, total=100)) == 12
    assert len(taken(many, total=0.25)) == 3
    assert len(taken(many, per_type=2, total=0.5)) == 2


def test_what_is_not_drawn_is_spread_evenly():
    many = [scenario(agent) for agent in range(10)]
    assert [one.agent for one in taken(many, total=5)] == [0, 2, 4, 6, 8]
    assert [one.agent for one in taken(many, per_type=3)] == [0, 3, 6]


def test_shuffle_draws_by_the_seed():
    many = [scenario(agent) for agent in range(20)]
    first, again, other = (taken(many, shuffle=True, total=10, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert set(first) != set(other) and set(first) < set(many)
    assert sorted(taken(many, shuffle=True)) == sorted(many) and taken(many, shuffle=True) != many


def test_filter_counts_what_it_leaves_out():
    filtered = apply(ALL, filter_settings(maps=["crossing"], total=2), seed=0)
    assert filtered.left_out == {"by scenario_filter.maps": 1, "by scenario_filter.total": 1}


def test_filter_that_takes_nothing_says_why():
    message = r"^of 4 scenarios none is taken \(3 by scenario_filter.types, 1 by scenario_filter.maps\); ask for less$"
    with pytest.raises(UserError, match=message):
        taken(types=["free"], maps=["town"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": [STOP.token, "0" * 16]}, f"scenario_filter.tokens has '{'0' * 16}', and no scenario is of it"),
        ({"maps": ["town", "nowhere"]}, "scenario_filter.maps has 'nowhere', .*; there are crossing, town"),
        ({"logs": ["a-*", "c-*"]}, r"scenario_filter.logs has 'c-\*', and no scenario is of it"),
    ],
)
def test_filter_refuses_names_that_there_are_not(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        taken(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"types": ["turn_lef"]}, "scenario_filter.types has 'turn_lef'; the nearest is 'turn_left'"),
        ({"types": [3]}, "scenario_filter.types has 3; it takes a list of names"),
        ({"tokens": ["../../etc"]}, "scenario_filter.tokens has '../../etc'; tokens are 16 of"),
        ({"start_speed": -1.0}, "scenario_filter.start_speed is -1; it must be at least 0"),
        ({"stop_speed": "slow"}, "scenario_filter.stop_speed is 'slow'; it takes a number, or null"),
        ({"total": 2.5}, "scenario_filter.total is 2.5; it takes a whole number, or a share"),
        ({"total": -1.0}, "scenario_filter.total is -1; it must be at least 0"),
        ({"per_type": -1}, "scenario_filter.per_type is -1"),
    ],
)
def test_filter_refuses_what_it_cannot_ask(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        filter_settings(**changes)
