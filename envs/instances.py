"""Routing instances: random ones, the field's test sets, TSPLIB files, and the tours to compare with."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import elkai
import numpy as np
import torch
import vrplib
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor
from tqdm import tqdm

logger = logging.getLogger(__name__)

TEST_SEED = 1234
VALIDATION_SEED = 4321

# Up to here the exact dynamic programme is faster than starting LKH.
HELD_KARP_MAX_NODES = 9

# LKH works on integers, and this many units across an instance leave room in its 32 bits.
LKH_UNITS = 1_000_000

# Part of the name of every cache file: to be raised when reference tours change.
REFERENCE_VERSION = "held-karp-9-lkh-1"


class InstanceError(ValueError):
    """An instance file that cannot be used: one line with the file, the cause and what would do."""


class TSPFile(NamedTuple):
    """A travelling-salesman instance read from a TSPLIB file."""

    name: str
    coords: Float64[np.ndarray, "N 2"]
    comment: str
    metric: str


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

    Raises:
        ValueError: all nodes lie at one point.
    """
    coords = coords.astype(np.float64)
    lowest = coords.min(0)
    longer_side = (coords.max(0) - lowest).max()
    if longer_side == 0:
        raise ValueError(f"all {len(coords)} nodes lie at {lowest.tolist()}; an instance needs two different positions")
    return (coords - lowest) / longer_side


def read_tsplib(path: str | os.PathLike) -> TSPFile:
    """Read a symmetric TSPLIB instance with coordinates in the plane (`EUC_2D`).

    The parser is vrplib, which reads CVRPLIB as well, needs nothing but numpy and is maintained; tsplib95 has had no
    release since 2020 and pins old versions of its dependencies.

    Raises:
        InstanceError: the file is missing, not TSPLIB, of another kind, or its coordinates are incomplete.
    """
    path = Path(path)
    try:
        fields = vrplib.read_instance(path, compute_edge_weights=False)
    except OSError as error:
        raise InstanceError(f"{path}: cannot be read ({error.strerror}); give the path of a .tsp file") from None
    except (ValueError, RuntimeError, LookupError, TypeError) as error:
        # What the parser lets escape on text it does not understand; distances given as a matrix are among that.
        raise InstanceError(
            f"{path}: cannot be parsed ({error}); a TSPLIB file with EDGE_WEIGHT_TYPE: EUC_2D is needed"
        ) from error
    problem, metric = fields.get("type"), fields.get("edge_weight_type")
    if problem != "TSP":
        raise InstanceError(f"{path}: TYPE is {problem}; only TSP can be solved")
    if metric != "EUC_2D":
        raise InstanceError(f"{path}: EDGE_WEIGHT_TYPE is {metric}; only EUC_2D can be solved")
    return TSPFile(
        name=str(fields.get("name", path.stem)),
        coords=_file_coords(path, fields),
        comment=str(fields.get("comment", "")),
        metric=metric,
    )


def _file_coords(path: Path, fields: dict[str, Any]) -> Float64[np.ndarray, "N 2"]:
    remedy = "NODE_COORD_SECTION needs one line `number x y` for each of DIMENSION nodes, at least 3"
    if "node_coord" not in fields:
        raise InstanceError(f"{path}: has no NODE_COORD_SECTION; {remedy}")
    try:
        coords = np.array(fields["node_coord"], dtype=np.float64)
    except (TypeError, ValueError):
        raise InstanceError(f"{path}: has a node without two numeric coordinates; {remedy}") from None
    if coords.ndim != 2 or coords.shape[1] != 2:
        raise InstanceError(f"{path}: has nodes with other than two coordinates; {remedy}")
    if len(coords) != fields.get("dimension"):
        raise InstanceError(f"{path}: holds {len(coords)} nodes, but DIMENSION is {fields.get('dimension')}; {remedy}")
    if len(coords) < 3:
        raise InstanceError(f"{path}: holds {len(coords)} nodes; {remedy}")
    not_finite = np.flatnonzero(~np.isfinite(coords).all(1))
    if not_finite.size:
        position = not_finite[0]
        raise InstanceError(f"{path}: node {position + 1} is at {coords[position].tolist()}; {remedy}, all finite")
    return coords


def euclidean_distances(coords: Float[np.ndarray, "*I N 2"]) -> Float64[np.ndarray, "*I N N"]:
    """Distances between all nodes of each instance."""
    coords = coords.astype(np.float64)
    return np.linalg.norm(coords[..., :, None, :] - coords[..., None, :, :], axis=-1)


def tsplib_distances(coords: Float[np.ndarray, "N 2"]) -> Int64[np.ndarray, "N N"]:
    """The metric of `EUC_2D`: distances rounded to the nearest integer, halves up (Reinelt 1995, nint)."""
    return np.floor(euclidean_distances(coords) + 0.5).astype(np.int64)


def tsplib_tour_length(coords: Float[np.ndarray, "N 2"], tour: Int[np.ndarray, " N"]) -> int:
    """Length of the closed tour in the metric of `EUC_2D`."""
    return int(tsplib_distances(coords)[tour, np.roll(tour, -1)].sum())


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


def lkh_tour(distances: Int[np.ndarray, "N N"]) -> Int64[np.ndarray, " N"]:
    """A tour by the Lin-Kernighan-Helsgaun heuristic, optimal in practice at these sizes; the same on every call."""
    return np.array(elkai.DistanceMatrix(distances.tolist()).solve_tsp()[:-1], dtype=np.int64)


def reference_tours(coords: Float[np.ndarray, "I N 2"]) -> Int64[np.ndarray, "I N"]:
    """Optimal tours (up to 9 nodes), or tours by LKH, from node 0. A progress bar shows when this takes long.

    Raises:
        ValueError: fewer than 3 nodes, or coordinates that are not finite.
    """
    num_nodes = coords.shape[1]
    if num_nodes < 3 or not np.isfinite(coords).all():
        raise ValueError(f"coords of shape {coords.shape} need at least 3 nodes, all at finite positions")
    if num_nodes <= HELD_KARP_MAX_NODES:
        return held_karp_tours(euclidean_distances(coords))
    return np.stack([lkh_tour(_lkh_distances(nodes)) for nodes in tqdm(coords, desc="reference tours", delay=2)])


def _lkh_distances(coords: Float[np.ndarray, "N 2"]) -> Int64[np.ndarray, "N N"]:
    distances = euclidean_distances(coords)
    longest = distances.max()
    return np.rint(distances * (LKH_UNITS / longest if longest > 0 else 1.0)).astype(np.int64)


def reference_lengths(
    coords: Float[np.ndarray, "I N 2"], *, cache_dir: str | os.PathLike | None = None
) -> Float64[np.ndarray, " I"]:
    """Lengths of the reference tours, computed once for the same coordinates and then read from disk.

    A cache that cannot be read is computed again; one that cannot be written is logged and done without.

    Args:
        coords: node positions.
        cache_dir: where to keep the lengths; `dreamer-routing` in the user's cache folder where not given.

    Raises:
        ValueError: fewer than 3 nodes, or coordinates that are not finite.
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
    cache_file = Path(_default_cache_dir() if cache_dir is None else cache_dir) / f"{name}.npy"
    lengths = _read_cache(cache_file, num_instances=len(content[0]))
    if lengths is None:
        lengths = compute()
        _write_cache(cache_file, lengths)
    return lengths


def _default_cache_dir() -> Path:
    # An empty XDG_CACHE_HOME means the same as none (XDG base directory specification).
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dreamer-routing"


def _read_cache(cache_file: Path, *, num_instances: int) -> Float64[np.ndarray, " I"] | None:
    try:
        lengths = np.load(cache_file, allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        logger.warning("computing reference lengths again: %s cannot be read (%s)", cache_file, error)
        return None
    if lengths.shape != (num_instances,) or lengths.dtype != np.float64 or not np.isfinite(lengths).all():
        logger.warning("computing reference lengths again: %s does not hold them", cache_file)
        return None
    return lengths


def _write_cache(cache_file: Path, lengths: Float64[np.ndarray, " I"]) -> None:
    try:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place, so that a run reading at this moment never sees half a file.
        with tempfile.NamedTemporaryFile(dir=cache_file.parent, suffix=".tmp", delete=False) as unfinished:
            np.save(unfinished, lengths)
        os.replace(unfinished.name, cache_file)
    except OSError as error:
        logger.warning("reference lengths are not cached: %s cannot be written (%s)", cache_file, error)
