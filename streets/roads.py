"""What the tags of an OpenStreetMap way say of driving along it: whether one may, in which directions, how fast."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

# Classes of roads that cars drive on (the values of `highway`), from the largest to the smallest, with the speed where
# no limit is known, in km/h. `service` and all smaller ones are left out: they lead to doors, and not on.
CLASSES = {
    "motorway": 100.0,
    "trunk": 80.0,
    "primary": 60.0,
    "secondary": 50.0,
    "tertiary": 50.0,
    "unclassified": 40.0,
    "residential": 30.0,
    "living_street": 15.0,
}
# Slip roads and ramps count as the class that they lead to, at a lower speed.
LINKS = {
    "motorway_link": 60.0,
    "trunk_link": 50.0,
    "primary_link": 40.0,
    "secondary_link": 40.0,
    "tertiary_link": 40.0,
}
CLASS_NAMES = tuple(CLASSES)

# Who is asked about access, the most specific first, and the answers that keep a car out.
ACCESS_KEYS = ("motorcar", "motor_vehicle", "vehicle", "access")
NO_ACCESS = frozenset({"no", "private", "agricultural", "forestry", "delivery", "permit", "emergency"})
FORWARDS, BACKWARDS = frozenset({"yes", "true", "1"}), frozenset({"-1", "reverse"})
ROUNDABOUTS = frozenset({"roundabout", "circular"})

# What words stand for, in km/h; those of a country, such as FI:urban, by what comes after the colon.
SPEED_WORDS = {
    **{"none": 130.0, "walk": 6.0, "living_street": 15.0, "urban": 50.0, "nsl_single": 97.0, "nsl_dual": 113.0},
    **{"rural": 80.0, "trunk": 100.0, "motorway": 120.0},
}
KILOMETRES = {"": 1.0, "km/h": 1.0, "kmh": 1.0, "kph": 1.0, "mph": 1.609344, "knots": 1.852}
NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z/]*)")
ZONE = re.compile(r"zone:?(\d+)")
# No car stands still for ever, whatever a limit says.
SLOWEST = 5.0


class Road(NamedTuple):
    """A way as cars use it.

    Attributes:
        kind: index of its class in `CLASS_NAMES`.
        forwards: speed in the way's own direction, km/h; None where that may not be driven.
        backwards: likewise, against it.
    """

    kind: int
    forwards: float | None
    backwards: float | None


def road(tags: Mapping[str, str]) -> Road | None:
    """What the tags of a way say; None where it is no road for cars."""
    highway = tags.get("highway", "")
    default = CLASSES.get(highway) or LINKS.get(highway)
    if default is None or tags.get("area") == "yes" or not _open_to_cars(tags):
        return None
    forwards, backwards = _directions(tags, highway)
    limit = speed(tags.get("maxspeed", "")) or default
    there, back = (speed(tags.get(f"maxspeed:{way}", "")) or limit for way in ("forward", "backward"))
    kind = CLASS_NAMES.index(highway.removesuffix("_link"))
    return Road(kind, there if forwards else None, back if backwards else None)


def speed(text: str) -> float | None:
    """What a value of `maxspeed` stands for, in km/h: the lowest of several; None where it says nothing.

    `30`, `30 mph`, `none`, `walk`, `FI:urban`, `DE:zone:30`, `50;30`.
    """
    found = [each for each in map(_one_speed, re.split(r"[;|,]", text.lower())) if each]
    return max(SLOWEST, min(found)) if found else None


def _one_speed(text: str) -> float | None:
    text = text.strip()
    if zone := ZONE.search(text):
        return float(zone[1])
    if number := NUMBER.fullmatch(text):
        factor = KILOMETRES.get(number[2])
        return None if factor is None else factor * float(number[1])
    return SPEED_WORDS.get(text.rpartition(":")[2])


def _open_to_cars(tags: Mapping[str, str]) -> bool:
    said = next((tags[key] for key in ACCESS_KEYS if key in tags), "yes")
    return said not in NO_ACCESS


def _directions(tags: Mapping[str, str], highway: str) -> tuple[bool, bool]:
    """Whether a way may be driven in its own direction, and against it."""
    implied = tags.get("junction") in ROUNDABOUTS or highway == "motorway"
    oneway = tags.get("oneway", "yes" if implied else "no")
    return oneway not in BACKWARDS, oneway not in FORWARDS
