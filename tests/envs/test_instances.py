import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from envs import instances
from envs.instances import (
    InstanceError,
    euclidean_distances,
    field_test_coords,
    held_karp_tours,
    lkh_tour,
    read_tsplib,
    reference_lengths,
    reference_tours,
    scale_to_unit_square,
    tsplib_distances,
    tsplib_tour_length,
    uniform_coords,
)

SQUARE = np.array([[0.0, 0], [1, 1], [1, 0], [0, 1]])
TSPLIB_FOLDER = Path(__file__).parents[3] / "shared" / "data" / "tsplib"

TRIANGLE_FILE = """NAME: triangle
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


def lengths_of(tours, distances):
    rows = np.arange(len(tours))[:, None]
    return distances[rows, tours, np.roll(tours, -1, axis=1)].sum(1)


def write(folder, text):
    path = folder / "own.tsp"
    path.write_text(text)
    return path


def forbid_solving(coords):
    raise AssertionError("computed again")


def test_field_test_coords_are_the_first_rows_of_the_full_set():
    full_set = np.random.RandomState(1234).uniform(size=(10000, 5, 2))
    np.testing.assert_array_equal(field_test_coords(5, 7), full_set[:7])
    assert not np.array_equal(field_test_coords(5, 7, seed=instances.VALIDATION_SEED), full_set[:7])


def test_uniform_coords_fill_the_unit_square_and_follow_the_generator():
    coords, same = (uniform_coords(1000, 5, generator=torch.Generator().manual_seed(0), device="cpu") for _ in range(2))
    assert coords.equal(same)
    assert 0 <= coords.min() < 0.01
    assert 0.99 < coords.max() < 1
    torch.testing.assert_close(coords.mean(), torch.tensor(0.5), atol=0.02, rtol=0)


def test_held_karp_finds_what_brute_force_finds():
    distances = euclidean_distances(field_test_coords(6, 20))
    permutations = [(0, *rest) for rest in itertools.permutations(range(1, 6))]
    shortest = [min(lengths_of(np.array([tour]), one[None])[0] for tour in permutations) for one in distances]
    np.testing.assert_allclose(lengths_of(held_karp_tours(distances), distances), shortest)


def test_held_karp_agrees_with_lkh():
    coords = field_test_coords(9, 20)
    distances = euclidean_distances(coords)
    lkh_tours = np.stack([lkh_tour(np.rint(one * 1e6).astype(np.int64)) for one in distances])
    np.testing.assert_allclose(lengths_of(held_karp_tours(distances), distances), lengths_of(lkh_tours, distances))


@pytest.mark.parametrize("num_nodes", [3, 4, 9, 10, 20])
def test_reference_tours_visit_every_node_from_node_0(num_nodes):
    tours = reference_tours(field_test_coords(num_nodes, 5))
    assert (tours[:, 0] == 0).all()
    np.testing.assert_array_equal(np.sort(tours), np.tile(np.arange(num_nodes), (5, 1)))


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_reference_tours_do_not_depend_on_the_unit(scale):
    coords = field_test_coords(12, 3)
    distances = euclidean_distances(coords)
    np.testing.assert_allclose(
        lengths_of(reference_tours(coords * scale), distances), lengths_of(reference_tours(coords), distances)
    )


def test_reference_tours_of_nodes_at_one_point_are_tours():
    assert sorted(reference_tours(np.ones((1, 12, 2)))[0]) == list(range(12))


@pytest.mark.parametrize("coords", [np.zeros((1, 2, 2)), np.full((1, 5, 2), np.nan)])
def test_reference_tours_refuse_what_is_no_instance(coords):
    with pytest.raises(ValueError, match="at least 3 nodes, all at finite positions"):
        reference_tours(coords)


def test_reference_lengths_of_unit_square_is_four(tmp_path):
    assert reference_lengths(np.stack([SQUARE, 3 * SQUARE]), cache_dir=tmp_path).tolist() == [4, 12]


def test_reference_lengths_agree_with_the_fields_mean_for_20_nodes(tmp_path):
    # Optimal mean over all 10,000: 3.8357, with a standard deviation of 0.3 from instance to instance.
    lengths = reference_lengths(field_test_coords(20, 300), cache_dir=tmp_path)
    assert lengths.mean() == pytest.approx(3.8357, abs=0.06)


def test_reference_lengths_are_computed_once(tmp_path, monkeypatch):
    coords = field_test_coords(5, 3)
    lengths = reference_lengths(coords, cache_dir=tmp_path / "new" / "folder")
    monkeypatch.setattr(instances, "reference_tours", forbid_solving)
    np.testing.assert_array_equal(reference_lengths(coords, cache_dir=tmp_path / "new" / "folder"), lengths)
    with pytest.raises(AssertionError, match="computed again"):
        reference_lengths(field_test_coords(5, 4), cache_dir=tmp_path / "new" / "folder")


@pytest.mark.parametrize("xdg", ["set", ""])
def test_reference_lengths_are_kept_in_the_users_cache_folder(xdg, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", xdg and str(tmp_path / xdg))
    reference_lengths(SQUARE[None])
    assert len(list((tmp_path / (xdg or ".cache") / "dreamer-routing").glob("*.npy"))) == 1


@pytest.mark.parametrize("damage", ["truncated", "empty", "not an array", "wrong shape", "not finite", "a folder"])
def test_reference_lengths_recompute_a_damaged_cache(damage, tmp_path, caplog):
    coords = field_test_coords(5, 3)
    lengths = reference_lengths(coords, cache_dir=tmp_path)
    (cache_file,) = tmp_path.iterdir()
    content = cache_file.read_bytes()
    match damage:
        case "truncated":
            cache_file.write_bytes(content[:-5])
        case "empty":
            cache_file.write_bytes(b"")
        case "not an array":
            cache_file.write_bytes(b"hello")
        case "wrong shape":
            np.save(cache_file, lengths[:2])
        case "not finite":
            np.save(cache_file, lengths * np.nan)
        case "a folder":
            cache_file.unlink()
            cache_file.mkdir()
    np.testing.assert_array_equal(reference_lengths(coords, cache_dir=tmp_path), lengths)
    assert "again" in caplog.text
    if damage != "a folder":
        assert cache_file.read_bytes() == content
        assert list(tmp_path.iterdir()) == [cache_file]


def test_reference_lengths_do_without_a_cache_that_cannot_be_written(tmp_path, caplog):
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    assert reference_lengths(SQUARE[None], cache_dir=in_the_way / "cache").tolist() == [4]
    assert "not cached" in caplog.text


def test_read_tsplib_reads_a_file_of_its_own(tmp_path):
    instance = read_tsplib(write(tmp_path, TRIANGLE_FILE))
    assert (instance.name, instance.comment, instance.metric) == ("triangle", "sides 3, 4 and 5", "EUC_2D")
    assert instance.coords.tolist() == [[0, 0], [3, 0], [3, 4]]
    assert tsplib_tour_length(instance.coords, np.array([0, 1, 2])) == 12


@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        ("EUC_2D", "GEO", "EDGE_WEIGHT_TYPE is GEO; only EUC_2D"),
        ("EUC_2D", "EXPLICIT\nEDGE_WEIGHT_FORMAT: FULL_MATRIX", "EDGE_WEIGHT_TYPE is EXPLICIT"),
        ("EDGE_WEIGHT_TYPE: EUC_2D\n", "", "EDGE_WEIGHT_TYPE is None"),
        ("TYPE: TSP", "TYPE: CVRP", "TYPE is CVRP; only TSP"),
        ("3 3 4\n", "", "holds 2 nodes, but DIMENSION is 3"),
        ("DIMENSION: 3\n", "", "DIMENSION is None"),
        ("DIMENSION: 3", "DIMENSION: 2", "holds 3 nodes, but DIMENSION is 2"),
        ("3 3 4\n", "3 3\n", "a node without two numeric coordinates"),
        ("3 3 4", "3 3 four", "a node without two numeric coordinates"),
        ("3 3 4", "3 3 nan", r"node 3 is at \[3.0, nan\]"),
        ("3 3 4", "3 3 inf", r"node 3 is at \[3.0, inf\]"),
        ("1 0.0 0\n2 3e0 0\n3 3 4\n", "1 0 0 0\n2 0 0 0\n3 0 0 0\n", "other than two coordinates"),
        ("NODE_COORD_SECTION\n1 0.0 0\n2 3e0 0\n3 3 4\n", "", "no NODE_COORD_SECTION"),
        ("1 0.0 0\n2 3e0 0\n3 3 4\n", "", "NODE_COORD_SECTION needs"),
        ("NAME: triangle", "once upon a time", "cannot be parsed"),
        ("TYPE: TSP\n", "TYPE: TSP\nEDGE_WEIGHT_SECTION\n0 1 2\n1 0\n", "cannot be parsed"),
    ],
)
def test_read_tsplib_names_file_cause_and_remedy_in_one_line(old, new, cause, tmp_path):
    assert old in TRIANGLE_FILE
    path = write(tmp_path, TRIANGLE_FILE.replace(old, new))
    with pytest.raises(InstanceError, match=cause) as caught:
        read_tsplib(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert ";" in message


def test_read_tsplib_refuses_two_nodes(tmp_path):
    path = write(tmp_path, TRIANGLE_FILE.replace("3 3 4\n", "").replace("DIMENSION: 3", "DIMENSION: 2"))
    with pytest.raises(InstanceError, match=r"holds 2 nodes; .* at least 3"):
        read_tsplib(path)


def test_read_tsplib_refuses_missing_files_folders_and_binary_data(tmp_path):
    with pytest.raises(InstanceError, match=r"missing\.tsp: cannot be read .*No such file"):
        read_tsplib(tmp_path / "missing.tsp")
    with pytest.raises(InstanceError, match="cannot be read"):
        read_tsplib(tmp_path)
    binary = tmp_path / "binary.tsp"
    binary.write_bytes(bytes(range(256)))
    with pytest.raises(InstanceError, match=r"binary\.tsp: cannot be parsed"):
        read_tsplib(binary)


def test_tsplib_distances_round_halves_up():
    coords = np.array([[0.0, 0], [0.5, 0], [1.5, 0], [2.4, 0]])
    assert tsplib_distances(coords)[0].tolist() == [0, 1, 2, 2]


@pytest.mark.skipif(not TSPLIB_FOLDER.is_dir(), reason="TSPLIB files are not part of the repository")
@pytest.mark.parametrize(("name", "optimum"), [("berlin52", 7542), ("eil51", 426), ("st70", 675), ("kroA100", 21282)])
def test_lkh_finds_the_published_optimum_of_tsplib_files(name, optimum):
    coords = read_tsplib(TSPLIB_FOLDER / f"{name}.tsp").coords
    assert tsplib_tour_length(coords, lkh_tour(tsplib_distances(coords))) == optimum


@pytest.mark.skipif(not TSPLIB_FOLDER.is_dir(), reason="TSPLIB files are not part of the repository")
@pytest.mark.parametrize("name", ["att48", "bays29", "burma14", "gr17", "ulysses16"])
def test_read_tsplib_refuses_real_files_of_other_kinds(name):
    with pytest.raises(InstanceError, match="EUC_2D"):
        read_tsplib(TSPLIB_FOLDER / f"{name}.tsp")


def test_scale_to_unit_square_keeps_the_aspect_ratio():
    scaled = scale_to_unit_square(np.array([[-10.0, 5], [10, 5], [0, 10]]))
    assert scaled.tolist() == [[0, 0], [1, 0], [0.5, 0.25]]


def test_scale_to_unit_square_refuses_a_single_position():
    with pytest.raises(ValueError, match="two different positions"):
        scale_to_unit_square(np.ones((4, 2)))
