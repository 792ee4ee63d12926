"""A network of streets in the plane: its places, how long driving between them takes, and along which streets."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int, Int64

from streets.packages import import_sparse
from system.errors import UserError

# No two points are at the same spot: an arc of no length would count as none.
SHORTEST_METRES = 0.01
# How many numbers of seconds are computed at a time: they need 128 MB.
COMPUTED_AT_ONCE = 2**24
# The mean radius of the earth.
EARTH_METRES = 6_371_009.0
# Seconds that a metre takes at 1 km/h.
SECONDS = 3.6
# Up to so many points are all places; of more, the junctions alone, which may be so many.
MOST_POINTS, MOST_PLACES = 2_500, 5_000


class Network(NamedTuple):
    """Directed arcs between points, from every one of which every other can be reached, and the places among these.

    Attributes:
        points: where the points lie, metres east and north of the middle.
        middle: longitude and latitude from which points were projected; 0 where the plane is no part of the earth.
        tails: the points at which arcs begin.
        heads: the points at which they end.
        metres: their lengths.
        speeds: in km/h, where nothing is in the way.
        kinds: their classes, as indices into `streets.roads.CLASS_NAMES`.
        places: points, in ascending order: all of them or, where there are more than `MOST_POINTS`, the junctions. A
            junction is where three streets or more meet, or where one ends: a point with other than 2 neighbours.
    """

    points: Float64[np.ndarray, "V 2"]
    tails: Int64[np.ndarray, " A"]
    heads: Int64[np.ndarray, " A"]
    metres: Float64[np.ndarray, " A"]
    speeds: Float64[np.ndarray, " A"]
    kinds: Int64[np.ndarray, " A"]
    places: Int64[np.ndarray, " P"]
    middle: Float64[np.ndarray, "2"] = np.zeros(2)

    @property
    def free_flow(self) -> Float64[np.ndarray, " A"]:
        """Seconds that every arc takes where nothing is in the way."""
        return SECONDS * self.metres / self.speeds

    def unit_square(self) -> tuple[Float64[np.ndarray, "V 2"], float]:
        """All points in the units in which the places fill the longer side of the unit square; metres of a unit."""
        corner = self.points[self.places].min(0)
        side = float(np.ptp(self.points[self.places], axis=0).max())
        return (self.points - corner) / side, side


def projected(degrees: Float64[np.ndarray, "V 2"], middle: Float64[np.ndarray, "2"]) -> Float64[np.ndarray, "V 2"]:
    """Longitudes and latitudes as metres east and north of the middle (the equirectangular projection)."""
    shrunk = np.array([math.cos(math.radians(float(middle[1]))), 1.0])
    return EARTH_METRES * np.radians(degrees - middle) * shrunk


def connected(
    points: Float64[np.ndarray, "V 2"],
    tails: Int64[np.ndarray, " A"],
    heads: Int64[np.ndarray, " A"],
    speeds: Float64[np.ndarray, " A"],
    kinds: Int64[np.ndarray, " A"],
    *,
    metres: Float64[np.ndarray, " A"] | None = None,
) -> Network:
    """The largest part of a network in which every point can be reached from every other; see `Network`.

    Arcs may be longer than the straight line, but no shorter, whatever `metres` says; None: all of them are straight.

    Raises:
        UserError: it has fewer than 3 places, or more than `MOST_PLACES`, or all of them are at one spot.
    """
    graph = _graph(len(points), tails, heads, np.ones(len(tails)))
    _, component = import_sparse().csgraph.connected_components(graph, directed=True, connection="strong")
    largest = np.bincount(component).argmax() if len(component) else 0
    kept = component == largest
    renumbered = np.cumsum(kept) - 1
    inside = kept[tails] & kept[heads] & (tails != heads)
    tails, heads = renumbered[tails[inside]], renumbered[heads[inside]]
    points = points[kept]
    straight = np.linalg.norm(points[tails] - points[heads], axis=-1).clip(SHORTEST_METRES)
    metres = straight if metres is None else np.maximum(metres[inside], straight)
    places = np.arange(len(points))
    if len(points) > MOST_POINTS:
        places = np.flatnonzero(_neighbours(len(points), tails, heads) != 2)
    if not 3 <= len(places) <= MOST_PLACES:
        what = "places that can all be reached from one another" if len(places) < 3 else "junctions"
        raise UserError(f"it has {len(places)} {what}; give an extract with 3 at least and {MOST_PLACES:,} at most")
    if not np.ptp(points[places], axis=0).any():
        raise UserError("all its places are at one spot; give an extract of a real map")
    return Network(points, tails, heads, metres, speeds[inside], kinds[inside], places)


def _neighbours(count: int, tails: Int64[np.ndarray, " A"], heads: Int64[np.ndarray, " A"]) -> Int64[np.ndarray, " V"]:
    """How many other points each is joined to, in whatever direction."""
    pairs = np.unique(np.sort(np.stack((tails, heads), -1), axis=-1), axis=0)
    return np.bincount(pairs.ravel(), minlength=count)


def travel_seconds(network: Network, seconds: Float64[np.ndarray, " A"]) -> Float32[np.ndarray, "P P"]:
    """How long the quickest way takes from each place (row) to each (column).

    Args:
        network: the streets.
        seconds: that each arc takes.
    """
    graph = _graph(len(network.points), network.tails, network.heads, seconds)
    places, rows = network.places, max(1, COMPUTED_AT_ONCE // len(network.points))
    pieces = [
        import_sparse().csgraph.dijkstra(graph, indices=places[begin : begin + rows])[:, places].astype(np.float32)
        for begin in range(0, len(places), rows)
    ]
    return np.concatenate(pieces)


def quickest_way(
    network: Network, seconds: Float64[np.ndarray, " A"], stops: Int[np.ndarray, " L"]
) -> Int64[np.ndarray, " W"]:
    """The points that the quickest way passes from one place to the next.

    Args:
        network: the streets.
        seconds: that each arc takes.
        stops: places in visiting order, as indices of `network.places`.
    """
    graph = _graph(len(network.points), network.tails, network.heads, seconds)
    ends = network.places[stops]
    way = [int(ends[0])]
    for begin, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        _, before = import_sparse().csgraph.dijkstra(graph, indices=begin, return_predecessors=True)
        leg = [end]
        while leg[-1] != begin:
            leg.append(int(before[leg[-1]]))
        way += leg[-2::-1]
    return np.array(way)


def _graph(
    count: int, tails: Int64[np.ndarray, " A"], heads: Int64[np.ndarray, " A"], weights: Float[np.ndarray, " A"]
) -> Any:
    """A sparse matrix of arcs: the least of those that join the same points in the same direction."""
    order = np.lexsort((weights, heads, tails))
    tails, heads, weights = tails[order], heads[order], weights[order]
    first: Bool[np.ndarray, " A"] = np.ones(len(tails), dtype=bool)
    first[1:] = (tails[1:] != tails[:-1]) | (heads[1:] != heads[:-1])
    return import_sparse().csr_matrix((weights[first], (tails[first], heads[first])), shape=(count, count))
