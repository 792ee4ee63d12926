from pathlib import Path

import numpy as np
import pytest

from routing.files import read_instances
from routing.instances import reference_tour
from routing.metrics import (
    EXACT,
    FILE_METRICS,
    GREAT_CIRCLE,
    MEAN_RADIUS_KM,
    distance_matrix,
    leg_lengths,
    longest_leg,
    plane,
    plane_unit,
    tour_length,
    tour_lengths,
)

TSPLIB_FOLDER = Path(__file__).parents[3] / "shared" / "data" / "tsplib"


@pytest.mark.parametrize(
    ("metric", "lengths"),
    [
        # Legs of 0.5, 1.25, 2.5 and 10 along a line. ATT divides by the root of 10: 0.16, 0.40, 0.79 and 3.16, each
        # rounded to the nearest integer, or to the next where that is less.
        (EXACT, [0.5, 1.25, 2.5, 10]),
        ("EUC_2D", [1, 1, 3, 10]),
        ("CEIL_2D", [1, 2, 3, 10]),
        ("FLOOR_2D", [0, 1, 2, 10]),
        ("ATT", [1, 1, 1, 4]),
        # The last leg goes 6 along one axis and 8 along the other.
        ("MAN_2D", [1, 1, 3, 14]),
        ("MAX_2D", [1, 1, 3, 8]),
    ],
)
def test_leg_lengths_round_as_their_metric_says(metric, lengths):
    targets = np.array([[0.5, 0], [1.25, 0], [0, 2.5], [6, 8]])
    assert leg_lengths(np.zeros((4, 2)), targets, metric).tolist() == lengths


def test_leg_lengths_of_geographical_positions_read_minutes_after_the_point():
    # A quarter of the equator, 6378.388 pi / 2 = 10019.15, and the same from 0 degrees 30 minutes to 90 degrees 30;
    # one degree is 111.3 km. 1 is added before the fraction is cut off.
    origin = np.array([[0, 0], [0, 0.30], [0.0, 10]])
    target = np.array([[0, 90], [0, 90.30], [0.30, 10]])
    assert leg_lengths(origin, target, "GEO").tolist() == [10020, 10020, 56]


@pytest.mark.parametrize(
    ("metric", "length"), [("EUC_3D", 7), ("CEIL_3D", 8), ("MAN_3D", 11), ("MAX_3D", 6), (EXACT, np.sqrt(53.96))]
)
def test_leg_lengths_take_a_third_coordinate(metric, length):
    # 2, 3 and 6.4 apart: 11.4 in all, and the root of 53.96, 7.3, in a straight line.
    assert leg_lengths(np.array([[1.0, 2, 6.4]]), np.array([[3.0, -1, 0]]), metric)[0] == pytest.approx(length)


def test_leg_lengths_of_great_circles_are_arcs_of_the_mean_radius():
    # A quarter of the equator, from pole to pole, over the date line, a metre, and to the same place.
    origin = np.array([[0.0, 0], [90, 7], [0, 179], [60, 10], [50, 8]])
    target = np.array([[0.0, 90], [-90, 55], [0, -179], [60 + 1e-5, 10], [50, 8]])
    arcs = np.radians([90, 180, 2, 1e-5, 0])
    np.testing.assert_allclose(leg_lengths(origin, target, GREAT_CIRCLE), MEAN_RADIUS_KM * arcs, rtol=1e-6)


def test_tour_lengths_close_each_tour_and_count_no_leg_to_the_node_itself():
    square = np.array([[[0.0, 0], [0, 1], [1, 1], [1, 0]]])
    tours = np.array([[[0, 1, 2, 3], [0, 2, 1, 3]]])
    np.testing.assert_allclose(tour_lengths(square, tours, EXACT), [[4, 2 + 2 * np.sqrt(2)]])
    assert tour_length(np.ones((1, 2)), np.array([0]), "GEO") == 0


@pytest.mark.parametrize("metric", FILE_METRICS)
def test_tour_length_is_whole_and_agrees_with_the_distance_matrix(metric):
    coords = np.random.default_rng(0).uniform(-80, 80, (7, 3 if metric.endswith("_3D") else 2))
    tour = np.random.default_rng(1).permutation(7)
    length = tour_length(coords, tour, metric)
    assert isinstance(length, int)
    assert length == distance_matrix(coords, metric)[tour, np.roll(tour, -1)].sum()


@pytest.mark.skipif(not TSPLIB_FOLDER.is_dir(), reason="TSPLIB files are not part of the repository")
@pytest.mark.parametrize(
    ("name", "optimum"),
    [("berlin52", 7542), ("eil51", 426), ("st70", 675), ("att48", 10628), ("burma14", 3323), ("ulysses16", 6859)],
)
def test_lkh_finds_the_published_optimum_of_tsplib_files(name, optimum):
    (instance,) = read_instances(TSPLIB_FOLDER / f"{name}.tsp")
    tour = reference_tour(distance_matrix(instance.coords, instance.metric))
    assert tour_length(instance.coords, tour, instance.metric) == optimum


def random_nodes(metric, *, count=6):
    """In three coordinates, where a metric takes them, about as flat as a city."""
    coords = np.random.default_rng(0).uniform(40, 48, (count, 2))
    if metric.endswith("_3D"):
        coords = np.concatenate((coords, np.random.default_rng(1).uniform(0, 1, (count, 1))), 1)
    return coords if metric in ("GEO", GREAT_CIRCLE) else 1000 * coords


@pytest.mark.parametrize("metric", [EXACT, GREAT_CIRCLE, *FILE_METRICS])
def test_plane_distances_times_its_unit_are_about_those_of_the_metric(metric):
    coords = random_nodes(metric)
    flat = plane(coords, metric)
    straight = np.linalg.norm(flat[:, None] - flat[None], axis=-1) * plane_unit(metric)
    # By blocks, or along the longer side, a leg is up to 41 % off its mean over all directions.
    tolerance = 0.42 if metric.startswith("MA") else 0.1
    np.testing.assert_allclose(straight, distance_matrix(coords, metric), rtol=tolerance, atol=1)


@pytest.mark.parametrize("metric", ["GEO", GREAT_CIRCLE])
def test_plane_keeps_neighbours_across_the_date_line_together(metric):
    across = np.array([[-18.0, 178], [-17, -179], [-21, -175], [-13, -172]])
    aside = across - [[0, 10]]
    aside[:, 1] = np.where(aside[:, 1] < -180, aside[:, 1] + 360, aside[:, 1])
    legs = [np.linalg.norm(np.diff(plane(nodes, metric), axis=0), axis=-1) for nodes in (across, aside)]
    np.testing.assert_allclose(legs[0], legs[1], rtol=1e-9)
    assert max(legs[0]) < 10


@pytest.mark.parametrize("metric", [EXACT, GREAT_CIRCLE, *FILE_METRICS])
def test_longest_leg_is_exceeded_by_none(metric):
    coords = random_nodes(metric, count=30)
    assert distance_matrix(coords, metric).max() <= longest_leg(coords, metric)
