"""Random routing instances, the field's test sets, and the tours to compare with."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import elkai
import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor
from tqdm import tqdm

from config import UserError
from system import cached_files

TEST_SEED = 1234
VALIDATION_SEED = 4321

# Up to here the exact dynamic programme is faster than starting LKH.
HELD_KARP_MAX_NODES = 9
# How many instances it takes at a time: they need 40 MB at 9 nodes.
HELD_KARP_PIECE = 1000

MIN_REFERENCE_NODES = 3

# The type of numbers in the cache.
NUMBER = np.dtype("<f8")
# What it is called in warnings.
LENGTHS = "reference lengths"

# How often LKH looks for a tour, of which it keeps the best.
LKH_RUNS = 10

# LKH works on integers, and this many units across an instance leave room in its 32 bits.
LKH_UNITS = 1_000_000

# Part of the name of every cache file: to be raised when reference tours change.
REFERENCE_VERSION = "held-karp-9-lkh-1"


def uniform_coords(
    num_instances: int, num_nodes: int, *, generator: torch.Generator, device: torch.device | str
) -> Float[Tensor, "I N 2"]:
    """Nodes uniform in the unit square, drawn on `device`, where the generator must live too."""
    return torch.rand(num_instances, num_nodes, 2, generator=generator, device=device)


def field_test_coords(num_nodes: int, num_instances: int, seed: int = TEST_SEED) -> Float64[np.ndarray, "I N 2"]:
    """The first instances of the test set that the field compares on (Kool et al. 2019), for the default seed.

    The set has 10,000 instances; drawing fewer gives its first rows.
    """
    return np.random.RandomState(seed).uniform(size=(num_instances, num_nodes, 2))


def scale_to_unit_square(coords: Float[np.ndarray, "N 2"]) -> Float64[np.ndarray, "N 2"]:
    """Shift and scale into the unit square, the longer side filling it and the aspect ratio kept.

    Nodes that all lie at one point come to lie at the origin.
    """
    shifted = coords.astype(np.float64) - coords.min(0)
    return shifted / (longer_side(coords) or 1.0)


def longer_side(coords: Float[np.ndarray, "N 2"]) -> float:
    """Width or height of the nodes, whichever is larger."""
    return float(np.ptp(coords.astype(np.float64), axis=0).max())


def euclidean_distances(coords: Float[np.ndarray, "*I N 2"]) -> Float64[np.ndarray, "*I N N"]:
    """Distances between all nodes of each instance."""
    coords = coords.astype(np.float64)
    return np.linalg.norm(coords[..., :, None, :] - coords[..., None, :, :], axis=-1)


def held_karp_tours(distances: Float[np.ndarray, "I N N"]) -> Int64[np.ndarray, "I N"]:
    """Shortest tours by dynamic programming over subsets (Held and Karp 1962), all instances at once.

    Time and memory grow as 2^N: for a handful of nodes.
    """
    num_instances, num_nodes, _ = distances.shape
    others = num_nodes - 1
    subsets = 1 << others
    # best[:, subset, last]: the shortest path from node 0 through the subset of nodes 1.., ending at its member last.
    best = np.full((num_instances, subsets, others), np.inf)
    previous = np.zeros((num_instances, subsets, others), dtype=np.int64)
    for last in range(others):
        best[:, 1 << last, last] = distances[:, 0, last + 1]
    for subset in range(1, subsets):
        for last in range(others):
            rest = subset ^ (1 << last)
            if not subset >> last & 1 or rest == 0:
                continue
            paths = best[:, rest] + distances[:, 1:, last + 1]
            previous[:, subset, last] = paths.argmin(1)
            best[:, subset, last] = paths.min(1)
    rows = np.arange(num_instances)
    tours = np.zeros((num_instances, num_nodes), dtype=np.int64)
    open_nodes = np.full(num_instances, subsets - 1)
    ends = (best[:, subsets - 1] + distances[:, 1:, 0]).argmin(1)
    for position in range(others, 0, -1):
        tours[:, position] = ends + 1
        open_nodes, ends = open_nodes ^ (1 << ends), previous[rows, open_nodes, ends]
    return tours


def lkh_tour(distances: Int[np.ndarray, "N N"], *, runs: int = LKH_RUNS) -> Int64[np.ndarray, " N"]:
    """A tour by the Lin-Kernighan-Helsgaun heuristic, optimal in practice at these sizes; the same on every call."""
    return np.array(elkai.DistanceMatrix(distances.tolist()).solve_tsp(runs)[:-1], dtype=np.int64)


def reference_tours(coords: Float[np.ndarray, "I N 2"]) -> Int64[np.ndarray, "I N"]:
    """Optimal tours (up to 9 nodes), or tours by LKH, from node 0. A progress bar shows when this takes long.

    Raises:
        UserError: fewer than 3 nodes, or coordinates that are not finite.
    """
    num_nodes = coords.shape[1]
    if num_nodes < MIN_REFERENCE_NODES or not np.isfinite(coords).all():
        raise UserError(f"coords of shape {coords.shape} need at least 3 nodes, all at finite positions")
    # Instances come in pieces, since distances are far more numbers than positions.
    if num_nodes <= HELD_KARP_MAX_NODES:
        pieces = range(0, max(len(coords), 1), HELD_KARP_PIECE)
        return np.concatenate(
            [held_karp_tours(euclidean_distances(coords[begin : begin + HELD_KARP_PIECE])) for begin in pieces]
        )
    return _lkh_tours(map(euclidean_distances, coords), count=len(coords))


def reference_tour(distances: Float[np.ndarray, "N N"], *, runs: int = LKH_RUNS) -> Int64[np.ndarray, " N"]:
    """An optimal tour (up to 9 nodes), or the best of LKH's, from node 0, for distances in any unit."""
    num_nodes = len(distances)
    if num_nodes < MIN_REFERENCE_NODES:
        return np.arange(num_nodes)
    if num_nodes <= HELD_KARP_MAX_NODES:
        return held_karp_tours(distances[None])[0]
    return lkh_tour(whole_distances(distances), runs=runs)


def whole_distances(distances: Float[np.ndarray, "N N"], *, units: int = LKH_UNITS) -> Int64[np.ndarray, "N N"]:
    """Distances in whole numbers up to `units`: as they are where they are such, else the longest that many."""
    # Whole distances are left as they are, so that the optimum is that of a rounded metric.
    if whole_already(distances, units=units):
        return distances.astype(np.int64)
    longest = distances.max()
    return np.rint(distances * (units / longest if longest > 0 else 1.0)).astype(np.int64)


def whole_already(distances: Float[np.ndarray, "N N"], *, units: int = LKH_UNITS) -> bool:
    """Whether distances are whole numbers up to `units`, which solvers take as they are."""
    return bool(distances.max() <= units and (distances == np.rint(distances)).all())


def reference_lengths(
    coords: Float[np.ndarray, "I N 2"], *, cache_dir: str | os.PathLike | None = None
) -> Float64[np.ndarray, " I"]:
    """Lengths of the reference tours, computed once for the same coordinates and then read from disk.

    A cache that cannot be read, or whose checksum differs, is computed again; one that cannot be written is logged and
    done without.

    Args:
        coords: node positions.
        cache_dir: where to keep the lengths; `dreamer-routing` in the user's cache folder where not given.

    Raises:
        UserError: fewer than 3 nodes, or coordinates that are not finite.
    """
    coords = np.ascontiguousarray(coords, dtype=np.float64)

    def compute() -> Float64[np.ndarray, " I"]:
        tours = reference_tours(coords)
        stops = np.take_along_axis(coords, tours[..., None], axis=1)
        return np.linalg.norm(stops - np.roll(stops, -1, axis=1), axis=-1).sum(1)

    return cached_lengths(coords, version=REFERENCE_VERSION, compute=compute, cache_dir=cache_dir)


def cached_lengths(
    *content: np.ndarray,
    version: str,
    compute: Callable[[], Float64[np.ndarray, " I"]],
    cache_dir: str | os.PathLike | None = None,
) -> Float64[np.ndarray, " I"]:
    """What `compute` gives, computed once for the same content and version and then read from disk.

    Args:
        content: all that the lengths depend on; the first array has a row for each instance.
        version: to be changed when the way of computing is.
        compute: called where the cache does not have them.
        cache_dir: as for `reference_lengths`.
    """
    contiguous = [np.ascontiguousarray(part) for part in content]
    shapes = " ".join(str(part.shape) for part in contiguous)
    data = b"".join(part.tobytes() for part in contiguous)
    name = hashlib.sha256(f"{version} {shapes}".encode() + data).hexdigest()
    cache_file = Path(cached_files.cache_folder() if cache_dir is None else cache_dir) / f"{name}.lengths"
    lengths = _read_cache(cache_file, num_instances=len(content[0]))
    if lengths is None:
        lengths = compute()
        # Nodes that all lie at one point have a tour of no length, which is quickly found again.
        if _are_lengths(lengths):
            cached_files.write(cache_file, lengths.astype(NUMBER).tobytes(), what=LENGTHS)
    return lengths


def cheapest_tours(costs: Float64[np.ndarray, "I N N"]) -> Int64[np.ndarray, "I N"]:
    """Optimal tours (up to 9 nodes), or tours by LKH, by the costs of moves from each node (row) to each (column)."""
    if costs.shape[-1] <= HELD_KARP_MAX_NODES:
        return held_karp_tours(costs)
    return _lkh_tours(costs, count=len(costs))


def _lkh_tours(costs: Iterable[Float64[np.ndarray, "N N"]], *, count: int) -> Int64[np.ndarray, "I N"]:
    bar = tqdm(costs, total=count, desc="reference tours", delay=2, disable=None)
    return np.stack([lkh_tour(whole_distances(each)) for each in bar])


def tour_costs(costs: Float64[np.ndarray, "I N N"], tours: Int[np.ndarray, "I L"]) -> Float64[np.ndarray, " I"]:
    """What closed tours cost in the direction in which they are written."""
    return costs[np.arange(len(costs))[:, None], tours, np.roll(tours, -1, axis=1)].sum(1)


def reference_costs(
    costs: Float64[np.ndarray, "I N N"], *, cache_dir: str | os.PathLike | None = None
) -> Float64[np.ndarray, " I"]:
    """What the cheapest tours cost, as `reference_lengths`, but by costs of moves that may depend on the direction."""
    return cached_lengths(
        costs,
        version=REFERENCE_VERSION,
        compute=lambda: tour_costs(costs, cheapest_tours(costs)),
        cache_dir=cache_dir,
    )


def _read_cache(cache_file: Path, *, num_instances: int) -> Float64[np.ndarray, " I"] | None:
    """The lengths in a file of the cache; None where there is none, or where it is not as it was written."""
    data = cached_files.read(cache_file, most=NUMBER.itemsize * num_instances, what=LENGTHS)
    if data is None:
        return None
    if len(data) == NUMBER.itemsize * num_instances:
        lengths = np.frombuffer(data, NUMBER).astype(np.float64)
        if _are_lengths(lengths):
            return lengths
    cached_files.warn_of_damage(cache_file, what=LENGTHS)
    return None


def _are_lengths(lengths: Float64[np.ndarray, " I"]) -> bool:
    """Whether these can be divided by."""
    return bool((np.isfinite(lengths) & (lengths > 0)).all())
