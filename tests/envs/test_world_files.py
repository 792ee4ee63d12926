"""Files as the world has them: read, and as long as trying every tour says."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from routing.files import InstanceError, read_instances
from routing.metrics import distance_matrix

SHARED = Path(__file__).parents[3] / "shared"
PLACES = [(31, 12), (48, 77), (5, 63), (90, 41), (66, 8), (22, 88), (73, 59)]
DEMANDS = [0, 3, 4, 5, 2, 6, 4]
# Cities by latitude and longitude.
CITIES = [
    *((52.52, 13.4), (48.14, 11.58), (53.55, 9.99), (50.94, 6.96)),
    *((50.11, 8.68), (51.34, 12.37), (49.45, 11.08)),
]


def lines(rows, separator=","):
    return "".join(separator.join(map(str, row)) + "\n" for row in rows)


def tsp_text(*head, weights="EUC_2D", places=PLACES):
    numbered = lines(((number, *place) for number, place in enumerate(places, start=1)), " ")
    first = [f"DIMENSION: {len(places)}", f"EDGE_WEIGHT_TYPE: {weights}"]
    return "\n".join([*(head or ["TYPE: TSP"]), *first, "NODE_COORD_SECTION", numbered + "EOF\n"])


def vrp_text(*head):
    numbered = lines(enumerate(DEMANDS, start=1), " ")
    body = tsp_text("TYPE: CVRP", "CAPACITY: 12", *head).removesuffix("EOF\n")
    return f"{body}DEMAND_SECTION\n{numbered}DEPOT_SECTION\n1\n-1\nEOF\n"


def read(folder, name, text):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_instances(path)


def refusal(folder, name, text):
    with pytest.raises(InstanceError) as caught:
        read(folder, name, text)
    message = str(caught.value).removeprefix(str(folder / name))
    assert message != str(caught.value) and "\n" not in message
    return message


def shortest_tour(instance):
    """By trying every tour."""
    legs = instance.cost_matrix()
    orders = np.array([(0, *order) for order in itertools.permutations(range(1, len(legs)))])
    return legs[orders, np.roll(orders, -1, axis=1)].sum(1).min()


def shortest_plan(instance):
    """By trying every order of the customers, and of each the best way to split it into routes."""
    legs = instance.cost_matrix()
    best = np.inf
    for order in itertools.permutations(range(1, len(legs))):
        costs = [0.0] + [np.inf] * len(order)
        for begin in range(len(order)):
            load, length, last = 0, costs[begin], 0
            for end, customer in enumerate(order[begin:], start=begin + 1):
                load, length, last = load + instance.demand[customer], length + legs[last, customer], customer
                if load > instance.capacity:
                    break
                costs[end] = min(costs[end], length + legs[last, 0])
        best = min(best, costs[-1])
    return best


def assert_shortest(instance, best):
    """Compare as many digits as `best` has."""
    found = shortest_tour(instance) if instance.demand is None else shortest_plan(instance)
    assert f"{found:.{len(str(best).partition('.')[2])}f}" == str(best)


XY = lines([("x", "y"), *PLACES])
READ = {
    "two_comments.tsp": (tsp_text("TYPE: TSP", "COMMENT: seven places", "COMMENT: drawn by hand"), 247),
    "man2d.tsp": (tsp_text(weights="MAN_2D"), 330),
    "max2d.tsp": (tsp_text(weights="MAX_2D"), 213),
    "exact2d.tsp": (tsp_text(weights="EXACT_2D"), 247.3056),
    "flat3d.tsp": (tsp_text(weights="EUC_3D", places=[(0, *place) for place in PLACES]), 247),
    "bom.tsp": ("\ufeff" + tsp_text(), 247),
    "lower_case.tsp": (tsp_text().lower().replace("euc_2d", "Euc_2D"), 247),
    "no_colons.tsp": (tsp_text().replace(":", ""), 247),
    "tabs.tsp": (tsp_text().replace(": ", "\t"), 247),
    "comment_without_colon.tsp": (tsp_text("COMMENT drawn by hand: seven places", "TYPE: TSP"), 247),
    "more_behind.tsp": (tsp_text("TYPE: TSP (Waterloo, 2001)", weights="EUC_2D rounded"), 247),
    "utf16.tsp": (tsp_text().encode("utf-16"), 247),
    "plain.txt": (tsp_text(), 247),
    "vehicles.vrp": (vrp_text("VEHICLES: 6"), 402),
    "no_real_limit.vrp": (vrp_text("DISTANCE: 99999"), 402),
    "limit_and_service.vrp": (vrp_text("DISTANCE: 99,999", "SERVICE_TIME: 10"), 402),
    "no_service.vrp": (vrp_text("SERVICE_TIME: 0"), 402),
    "best_value.vrp": (vrp_text("COMMENT: (drawn by hand, Best value: 1,402)"), 402),
    "index_column.csv": (lines([("id", "x", "y"), *((row, *place) for row, place in enumerate(PLACES))]), 247.3056),
    "index_without_name.csv": (lines((row, *place) for row, place in enumerate(PLACES, start=1)), 247.3056),
    "names_without_header.csv": (lines((f"place {row}", *place) for row, place in enumerate(PLACES)), 247.3056),
    "decimal_comma.csv": (
        lines([("Name", "X", "Y"), *(("Ort", *(f"{part / 10}".replace(".", ",") for part in p)) for p in PLACES)], ";"),
        24.7306,
    ),
    "quoted_decimal_comma.csv": (lines((f'"{x / 10}"'.replace(".", ","), y / 10) for x, y in PLACES), 24.7306),
    "tabs.tsv": (lines([("name", "y", "x"), *(("a b", *place) for place in PLACES)], "\t"), 247.3056),
    "tabs.csv": (lines(PLACES, "\t"), 247.3056),
    "spaces.txt": (lines(PLACES, "  "), 247.3056),
    "pandas_header.csv": (lines([(0, 1), *((float(x), float(y)) for x, y in PLACES)]), 247.3056),
    "pandas_index.csv": (lines([("", 0, 1), *((row, *place) for row, place in enumerate(PLACES))]), 247.3056),
    "quotes.csv": ('"name","x [m]","y [m]"\n' + lines(('"a; b, c"', f'"{x}"', f'"{y}"') for x, y in PLACES), 247.3056),
    "thousands.csv": (lines((f'"{1000 * x:,}.0"', f'"{1000 * y:,}.0"') for x, y in PLACES), 247305.6),
    "other_columns.csv": (
        lines([("id", "Y_coord", "population", "X-coord"), *(("a", y, 5, x) for x, y in PLACES)]),
        247.3056,
    ),
    "utf16.csv": (XY.replace(",", "\t").encode("utf-16"), 247.3056),
    "bom.csv": (b"\xef\xbb\xbf" + XY.encode(), 247.3056),
    "separator_named.csv": ("sep=;\n" + XY.replace(",", ";"), 247.3056),
    "trailing.csv": (XY.replace("\n", ",\n"), 247.3056),
    "carriage_returns.csv": (XY.replace("\n", "\r"), 247.3056),
    "points.json": (json.dumps([{"x": x, "y": y} for x, y in PLACES]), 247.3056),
    "pairs.json": (json.dumps(PLACES), 247.3056),
    "columns.json": (json.dumps({"y": [y for _, y in PLACES], "x": [x for x, _ in PLACES]}), 247.3056),
    "frame.json": (json.dumps({key: {row: p[key == "y"] for row, p in enumerate(PLACES)} for key in "xy"}), 247.3056),
    "coords.json": (json.dumps({"coords": PLACES}), 247.3056),
    "lat_lon.csv": (lines([("lat", "lon"), *CITIES]), 1596.3),
    "lon_lat.csv": (lines([("Longitude", "LATITUDE"), *((lon, lat) for lat, lon in CITIES)]), 1596.3),
    "names_lat_lng.csv": (lines([("city", "lat", "lng"), *(("a", *city) for city in CITIES)]), 1596.3),
    "gps.csv": (lines([("id", "gps_lat", "gpsLon"), *(("a", *city) for city in CITIES)]), 1596.3),
    "lat_wgs84.csv": (lines([("lat_wgs84", "lon_wgs84"), *CITIES]), 1596.3),
    "numpy_header.csv": (lines([("# lat", "lon"), *CITIES]), 1596.3),
    "numpy_header.txt": (lines([("# x", "y"), *PLACES], " "), 247.3056),
    "sentence.csv": ("# x and y of seven places\n" + lines(PLACES), 247.3056),
    "lat_lon.json": (json.dumps([{"lng": lon, "lat": lat, "city": "a"} for lat, lon in CITIES]), 1596.3),
}


@pytest.mark.parametrize("name", READ)
def test_read_instances_reads_files_as_the_world_has_them(name, tmp_path):
    text, best = READ[name]
    (instance,) = read(tmp_path, name, text)
    assert len(instance.coords) == 7
    assert_shortest(instance, best)


def test_read_instances_takes_a_best_value_with_a_comma_between_thousands(tmp_path):
    (instance,) = read(tmp_path, "own.vrp", READ["best_value.vrp"][0])
    assert instance.reference == 1402


@pytest.mark.parametrize(("written", "read_as"), [("1.4e3", 1400), ("1402.5).", 1402.5), ("1.402,5", None)])
def test_read_instances_takes_a_best_value_whole_or_not_at_all(written, read_as, tmp_path):
    (instance,) = read(tmp_path, "own.vrp", vrp_text(f"COMMENT: (Best value: {written}"))
    assert instance.reference == read_as


def test_read_instances_keeps_a_number_of_vehicles_that_may_be_too_few(tmp_path):
    assert [read(tmp_path, "own.vrp", vrp_text(f"VEHICLES: {number}"))[0].vehicles for number in (1, 5, 6, 1000)] == [
        1,
        5,
        None,
        None,
    ]


def test_read_instances_reads_three_coordinates_and_their_lengths(tmp_path):
    # Sides of 3, 4 and 5, seen from nowhere along an axis: (1, 2, 2) is 3 long, (8, -8, 4) / 3 is 4 long and at a right
    # angle to it.
    corner = np.array([[0.0, 0, 0], [1, 2, 2], [8 / 3, -8 / 3, 4 / 3]])
    (instance,) = read(tmp_path, "own.tsp", tsp_text(weights="EUC_3D", places=corner.tolist()))
    assert distance_matrix(instance.coords, instance.metric).tolist() == [[0, 3, 4], [3, 0, 5], [4, 5, 0]]


REFUSED = {
    "few_vehicles.vrp": (vrp_text("VEHICLES: none"), ":3: VEHICLES is 'none'", "whole number"),
    "limit.vrp": (vrp_text("DISTANCE: 200"), ":3: DISTANCE limits the routes to 200", "only capacity"),
    "limit_with_service.vrp": (vrp_text("DISTANCE: 900", "SERVICE_TIME: 100"), ":3: DISTANCE limits", "only capacity"),
    "number_or_node.csv": ("0,1\n3,4\n5,6\n", ":1: 0 and 1 may be the first node", "x,y"),
    "thousands_or_decimals.csv": ('"1,234","5,678"\n"2,345","6,789"\n', ":1: '1,234' may be", "decimal point"),
    "demand.csv": ("x,y,demand\n1,2,3\n4,5,6\n", ":1: has no column capacity beside demand", "needed together"),
    "weights.csv": ("x,y,Demand_kg\n1,2,3\n4,5,6\n", ":1: column 'Demand_kg' cannot", "call what is meant demand"),
    "spanish.csv": (lines([("latitud", "longitud"), *CITIES]), ":1: columns 'latitud' and 'longitud'", "lat and lon"),
    "german.csv": (lines([("", "Breite", "L"), *(("a", *c) for c in CITIES)]), ":1: columns 'Breite'", "lat and lon"),
    "three.csv": ("5,1,2\n7,3,4\n", ":1: has 3 values", "columns named"),
    "quote.csv": ('x,y\n"1,2\n', ":2: cannot be split", "columns named"),
    "south.csv": ("lat,lon\n52,13\n-91,5\n", ":3: no place on earth", "degrees"),
    "broken.json": ("[[1, 2], [3", ": is no JSON", "list"),
    "deep.json": ("[" * 100_000, ": is no JSON", "list"),
    "not_a_number.json": ("[[1, NaN], [3, 4]]", ": is no JSON (NaN", "list"),
    "infinite.json": ('[{"x": 1e999, "y": 1}]', ":1: coordinate 'Infinity'", "number within"),
    "text.json": ('"once"', ": holds no nodes of numbers", "list"),
    "no_keys.json": ("[{}]", ": holds no nodes of numbers", "list"),
    "empty.json": ("[]", ": holds no nodes of numbers", "list"),
    "keys.json": ('[{"x": 1, "y": 2}, {"x": 1}]', ":2: node 2 has other keys", "list"),
    "ragged.json": ("[[1, 2], [3]]", ": holds lists of different lengths", "list"),
    "columns.json": ('{"x": [1, 2], "y": [3]}', ": holds columns of different lengths", "list"),
    "geo.json": ('{"type": "FeatureCollection", "features": []}', ": holds no nodes of numbers", "list"),
    "nested.json": ('[{"x": [1], "y": 2}]', ":1: coordinate '[1]'", "number within"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_read_instances_says_what_to_do_with_what_it_cannot_read(name, tmp_path):
    text, beginning, remedy = REFUSED[name]
    message = refusal(tmp_path, name, text)
    assert message.startswith(beginning) and remedy in message


CASES = {
    **{"two_comments.tsp": 247, "man2d.tsp": 330, "max2d.tsp": 213, "lat_lon.csv": 1596.3},
    "decimal_comma.csv": 24.7306,
    **{name: 247.3056 for name in ("index_column.csv", "pandas_header.csv", "points.json")},
    **{name: 402 for name in ("vehicles.vrp", "no_real_limit.vrp", "best_value.vrp")},
    **{"full.atsp": 26, "upper_row.tsp": 247, "lower_diag_row.tsp": 247, "matrix.csv": 26},
}


@pytest.mark.skipif(not (SHARED / "cases").is_dir(), reason="the cases are not part of the repository")
@pytest.mark.parametrize("name", CASES)
def test_read_instances_reads_every_shared_case(name):
    (instance,) = read_instances(SHARED / "cases" / name)
    assert_shortest(instance, CASES[name])


@pytest.mark.skipif(not (SHARED / "cases").is_dir(), reason="the cases are not part of the repository")
def test_every_shared_case_is_known():
    assert {path.name for path in (SHARED / "cases").iterdir()} == {"README.md", *CASES}


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the data are not part of the repository")
def test_read_instances_reads_or_refuses_every_shared_file_in_one_line():
    for path in (SHARED / "data").rglob("*.*"):
        if path.suffix in (".tsp", ".atsp", ".vrp") and path.stem != "A-n80-k10":
            assert len(read_instances(path)) == 1
        else:
            with pytest.raises(InstanceError) as refused:
                read_instances(path)
            assert str(refused.value).startswith(str(path)) and "\n" not in str(refused.value)
