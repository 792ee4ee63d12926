"""Networks of streets: which part is kept, how long driving takes, along which streets, and at which hour."""

from __future__ import annotations

import math

import numpy as np
import pytest

from streets.network import Network, connected, quickest_way, travel_seconds
from streets.roads import CLASS_NAMES
from streets.traffic import rush_seconds

PRIMARY, RESIDENTIAL = CLASS_NAMES.index("primary"), CLASS_NAMES.index("residential")


def network(
    points: list[tuple[float, float]], arcs: list[tuple[int, int]], *, speed: float = 36.0, kind: int = RESIDENTIAL
) -> Network:
    tails, heads = map(np.array, zip(*arcs, strict=True))
    return connected(np.array(points), tails, heads, np.full(len(arcs), speed), np.full(len(arcs), kind))


def both_ways(*arcs: tuple[int, int]) -> list[tuple[int, int]]:
    return [*arcs, *((end, begin) for begin, end in arcs)]


# A square with one-way sides, and a street from its last corner to an end.
POINTS = [(0.0, 0.0), (100.0, 0.0), (100.0, 100.0), (0.0, 100.0), (-100.0, 100.0)]
ARCS = [(0, 1), (1, 2), (2, 3), (3, 0), *both_ways((3, 4))]


def test_travel_seconds_follow_the_arrows():
    # At 36 km/h, 100 m take 10 s.
    seconds = travel_seconds(network(POINTS, ARCS), network(POINTS, ARCS).free_flow)
    assert seconds[0].tolist() == pytest.approx([0, 10, 20, 30, 40])
    assert seconds[1].tolist() == pytest.approx([30, 0, 10, 20, 30])
    assert seconds[4].tolist() == pytest.approx([20, 30, 40, 10, 0])


def test_travel_seconds_computed_in_pieces_are_the_same(monkeypatch):
    streets = network(POINTS, ARCS)
    whole = travel_seconds(streets, streets.free_flow)
    monkeypatch.setattr("streets.network.COMPUTED_AT_ONCE", 10)
    assert np.array_equal(travel_seconds(streets, streets.free_flow), whole)


def test_quickest_of_two_streets_between_the_same_points_counts():
    streets = network(POINTS, [*ARCS, (0, 1)])
    slow = np.array([10.0, 10.0, 10.0, 10.0, 10.0, 10.0, 4.0])
    assert travel_seconds(streets, slow)[0, 1] == pytest.approx(4)


def test_quickest_way_passes_every_point_between_the_stops():
    streets = network(POINTS, ARCS)
    assert quickest_way(streets, streets.free_flow, np.array([0, 4, 1])).tolist() == [0, 1, 2, 3, 4, 3, 0, 1]


def test_what_cannot_be_reached_and_left_again_is_no_part_of_the_network():
    points = [*POINTS, (200.0, 0.0), (300.0, 0.0), (400.0, 0.0)]
    # One street leads away and never back; two points lie apart.
    streets = network(points, [*ARCS, (1, 5), *both_ways((6, 7))])
    assert streets.points.tolist() == [list(point) for point in POINTS]
    assert len(streets.tails) == len(ARCS)


def test_places_are_all_points_or_the_junctions_of_many(monkeypatch):
    assert network(POINTS, ARCS).places.tolist() == [0, 1, 2, 3, 4]
    monkeypatch.setattr("streets.network.MOST_POINTS", 4)
    # Three streets meet at 3 and at 1, from which another leads to 5; streets end at 4 and at 5.
    streets = network([*POINTS, (200.0, 0.0)], [*ARCS, *both_ways((1, 5))])
    assert streets.places.tolist() == [1, 3, 4, 5]


def test_places_fill_the_longer_side_of_the_unit_square():
    coords, side = network(POINTS, ARCS).unit_square()
    assert side == 200
    assert coords.tolist() == [[0.5, 0.0], [1.0, 0.0], [1.0, 0.5], [0.5, 0.5], [0.0, 0.5]]


@pytest.mark.parametrize(("most", "message"), [(4, "has 5 junctions; .*4 at most"), (5_000, "has 2 places that can")])
def test_networks_with_too_few_or_too_many_places_are_refused(most: int, message: str, monkeypatch):
    monkeypatch.setattr("streets.network.MOST_PLACES", most)
    monkeypatch.setattr("streets.network.MOST_POINTS", 3 if most == 4 else 2_500)
    star = both_ways((0, 1), (0, 2), (0, 3), (0, 4))
    with pytest.raises(ValueError, match=message):
        network(POINTS, star if most == 4 else both_ways((0, 1)))


def radial(kind: int) -> Network:
    """A street through the centre of four places, the second and the third 100 m from it."""
    points = [(-300.0, 0.0), (-100.0, 0.0), (100.0, 0.0), (300.0, 0.0)]
    return network(points, both_ways((0, 1), (1, 2), (2, 3)), kind=kind)


def test_rush_jams_large_streets_towards_the_centre_in_the_morning():
    streets = radial(PRIMARY)
    times = rush_seconds(streets, 8.0) / streets.free_flow
    late = 9 * math.exp(-(((8 - 17) / 2) ** 2) / 2)
    # Inwards, along the middle, outwards; and back.
    assert times[[0, 2]] == pytest.approx([10, 1 + late])
    assert times[[5, 3]] == pytest.approx([10, 1 + late])


def test_rush_jams_large_streets_away_from_the_centre_in_the_evening():
    streets = radial(PRIMARY)
    morning, evening = rush_seconds(streets, 8.0), rush_seconds(streets, 17.0)
    assert evening[[2, 3]] == pytest.approx(morning[[5, 0]])


def test_rush_spares_small_streets():
    streets = radial(RESIDENTIAL)
    assert rush_seconds(streets, 8.0) == pytest.approx(streets.free_flow)
