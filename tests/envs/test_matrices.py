"""Matrices of costs, in every layout and file that may hold one."""

import itertools
import json

import numpy as np
import pytest

from routing import matrices
from routing.files import InstanceError, read_instances
from routing.layout import layout_by_costs, shown_at
from routing.metrics import EXACT, GIVEN

# Costs of one direction and of both, by hand: the cheapest way round the first is 0 3 1 2, 9 + 2 + 5 + 1.
ONE_WAY = np.array([[0, 8, 6, 9], [7, 0, 5, 3], [1, 4, 0, 8], [6, 2, 9, 0]])
BOTH_WAYS = np.array([[0, 1, 2, 3], [1, 0, 4, 5], [2, 4, 0, 6], [3, 5, 6, 0]])
# As TSPLIB lists the second one.
LISTED = {
    "FULL_MATRIX": "0 1 2 3 1 0 4 5 2 4 0 6 3 5 6 0",
    "UPPER_ROW": "1 2 3 4 5 6",
    "LOWER_ROW": "1 2 4 3 5 6",
    "UPPER_DIAG_ROW": "0 1 2 3 0 4 5 0 6 0",
    "LOWER_DIAG_ROW": "0 1 0 2 4 0 3 5 6 0",
    "UPPER_COL": "1 2 4 3 5 6",
    "LOWER_COL": "1 2 3 4 5 6",
    "UPPER_DIAG_COL": "0 1 0 2 4 0 3 5 6 0",
    "LOWER_DIAG_COL": "0 1 2 3 0 4 5 0 6 0",
}


def tsplib(numbers, layout="FULL_MATRIX", *, kind="TSP", dimension=4, head=(), tail=()):
    first = [f"TYPE: {kind}", f"DIMENSION: {dimension}", "EDGE_WEIGHT_TYPE: EXPLICIT", f"EDGE_WEIGHT_FORMAT: {layout}"]
    return "\n".join([*first, *head, "EDGE_WEIGHT_SECTION", numbers, *tail, "EOF", ""])


def spaced(matrix):
    return " ".join(map(str, np.asarray(matrix).ravel()))


def lines(rows, separator=","):
    return "".join(separator.join(map(str, row)) + "\n" for row in rows)


def write(folder, name, content):
    path = folder / name
    path.write_text(content)
    return path


def costs_of(instance):
    assert instance.costs is not None
    return instance.costs.tolist()


def read(folder, name, content):
    (instance,) = read_instances(write(folder, name, content))
    return instance


def refusal(path):
    with pytest.raises(InstanceError) as caught:
        read_instances(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message.removeprefix(str(path))


@pytest.mark.parametrize("layout", matrices.LAYOUTS)
def test_read_instances_reads_every_layout_of_tsplib(layout, tmp_path):
    instance = read(tmp_path, "own.tsp", tsplib(LISTED[layout], layout))
    assert costs_of(instance) == BOTH_WAYS.tolist()
    assert (instance.problem, instance.metric, instance.coords.shape) == ("tsp", GIVEN, (4, 0))


@pytest.mark.parametrize("width", [1, 3, 5, 16])
def test_read_instances_takes_numbers_broken_into_lines_anywhere(width, tmp_path):
    words = iter(LISTED["UPPER_ROW"].split())
    broken = "\n".join(" ".join(piece) for piece in iter(lambda: tuple(itertools.islice(words, width)), ()))
    assert costs_of(read(tmp_path, "own.tsp", tsplib(broken, "UPPER_ROW"))) == BOTH_WAYS.tolist()


@pytest.mark.parametrize("kind", ["TSP", "ATSP"])
def test_read_instances_keeps_the_direction_of_costs(kind, tmp_path):
    instance = read(tmp_path, "own.atsp", tsplib(spaced(ONE_WAY), kind=kind))
    assert instance.tour_length(np.array([0, 3, 1, 2])) == 17
    assert instance.tour_length(np.array([2, 1, 3, 0])) == 4 + 3 + 6 + 6


def test_read_instances_takes_a_full_matrix_where_an_atsp_names_no_layout(tmp_path):
    text = tsplib(spaced(ONE_WAY), kind="ATSP").replace("EDGE_WEIGHT_FORMAT: FULL_MATRIX\n", "")
    assert costs_of(read(tmp_path, "own.atsp", text)) == ONE_WAY.tolist()


@pytest.mark.parametrize("diagonal", ["9999", "100000000", "-1", "inf", "1e30"])
def test_read_instances_does_not_look_at_what_stands_from_a_node_to_itself(diagonal, tmp_path):
    rows = ONE_WAY.astype(object)
    np.fill_diagonal(rows, diagonal)
    for name, text in (("own.atsp", tsplib(spaced(rows), kind="ATSP")), ("own.csv", lines(rows))):
        instance = read(tmp_path, name, text)
        assert instance.costs.dtype == np.int64 and costs_of(instance) == ONE_WAY.tolist()


def test_read_instances_keeps_whole_lengths_whole_and_others_as_they_are(tmp_path):
    tour = np.arange(4)
    huge = 10**12 * (ONE_WAY > 0)
    assert read(tmp_path, "huge.csv", lines(huge)).tour_length(tour) == 4 * 10**12
    length = read(tmp_path, "own.csv", lines(ONE_WAY + 0.5)).tour_length(tour)
    assert isinstance(length, float) and length == 8.5 + 5.5 + 8.5 + 6.5


def test_read_instances_reads_a_cvrp_of_costs(tmp_path):
    loads = ["DEMAND_SECTION", "1 0", "2 2", "3 2", "4 1", "DEPOT_SECTION", "1", "-1"]
    head = ["CAPACITY: 3", "VEHICLES: 2", "COMMENT: (Optimal value: 24)"]
    instance = read(tmp_path, "own.vrp", tsplib(spaced(ONE_WAY), kind="CVRP", head=head, tail=loads))
    assert (instance.problem, instance.demand.tolist(), instance.capacity) == ("cvrp", [0, 2, 2, 1], 3)
    assert (instance.vehicles, instance.reference) == (2, 24)
    assert instance.tour_length(np.array([0, 1, 0, 2, 3])) == 8 + 7 + 6 + 8 + 6


def test_read_instances_holds_a_route_limit_against_the_longest_cost(tmp_path):
    loads = ["DEMAND_SECTION", "1 0", "2 2", "3 2", "4 1", "DEPOT_SECTION", "1", "-1"]
    text = tsplib(spaced(ONE_WAY), kind="CVRP", head=["CAPACITY: 3", "DISTANCE: 36"], tail=loads)
    assert costs_of(read(tmp_path, "own.vrp", text)) == ONE_WAY.tolist()
    message = refusal(write(tmp_path, "own.vrp", text.replace("DISTANCE: 36", "DISTANCE: 35")))
    assert message.startswith(":6: DISTANCE limits the routes to 35, and one could have 36;")


@pytest.mark.parametrize("section", ["DISPLAY_DATA_SECTION", "NODE_COORD_SECTION"])
def test_read_instances_keeps_where_a_file_shows_its_nodes(section, tmp_path):
    places = [section, "1 5 6", "3 1 2", "2 7 8", "4 3 4"]
    instance = read(tmp_path, "own.tsp", tsplib(LISTED["UPPER_ROW"], "UPPER_ROW", tail=places))
    assert shown_at(instance).tolist() == [[5, 6], [7, 8], [1, 2], [3, 4]]
    assert instance.tour_length(np.arange(4)) == 1 + 4 + 6 + 3


NAMED = [("", *"abcd"), *((name, *row) for name, row in zip("abcd", ONE_WAY, strict=True))]
TABLES = {
    "plain.csv": lines(ONE_WAY),
    "plain.tsv": lines(ONE_WAY, "\t"),
    "plain.txt": lines(ONE_WAY, "  "),
    "named.csv": lines(NAMED),
    "corner.csv": lines([("from/to", *"abcd"), *NAMED[1:]]),
    "frame.csv": lines([("", 0, 1, 2, 3), *((row, *costs) for row, costs in enumerate(ONE_WAY))]),
    "postcodes.csv": lines([("", 101, 202, 303, 404), *zip((101, 202, 303, 404), *ONE_WAY.T, strict=True)]),
    "named_above.csv": lines([tuple("abcd"), *ONE_WAY]),
    "counted_above.csv": lines([(0, 1, 2, 3), *ONE_WAY]),
    "named_beside.csv": lines(NAMED[1:]),
    "counted_beside.csv": lines((row, *costs) for row, costs in enumerate(ONE_WAY, start=1)),
    "coordinate_names.csv": lines(
        [("", *"xyzw"), *((name, *row[1:]) for name, row in zip("xyzw", NAMED[1:], strict=True))]
    ),
    "dashes.csv": lines(["-" if row == column else ONE_WAY[row, column] for column in range(4)] for row in range(4)),
    "blanks.csv": lines(["" if row == column else ONE_WAY[row, column] for column in range(4)] for row in range(4)),
    "decimal_comma.csv": lines(([f"{cost:.1f}".replace(".", ",") for cost in row] for row in ONE_WAY), ";"),
    "rows.json": json.dumps(ONE_WAY.tolist()),
    "costs.json": json.dumps({"costs": ONE_WAY.tolist()}),
}


@pytest.mark.parametrize("name", TABLES)
def test_read_instances_reads_square_tables_as_the_world_has_them(name, tmp_path):
    assert costs_of(read(tmp_path, name, TABLES[name])) == ONE_WAY.tolist()


def test_read_instances_reads_a_square_table_of_three(tmp_path):
    assert costs_of(read(tmp_path, "own.csv", "0,5,3\n1,0,4\n2,6,0\n")) == [[0, 5, 3], [1, 0, 4], [2, 6, 0]]
    assert costs_of(read(tmp_path, "own.csv", "99,5,3\n1,99,4\n2,6,99\n")) == [[0, 5, 3], [1, 0, 4], [2, 6, 0]]


POSITIONS = {
    "two.csv": ("0,5\n3,0\n", [[0, 5], [3, 0]]),
    "two_named.csv": (",0,1\n0,0.5,5\n1,3,0.5\n", [[0.5, 5], [3, 0.5]]),
    "counted.csv": ("1,5,6\n2,7,8\n3,9,1\n", [[5, 6], [7, 8], [9, 1]]),
    "names.csv": ("a,5,6\nb,7,8\nc,9,1\n", [[5, 6], [7, 8], [9, 1]]),
    "x_and_y.csv": ("a,x,y,b\n0,5,6,2\n1,7,8,3\n4,9,1,3\n", [[5, 6], [7, 8], [9, 1]]),
    "two.json": ("[[0, 5], [3, 0]]", [[0, 5], [3, 0]]),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_read_instances_still_takes_positions_for_positions(name, tmp_path):
    text, positions = POSITIONS[name]
    instance = read(tmp_path, name, text)
    assert instance.costs is None and instance.metric == EXACT and instance.coords.tolist() == positions


def test_read_instances_takes_squares_of_numbers_for_costs(tmp_path):
    np.save(tmp_path / "one.npy", ONE_WAY)
    np.save(tmp_path / "several.npy", np.stack((ONE_WAY, BOTH_WAYS)).astype(np.float32))
    np.save(tmp_path / "positions.npy", np.ones((3, 2, 2)))
    (one,), several, positions = (read_instances(tmp_path / f"{name}.npy") for name in ("one", "several", "positions"))
    assert one.name == "one" and costs_of(one) == ONE_WAY.tolist()
    assert [each.name for each in several] == ["several-0", "several-1"]
    assert costs_of(several[1]) == BOTH_WAYS.tolist()
    assert [each.costs for each in positions] == [None] * 3


def test_read_instances_reads_costs_with_loads_and_places_from_one_file(tmp_path):
    coords, demand = np.arange(8.0).reshape(4, 2), np.array([0, 2, 2, 1])
    np.savez(tmp_path / "own.npz", costs=ONE_WAY, coords=coords, demand=demand, capacity=3)
    (instance,) = read_instances(tmp_path / "own.npz")
    assert (instance.name, instance.problem, instance.capacity) == ("own", "cvrp", 3)
    assert costs_of(instance) == ONE_WAY.tolist() and instance.coords.tolist() == coords.tolist()


FULL = tsplib(spaced(ONE_WAY))
REFUSED = {
    "few.tsp": (FULL.replace("9 0\nEOF", "9\nEOF"), ":6: EDGE_WEIGHT_SECTION holds 15 numbers; FULL_MATRIX of 4"),
    "many.tsp": (
        tsplib("1 2 3\n4 5 6 7", "UPPER_ROW"),
        ":7: EDGE_WEIGHT_SECTION holds 7 numbers; UPPER_ROW of 4 nodes",
    ),
    "none.tsp": (tsplib("", "UPPER_ROW"), ":5: EDGE_WEIGHT_SECTION holds 0 numbers; UPPER_ROW of 4 nodes needs 6"),
    "huge.tsp": (tsplib("1 2 3", dimension=10**12), ":6: EDGE_WEIGHT_SECTION holds 3 numbers; FULL_MATRIX of 1,000,"),
    "negative.tsp": (tsplib("1 2\n3 4 -5\n6", "UPPER_ROW"), ":7: cost '-5' from node 2 to node 4; a number from 0"),
    "not_a_number.tsp": (tsplib("1 2\n3 nan 5\n6", "UPPER_ROW"), ":7: cost 'nan' from node 2 to node 3; a number"),
    "infinite.tsp": (tsplib("1 inf 3 4 5 6", "LOWER_ROW"), ":6: cost 'inf' from node 3 to node 1; a number from 0"),
    "too_large.tsp": (tsplib("1 2 3 4 5 1e13", "UPPER_ROW"), ":6: cost '1e13' from node 3 to node 4; a number"),
    "underscore.tsp": (tsplib("1_0 2 3 4 5 6", "UPPER_ROW"), ":6: cost '1_0' from node 1 to node 2; a number from 0"),
    "function.tsp": (tsplib("1", "FUNCTION"), ":4: EDGE_WEIGHT_FORMAT is 'FUNCTION'; one of FULL_MATRIX, UPPER_ROW"),
    "triangle.atsp": (tsplib("1 2 3 4 5 6", "UPPER_ROW", kind="ATSP"), ":4: EDGE_WEIGHT_FORMAT is 'UPPER_ROW' of an"),
    "no_section.tsp": (FULL.replace("EDGE_WEIGHT_SECTION", "DISPLAY_DATA_SECTION"), ": has no EDGE_WEIGHT_SECTION; it"),
    "places.tsp": (tsplib(spaced(ONE_WAY), tail=["DISPLAY_DATA_SECTION", "1 2 3"]), ":8: DISPLAY_DATA_SECTION ends"),
    "negative.csv": (lines(ONE_WAY).replace("8,6,9", "8,-1,9"), ":1: cost '-1' from place 1 to place 3; a number from"),
    "words.csv": (lines(NAMED).replace("d,6,2", "d,no,2"), ":5: cost 'no' from place 4 to place 1; a number from 0"),
    "short.csv": (lines(ONE_WAY[:3]), ":1: has 4 values; a line `x,y` for each node is needed"),
    "ragged.csv": (lines(ONE_WAY).replace("7,0,5,3", "7,0,5"), ":2: has 3 values; a line `x,y`"),
    "order.csv": (lines([("", *"badc"), *NAMED[1:]]), ":1: rows and columns of costs have the same names in another"),
    "attributes.csv": (lines([tuple("abcd"), *(ONE_WAY + np.diag((1, 2, 3, 4)))]), ":2: has 4 values; a line `x,y`"),
    "demand.csv": ("id,a,b,demand\n1,5,6,7\n2,8,9,1\n3,2,3,4\n", ":1: column 'demand' cannot be taken into account"),
    "negative.json": ("[[0, 1, 2], [3, 0, -4], [5, 6, 0]]", ": costs[1, 2] is -4.0; a number from 0 to 1e+12"),
    "oblong.json": ('{"costs": [[0, 1, 2], [3, 0, 4]]}', ": costs has shape (2, 3); [N, N]"),
    "both.json": (
        '{"costs": [[0, 1], [2, 0]], "coords": [[1, 2]]}',
        ": costs has shape (2, 2) beside coords of (1, 2);",
    ),
    "called.json": (
        '{"coords": [[0, 1, 2], [3, 0, 4], [5, 6, 0]]}',
        ": coords has shape (3, 3); call a matrix `costs`",
    ),
    "parts.json": (
        '{"costs": [[0, 1], [2, 0]], "depot": [0]}',
        ": holds 'costs, depot'; `coords` [I, N, 2] or `costs`",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_read_instances_names_the_place_of_a_mistake_in_a_matrix(name, tmp_path):
    text, beginning = REFUSED[name]
    assert refusal(write(tmp_path, name, text)).startswith(beginning)


def test_read_instances_names_the_matrix_of_a_batch_that_has_a_mistake(tmp_path):
    batch = np.stack((ONE_WAY, BOTH_WAYS)).astype(float)
    batch[1, 2, 0] = np.nan
    np.save(tmp_path / "own.npy", batch)
    assert refusal(tmp_path / "own.npy").startswith(": costs[1, 2, 0] is nan; a number from 0")


def test_layout_by_costs_finds_positions_again_but_for_how_they_are_turned():
    coords = np.array([[0.0, 0], [3, 0], [3, 4], [-2, 1], [5, 5]])
    distances = np.linalg.norm(coords[:, None] - coords, axis=-1)
    found = layout_by_costs(distances)
    np.testing.assert_allclose(np.linalg.norm(found[:, None] - found, axis=-1), distances, atol=1e-9)


@pytest.mark.parametrize("costs", [np.zeros((1, 1)), np.zeros((3, 3)), np.array([[0, 2.0], [4, 0]])])
def test_layout_by_costs_has_a_place_for_every_node(costs):
    assert layout_by_costs(costs).shape == (len(costs), 2) and np.isfinite(layout_by_costs(costs)).all()


def test_layout_by_costs_lets_no_closed_way_fill_the_picture():
    coords = np.random.default_rng(0).uniform(size=(20, 2))
    costs = np.linalg.norm(coords[:, None] - coords, axis=-1)
    closed = costs.copy()
    closed[3, 11] = 1e9
    found = layout_by_costs(closed)
    spread = [np.linalg.norm(places - places.mean(0), axis=-1) for places in (coords, found)]
    assert spread[1].max() < 2 * spread[0].max() and np.median(spread[1]) > np.median(spread[0]) / 2
