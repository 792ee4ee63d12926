import io
import os
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from routing import arrays
from routing.files import InstanceError, read_instances
from routing.metrics import GIVEN

DATA_FOLDER = Path(__file__).parents[3] / "shared" / "data"

TSP_FILE = """NAME: triangle
TYPE: TSP
COMMENT: sides 3, 4 and 5
DIMENSION: 3
EDGE_WEIGHT_TYPE: EUC_2D
NODE_COORD_SECTION
1 0.0 0
2 3e0 0
3 3 4
EOF
"""
CVRP_FILE = """NAME : small
COMMENT : (by hand, Optimal value: 24)
TYPE : CVRP
DIMENSION : 3
EDGE_WEIGHT_TYPE : EUC_2D
CAPACITY : 5
NODE_COORD_SECTION
1 0 0
2 3 4
3 -3 4
DEMAND_SECTION
1 0
2 5
3 0
DEPOT_SECTION
 1
 -1
EOF
"""
CSV_FILE = "x,y\n0,0\n3,0\n# a comment\n3;4\n"


def write(folder, text, name="own.tsp"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(path):
    with pytest.raises(InstanceError) as caught:
        read_instances(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message.removeprefix(str(path))


def as_bytes(save, *arrays, **named):
    stream = io.BytesIO()
    save(stream, *arrays, **named)
    return stream.getvalue()


BATCH = {
    "coords": np.random.default_rng(0).uniform(size=(2, 4, 2)),
    "demand": np.array([[0, 1, 2, 3], [0, 3, 3, 3]]),
    "capacity": np.array([3, 9]),
}


def test_read_instances_reads_tsplib(tmp_path):
    (instance,) = read_instances(write(tmp_path, TSP_FILE))
    assert (instance.name, instance.problem, instance.metric, instance.demand) == ("own", "tsp", "EUC_2D", None)
    assert instance.coords.tolist() == [[0, 0], [3, 0], [3, 4]]


def test_read_instances_reads_cvrplib(tmp_path):
    (instance,) = read_instances(write(tmp_path, CVRP_FILE, "own.vrp"))
    assert (instance.problem, instance.capacity, instance.reference) == ("cvrp", 5, 24)
    assert instance.coords.tolist() == [[0, 0], [3, 4], [-3, 4]]
    assert instance.demand is not None and instance.demand.tolist() == [0, 5, 0]


def test_read_instances_puts_nodes_in_the_order_of_their_numbers(tmp_path):
    shuffled = TSP_FILE.replace("1 0.0 0\n", "").replace("3 3 4\n", "3 3 4\n1 0.0 0\n")
    (instance,) = read_instances(write(tmp_path, shuffled))
    assert instance.coords.tolist() == [[0, 0], [3, 0], [3, 4]]


@pytest.mark.parametrize(
    "change", [("\n", "\r\n"), ("\n", "\r"), ("EOF\n", ""), ("sides", "S\xedde"), ("3 3 4", "3 0 0")]
)
def test_read_instances_takes_what_is_harmless(change, tmp_path):
    content = TSP_FILE.replace(*change).encode("latin-1")
    assert len(read_instances(write(tmp_path, content))[0].coords) == 3


@pytest.mark.parametrize("positions", ["1 1e9 -1e9", "1 -5 -0.25"])
def test_read_instances_takes_huge_and_negative_coordinates(positions, tmp_path):
    (instance,) = read_instances(write(tmp_path, TSP_FILE.replace("1 0.0 0", positions)))
    assert instance.coords[0].tolist() == [float(number) for number in positions.split()[1:]]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("TSP", "HCP", ":2: TYPE is 'HCP'; only TSP, ATSP, CVRP and VRPTW"),
        ("TSP", "ATSP", ":5: EDGE_WEIGHT_TYPE is 'EUC_2D' of an ATSP; costs that depend"),
        ("TYPE: TSP\n", "", ": has no TYPE"),
        ("EUC_2D", "EXPLICIT", ": has no EDGE_WEIGHT_FORMAT; one of FULL_MATRIX"),
        ("DIMENSION: 3", "DIMENSION: three", ":4: DIMENSION is 'three'; a whole number"),
        ("DIMENSION: 3", "DIMENSION: 0", ":4: DIMENSION is '0'"),
        ("DIMENSION: 3", "DIMENSION: 999999999999", ":9: NODE_COORD_SECTION ends after 3 nodes"),
        ("DIMENSION: 3\n", "DIMENSION: 3\nDIMENSION: 3\n", ":5: 'DIMENSION' is given twice"),
        ("3 3 4\nEOF\n", "", ":8: NODE_COORD_SECTION ends after 2 nodes, and DIMENSION is 3"),
        ("3 3 4", "3 3", ":9: NODE_COORD_SECTION has a line of 2 fields"),
        ("3 3 4", "2 3 4", ":9: node 2 stands in line 8 already"),
        ("3 3 4", "4 3 4", ":9: node number '4' in NODE_COORD_SECTION, and DIMENSION is 3"),
        ("3 3 4", "3 3 four", ":9: coordinate 'four'"),
        ("3 3 4", "3 3 nan", ":9: coordinate 'nan'"),
        ("3 3 4", "3 3 1e999", ":9: coordinate '1e999'"),
        ("3 3 4", "3 3 4_0", ":9: coordinate '4_0'"),
        ("NAME: triangle", "once upon a time", ":1: 'once upon a time' is no `KEYWORD: value`"),
        (
            "NODE_COORD_SECTION\n",
            "FIXED_EDGES_SECTION\n1 2\n-1\nNODE_COORD_SECTION\n",
            ":6: 'FIXED_EDGES_SECTION' cannot",
        ),
        ("NODE_COORD_SECTION\n1 0.0 0\n2 3e0 0\n3 3 4\n", "", ": has no NODE_COORD_SECTION"),
    ],
)
def test_read_instances_names_the_line_of_a_mistake_in_tsplib(old, new, message, tmp_path):
    path = write(tmp_path, TSP_FILE.replace(old, new))
    assert refusal(path).startswith(message)


def test_read_instances_refuses_places_that_are_not_on_earth(tmp_path):
    text = TSP_FILE.replace("EUC_2D", "GEO").replace("3 3 4", "3 91 4")
    assert refusal(write(tmp_path, text)).startswith(":9: no place on earth has latitude 91")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("2 5\n", "2 6\n", ":13: demand 6 is above CAPACITY 5"),
        ("2 5\n", "2 -1\n", ":13: demand '-1'"),
        ("2 5\n", "2 1.5\n", ":13: demand '1.5'"),
        ("1 0\n2 5", "1 1\n2 5", ":12: the depot, node 1, has demand 1"),
        ("3 0\nDEPOT", "DEPOT", ":13: DEMAND_SECTION ends after 2 nodes"),
        ("CAPACITY : 5\n", "", ": has no CAPACITY"),
        ("CAPACITY : 5\n", "CAPACITY : 3000000000\n", ":6: CAPACITY is '3000000000'; a whole number from 0 to 1e+09"),
        ("CAPACITY : 5\n", "CAPACITY : 5\nDISTANCE : 20\n", ":7: DISTANCE limits the routes"),
        (" 1\n -1\n", " 2\n -1\n", ":16: DEPOT_SECTION holds '2'"),
        (" 1\n -1\n", " 1\n 2\n -1\n", ":17: DEPOT_SECTION holds '1, 2'"),
        ("DEPOT_SECTION\n 1\n -1\n", "", ": has no DEPOT_SECTION"),
    ],
)
def test_read_instances_names_the_line_of_a_mistake_in_cvrplib(old, new, message, tmp_path):
    assert old in CVRP_FILE
    assert refusal(write(tmp_path, CVRP_FILE.replace(old, new, 1), "own.vrp")).startswith(message)


def test_read_instances_reads_csv(tmp_path):
    (instance,) = read_instances(write(tmp_path, CSV_FILE, "own.csv"))
    assert (instance.name, instance.problem, instance.metric) == ("own", "tsp", "exact")
    assert instance.coords.tolist() == [[0, 0], [3, 0], [3, 4]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2\n3,4,5\n", ":2: has 3 values"),
        ("1,2\nx,y\n", ":2: coordinate 'x'"),
        ("", ": holds no node"),
        ("x,y", ": holds"),
    ],
)
def test_read_instances_refuses_what_is_no_csv_of_coordinates(text, message, tmp_path):
    assert refusal(write(tmp_path, text, "own.csv")).startswith(message)


def test_read_instances_reads_arrays(tmp_path):
    (single,) = read_instances(write(tmp_path, as_bytes(np.save, BATCH["coords"][0]), "own.npy"))
    assert single.name == "own" and np.array_equal(single.coords, BATCH["coords"][0])
    first, second = read_instances(write(tmp_path, as_bytes(np.savez, **BATCH), "own.npz"))
    assert (first.name, first.problem, first.capacity, second.capacity) == ("own-0", "cvrp", 3, 9)
    assert second.demand is not None and second.demand.tolist() == [0, 3, 3, 3]
    shared = read_instances(write(tmp_path, as_bytes(np.savez, **{**BATCH, "capacity": 5}), "own.npz"))
    assert [instance.capacity for instance in shared] == [5, 5]
    assert {each.problem for each in read_instances(write(tmp_path, as_bytes(np.save, BATCH["coords"]), "a.npy"))} == {
        "tsp"
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coords": np.full((2, 4, 2), np.nan)}, ": coords[0, 0, 0] is nan"),
        ({"coords": np.zeros((2, 4, 3))}, ": coords has shape (2, 4, 3)"),
        ({"coords": np.zeros((0, 4, 2))}, ": coords has shape (0, 4, 2)"),
        ({"coords": np.array([["a", "b"]])}, ": coords is of type"),
        ({"demands": np.zeros(3)}, ": holds 'capacity, coords, demand, demands'"),
        ({"demand": np.zeros((2, 3))}, ": demand has shape (2, 3)"),
        ({"demand": np.ones((2, 4))}, ": instance 0 has a demand at its depot"),
        (
            {"demand": np.array([[0, 1, 2, 3], [0, 3.5, 3, 3]])},
            ": instance 1 has a demand that is negative",
        ),
        ({"capacity": np.array([3, 2])}, ": instance 1 has a demand above its capacity"),
        ({"capacity": np.array([3, -2])}, ": instance 1 has a capacity that is negative"),
        ({"capacity": np.array([3, 3e9])}, ": capacity[1] is 3000000000.0; numbers within"),
        ({"capacity": np.zeros(5)}, ": demand has shape (2, 4) and capacity (5,)"),
    ],
)
def test_read_instances_refuses_arrays_that_are_no_instances(changes, message, tmp_path):
    assert refusal(write(tmp_path, as_bytes(np.savez, **{**BATCH, **changes}), "own.npz")).startswith(message)


def test_read_instances_refuses_missing_files_folders_and_code(tmp_path):
    assert refusal(tmp_path / "missing.tsp").startswith(": cannot be read (No such file")
    assert refusal(tmp_path).startswith(": cannot be read")
    pickled = as_bytes(lambda stream, array: np.save(stream, array, allow_pickle=True), np.array([{}], dtype=object))
    assert "is no NumPy file of numbers" in refusal(write(tmp_path, pickled, "own.npy"))


def header(shape, dtype="<f8"):
    """The first bytes of an `.npy` file of that shape."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"shape": shape, "fortran_order": False, "descr": dtype})
    return stream.getvalue()


def archive(**members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            packed.writestr(f"{name}.npy", content)
    return stream.getvalue()


MANY_ENTRIES = archive(coords=header((1, 2)) + bytes(16), **{f"part{index}": b"" for index in range(200)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (archive(coords=header((2**25, 2)) + bytes(2**29)), ": unpacks to 0.537 GB"),
        (archive(coords=header((10**12, 2)) + bytes(100)), ": unpacks to 1.6e+04 GB"),
        (archive(coords=header((10**6, 2)) + bytes(100)), ": is no NumPy file of numbers (shape (1000000, 2) needs"),
        (archive(coords=header((2**26, 2), "|i1") + bytes(100)), ": unpacks to 1.07 GB"),
        (header((10**12, 2)), ": unpacks to 1.6e+04 GB"),
        (header((10**6, 2)), ": is no NumPy file of numbers (shape (1000000, 2) needs"),
        (MANY_ENTRIES, ": holds more than 100 arrays"),
    ],
    ids=["zeros", "declared", "short", "small type", "bare", "bare short", "entries"],
)
def test_read_instances_refuses_arrays_that_unpack_to_more_than_there_is_before_they_do(content, message, tmp_path):
    path = write(tmp_path, content, "own.npz")
    tracemalloc.start()
    try:
        assert refusal(path).startswith(message)
        assert tracemalloc.get_traced_memory()[1] < 10 * len(content) + 2**22
    finally:
        tracemalloc.stop()


def test_read_instances_adds_up_what_all_arrays_of_a_file_unpack_to(tmp_path, monkeypatch):
    parts = {"coords": np.zeros((5, 6, 2)), "demand": np.zeros((5, 6)), "capacity": np.ones(5)}
    path = write(tmp_path, as_bytes(np.savez, **parts), "own.npz")
    assert len(read_instances(path)) == 5
    # Each is smaller.
    monkeypatch.setattr(arrays, "LARGEST_UNPACKED", 800)
    assert refusal(path).startswith(": unpacks to")


@pytest.mark.parametrize("name", ["own.tsp", "own.npz", "own.csv", "own.json"])
def test_read_instances_refuses_pipes_devices_and_files_without_end(name, tmp_path):
    path = tmp_path / name
    os.mkfifo(path)
    assert "FIFO" in refusal(path)
    path.unlink()
    path.symlink_to("/dev/zero")
    assert "device" in refusal(path)
    path.unlink()
    with path.open("wb") as sparse:
        sparse.truncate(2**40)
    assert "1,099,511,627,776 bytes" in refusal(path)


@pytest.mark.skipif(not DATA_FOLDER.is_dir(), reason="TSPLIB and CVRPLIB files are not part of the repository")
def test_read_instances_reads_all_real_files():
    for path in [*DATA_FOLDER.rglob("*.tsp"), *DATA_FOLDER.rglob("*.atsp"), *DATA_FOLDER.rglob("*.vrp")]:
        if path.stem == "A-n80-k10":
            # A digit is missing between two others: `66 0 1  5`.
            assert refusal(path).startswith(":73: NODE_COORD_SECTION has a line of 4 fields")
        else:
            assert len(read_instances(path)) == 1


MATRIX_FILE = TSP_FILE.replace("EUC_2D", "EXPLICIT\nEDGE_WEIGHT_FORMAT: UPPER_ROW").replace(
    "NODE_COORD_SECTION", "EDGE_WEIGHT_SECTION\n3 5\n4\nDISPLAY_DATA_SECTION"
)
VALID = {
    "matrix.tsp": MATRIX_FILE.encode(),
    "matrix.csv": b",a,b,c\na,0,3,5\nb,2,0,4\nc,1,6,0\n",
    "matrix.json": b"[[0, 3, 5], [2, 0, 4], [1, 6, 0]]",
    "costs.npz": as_bytes(np.savez, costs=np.ones((2, 4, 4))),
    "own.tsp": TSP_FILE.encode(),
    "own.vrp": CVRP_FILE.encode(),
    "own.csv": CSV_FILE.encode(),
    "places.csv": b'name;lat;lon\n"a;b";52,5;13,4\nb;48,1;11,6\nc;53,5;10,0\n',
    "table.tsv": "id\tx\ty\n0\t1\t2\n1\t3\t4\n".encode("utf-16"),
    "own.json": b'[{"x": 1, "y": 2}, {"x": 3.5, "y": -4e2}]',
    "batch.json": b'{"coords": [[[0, 1], [2, 3]]], "demand": [[0, 1]], "capacity": 3}',
    "own.npy": as_bytes(np.save, BATCH["coords"]),
    "own.npz": as_bytes(np.savez, **BATCH),
    "packed.npz": as_bytes(np.savez_compressed, **BATCH),
    "windows.txt": b"A\nVEHICLE\nNUMBER\n2 9\nCUSTOMER\nX\n0 0 0 0 0 99 0\n1 3 4 1 0 50 2\n2 0 5 2 9 60 2\n",
    "windows.csv": b"x,y,demand,ready,due,service,capacity\n0,0,0,8,99,0,9\n3,4,1,8,50,2,\n0,5,2,9,60.5,2,\n",
    "windows.vrp": CVRP_FILE.replace("CVRP", "VRPTW")
    .replace("DEPOT", "TIME_WINDOW_SECTION\n1 0 99\n2 0 50\n3 9 60\nDEPOT", 1)
    .encode(),
    "windows.npz": as_bytes(np.savez, **BATCH, ready=np.zeros((2, 4)), due=np.full((2, 4), 99), pace=0.5),
}
SNIPPETS = [
    b"\n",
    b"-",
    b"e999",
    b"nan",
    b":",
    b"_SECTION\n",
    b"EOF\n",
    b"\x00",
    b"\xff",
    b"9" * 30,
    b"-1\n",
    b"1 1 1\n",
]


@settings(max_examples=100, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_read_instances_reads_or_refuses_mutated_files(data, tmp_path):
    name = data.draw(st.sampled_from(sorted(VALID)))
    content = VALID[name]
    for _ in range(data.draw(st.integers(1, 4))):
        begin, end = sorted(data.draw(st.tuples(*[st.integers(0, len(content))] * 2)))
        end = min(end, begin + 20)
        piece = data.draw(st.sampled_from(SNIPPETS) | st.binary(max_size=8))
        match data.draw(st.sampled_from(["replace", "insert", "cut", "truncate", "repeat"])):
            case "replace":
                content = content[:begin] + piece + content[begin + len(piece) :]
            case "insert":
                content = content[:begin] + piece + content[begin:]
            case "cut":
                content = content[:begin] + content[end:]
            case "truncate":
                content = content[:begin]
            case "repeat":
                content = content[:end] + content[begin:]
    path = write(tmp_path, content, name)
    try:
        instances = read_instances(path)
    except InstanceError as error:
        instances, message = [], str(error)
    else:
        message = str(path)
    assert message.startswith(str(path)) and "\n" not in message
    for instance in instances:
        assert np.isfinite(instance.coords).all() and instance.coords.shape[1] in (2, 3, 0)
        assert (instance.costs is not None) == (instance.metric == GIVEN)
        assert instance.costs is None or (instance.costs >= 0).all()
        assert instance.demand is None or (instance.demand <= instance.capacity).all()
        whole = instance.whole_windows()
        assert whole is None or ((whole.ready <= whole.due).all() and (whole.drives[0] <= whole.due).all())
