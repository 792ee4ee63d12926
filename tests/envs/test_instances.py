import hashlib
import itertools
import os
import tracemalloc

import numpy as np
import pytest
import torch

from routing import instances
from routing.instances import (
    euclidean_distances,
    field_test_coords,
    held_karp_tours,
    lkh_tour,
    reference_lengths,
    reference_tour,
    reference_tours,
    scale_to_unit_square,
    uniform_coords,
)

SQUARE = np.array([[0.0, 0], [1, 1], [1, 0], [0, 1]])


def lengths_of(tours, distances):
    rows = np.arange(len(tours))[:, None]
    return distances[rows, tours, np.roll(tours, -1, axis=1)].sum(1)


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


def test_reference_tours_are_found_in_pieces(monkeypatch):
    coords = field_test_coords(5, 7)
    together = reference_tours(coords)
    monkeypatch.setattr(instances, "HELD_KARP_PIECE", 3)
    np.testing.assert_array_equal(reference_tours(coords), together)


def test_reference_tours_hold_the_distances_of_one_instance_at_a_time(monkeypatch):
    monkeypatch.setattr(instances, "lkh_tour", lambda distances: np.arange(len(distances)))
    coords = field_test_coords(100, 300)
    tracemalloc.start()
    try:
        assert reference_tours(coords).shape == (300, 100)
        # All distances together are 24 MB.
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


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
    assert len(list((tmp_path / (xdg or ".cache") / "dreamer-routing").glob("*.lengths"))) == 1


def tampered(cache_file, change):
    """Put other lengths into a file of the cache, with or without the checksum that goes with them."""
    content = cache_file.read_bytes()
    size = hashlib.sha256().digest_size
    data = change(np.frombuffer(content[size:])).tobytes()
    return content[:size] + data, hashlib.sha256(cache_file.name.encode() + data).digest() + data


@pytest.mark.parametrize(
    "damage",
    [
        *("truncated", "empty", "not an array", "too few", "10 % off", "zeros", "a folder", "a fifo"),
        *("not finite, with a checksum", "zeros, with a checksum", "negative, with a checksum", "of other instances"),
    ],
)
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
        case "too few":
            cache_file.write_bytes(tampered(cache_file, lambda whole: whole[:2])[1])
        case "10 % off":
            cache_file.write_bytes(tampered(cache_file, lambda whole: 1.1 * whole)[0])
        case "zeros":
            cache_file.write_bytes(tampered(cache_file, lambda whole: 0 * whole)[0])
        case "not finite, with a checksum":
            cache_file.write_bytes(tampered(cache_file, lambda whole: np.nan * whole)[1])
        case "zeros, with a checksum":
            cache_file.write_bytes(tampered(cache_file, lambda whole: 0 * whole)[1])
        case "negative, with a checksum":
            cache_file.write_bytes(tampered(cache_file, lambda whole: -whole)[1])
        case "of other instances":
            reference_lengths(2 * coords, cache_dir=tmp_path)
            (other,) = set(tmp_path.iterdir()) - {cache_file}
            other.rename(cache_file)
        case _:
            cache_file.unlink()
            cache_file.mkdir() if damage == "a folder" else os.mkfifo(cache_file)
    np.testing.assert_array_equal(reference_lengths(coords, cache_dir=tmp_path), lengths)
    assert "again" in caplog.text
    if damage != "a folder":
        assert cache_file.read_bytes() == content
        assert list(tmp_path.iterdir()) == [cache_file]


def test_reference_lengths_of_nodes_at_one_point_are_zero_and_not_cached(tmp_path, caplog):
    for _ in range(2):
        assert reference_lengths(np.zeros((1, 4, 2)), cache_dir=tmp_path).tolist() == [0]
    assert not list(tmp_path.iterdir()) and not caplog.text


def test_reference_lengths_do_without_a_cache_that_cannot_be_written(tmp_path, caplog):
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    assert reference_lengths(SQUARE[None], cache_dir=in_the_way / "cache").tolist() == [4]
    assert "not cached" in caplog.text


def test_reference_tour_is_optimal_and_takes_any_number_of_nodes():
    line = np.array([[0.0, 0], [3, 0], [1, 0], [2, 0]])
    distances = euclidean_distances(line)
    for count in range(1, 5):
        tour = reference_tour(distances[:count, :count])
        assert sorted(tour) == list(range(count))
    assert lengths_of(tour[None], distances[None]) == 6


@pytest.mark.parametrize("factor", [0.0, 1e-6, 1.0, 1e12])
def test_reference_tour_takes_distances_of_any_size(factor):
    distances = factor * np.rint(1000 * euclidean_distances(field_test_coords(12, 1)[0]))
    best = lengths_of(lkh_tour(np.rint(distances / (factor or 1)).astype(int))[None], distances[None])
    np.testing.assert_allclose(lengths_of(reference_tour(distances)[None], distances[None]), best, rtol=1e-5)


def test_scale_to_unit_square_keeps_the_aspect_ratio():
    scaled = scale_to_unit_square(np.array([[-10.0, 5], [10, 5], [0, 10]]))
    assert scaled.tolist() == [[0, 0], [1, 0], [0.5, 0.25]]


def test_scale_to_unit_square_puts_a_single_position_at_the_origin():
    assert scale_to_unit_square(np.full((4, 2), 7.0)).tolist() == [[0, 0]] * 4
