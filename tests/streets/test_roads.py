"""What tags say of driving."""

from __future__ import annotations

import pytest

from streets.roads import CLASS_NAMES, SLOWEST, Road, road, speed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30", 30.0),
        (" 50 ", 50.0),
        ("40 km/h", 40.0),
        ("30 mph", 48.28032),
        ("20mph", 32.18688),
        ("5 knots", 9.26),
        ("none", 130.0),
        ("walk", 6.0),
        ("FI:urban", 50.0),
        ("FI:rural", 80.0),
        ("DE:zone:30", 30.0),
        ("DE:zone30", 30.0),
        ("50;30", 30.0),
        ("60|80", 60.0),
        ("1", SLOWEST),
        ("", None),
        ("signals", None),
        ("30 leagues", None),
        ("XX:nowhere", None),
    ],
)
def test_speed_is_in_kilometres_per_hour(text: str, expected: float | None):
    assert speed(text) == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("tags", "forwards", "backwards"),
    [
        ({}, 30.0, 30.0),
        ({"oneway": "no"}, 30.0, 30.0),
        ({"oneway": "yes"}, 30.0, None),
        ({"oneway": "-1"}, None, 30.0),
        ({"junction": "roundabout"}, 30.0, None),
        ({"junction": "roundabout", "oneway": "no"}, 30.0, 30.0),
        ({"highway": "motorway"}, 100.0, None),
        ({"highway": "motorway_link"}, 60.0, 60.0),
        ({"maxspeed": "50"}, 50.0, 50.0),
        ({"maxspeed": "signals"}, 30.0, 30.0),
        ({"maxspeed": "50", "maxspeed:backward": "20"}, 50.0, 20.0),
        ({"access": "no", "motor_vehicle": "yes"}, 30.0, 30.0),
        ({"access": "destination"}, 30.0, 30.0),
    ],
)
def test_road_goes_where_and_as_fast_as_its_tags_say(
    tags: dict[str, str], forwards: float | None, backwards: float | None
):
    found = road({"highway": "residential", **tags})
    assert found is not None and (found.forwards, found.backwards) == (forwards, backwards)


@pytest.mark.parametrize(
    "tags",
    [
        {"highway": "service"},
        {"highway": "footway"},
        {"highway": "residential", "access": "private"},
        {"highway": "residential", "access": "yes", "motorcar": "no"},
        {"highway": "residential", "area": "yes"},
        {"building": "yes"},
    ],
)
def test_what_cars_do_not_drive_on_is_no_road(tags: dict[str, str]):
    assert road(tags) is None


def test_slip_roads_have_the_class_that_they_lead_to():
    assert road({"highway": "primary_link"}) == Road(CLASS_NAMES.index("primary"), 40.0, 40.0)
