"""Travel times between the places of a map, computed once and then read from the user's cache folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Float64

from streets import sumo
from streets.helsinki import NAME, stored_extract
from streets.network import Network, travel_seconds
from streets.reading import read_network
from system import cached_files

# To be raised when travel times are computed in another way.
VERSION = "travel-seconds-1"
NUMBER = np.dtype("<f4")
# What they are called in warnings.
SECONDS = "travel seconds"


def network_of(source: str) -> Network:
    """The streets of `helsinki`, or of a file: a network of SUMO where its name says so, or else of OpenStreetMap.

    Raises:
        UserError: there are none.
    """
    if source.endswith(sumo.SUFFIXES):
        return sumo.read_network(Path(source))
    return read_network(stored_extract() if source == NAME else Path(source))


def cached_seconds(network: Network, seconds: Float64[np.ndarray, " A"]) -> Float32[np.ndarray, "P P"]:
    """How long the quickest way takes from each place (row) to each (column), where each arc takes so many seconds."""
    count = len(network.places)
    parts = (network.tails, network.heads, network.places, seconds)
    shapes = " ".join(str(part.shape) for part in parts)
    data = b"".join(np.ascontiguousarray(part).tobytes() for part in parts)
    key = hashlib.sha256(f"{VERSION} {shapes}".encode() + data).hexdigest()
    cache_file = cached_files.cache_folder() / f"{key}.seconds"
    kept = cached_files.read(cache_file, most=NUMBER.itemsize * count**2, what=SECONDS)
    if kept is not None and len(kept) == NUMBER.itemsize * count**2:
        return np.frombuffer(kept, NUMBER).astype(np.float32).reshape(count, count)
    table = travel_seconds(network, seconds)
    cached_files.write(cache_file, table.astype(NUMBER).tobytes(), what=SECONDS)
    return table
