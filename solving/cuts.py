"""What is cut out of a closed tour to be solved again, and how it goes back in, whoever solved it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int64

# A cut of fewer nodes leaves nothing to decide.
FEWEST_NODES = 5


class Cut(NamedTuple):
    """Nodes of a tour, in its order: pieces of two or more, between which lies the rest of the tour.

    Whoever visits the end of a piece goes on at its mate, since the rest of the tour joins the two. It may be passed in
    either direction.

    Attributes:
        nodes: the nodes that were cut out.
        mate: of each of them, where in `nodes` the rest of the tour leads to from there; -1 within a piece.
    """

    nodes: Int64[np.ndarray, " K"]
    mate: Int64[np.ndarray, " K"]

    def free(self, order: Int64[np.ndarray, "*B K"]) -> Bool[np.ndarray, "*B K"]:
        """Which legs of closed orders of the nodes, from each to the next, are not the rest of the tour."""
        return self.mate[order] != np.roll(order, -1, axis=-1)


def sections(tour: Int64[np.ndarray, " N"], size: int, *, offset: int) -> list[Cut]:
    """A tour in cuts of `size` nodes, each of one piece, from `offset` on; a few nodes are left over."""
    turned = np.roll(tour, -offset)
    mate = np.full(size, -1)
    mate[[0, -1]] = size - 1, 0
    return [Cut(turned[begin : begin + size], mate) for begin in range(0, len(tour) - size, size)]


def neighbourhood(tour: Int64[np.ndarray, " N"], near: Int64[np.ndarray, " K"]) -> Cut | None:
    """The pieces of a tour that pass through some of its nodes; None where they leave nothing to decide.

    Nodes between which the rest of the tour lies on both sides belong to it.
    """
    inside = np.zeros(len(tour), dtype=bool)
    inside[near] = True
    chosen = inside[tour]
    # A node whose neighbours are both outside has nothing that could be changed.
    chosen &= np.roll(chosen, 1) | np.roll(chosen, -1)
    positions = np.flatnonzero(chosen)
    count = len(positions)
    if count < FEWEST_NODES or count == len(tour):
        return None
    ends = np.flatnonzero(np.diff(positions, append=positions[0] + len(tour)) != 1)
    begins = (ends + 1) % count
    mate = np.full(count, -1)
    mate[ends], mate[begins] = begins, ends
    return Cut(tour[positions], mate)


def splice(tour: Int64[np.ndarray, " N"], cut: Cut, order: Int64[np.ndarray, " K"]) -> Int64[np.ndarray, " N"]:
    """A tour with what was cut out of it in another closed order, in which mates stand next to each other."""
    positions = np.empty(len(tour), dtype=np.int64)
    positions[tour] = np.arange(len(tour))
    here = positions[cut.nodes]
    parts = []
    for index, following in zip(order, np.roll(order, -1), strict=True):
        parts.append(cut.nodes[index : index + 1])
        if cut.mate[index] == following:
            parts.append(_rest(tour, here, int(here[index]), int(here[following])))
    return np.concatenate(parts)


def _rest(tour: Int64[np.ndarray, " N"], cut: Int64[np.ndarray, " K"], begin: int, end: int) -> Int64[np.ndarray, " R"]:
    """The nodes between two positions of a tour on the side where nothing was cut out, from `begin` to `end`."""
    count = len(tour)
    ahead = (end - begin) % count
    # The cut's position that comes next after `begin` tells whether the way ahead is the rest of the tour.
    if ((cut - begin - 1) % count).min() == ahead - 1:
        return tour[(begin + 1 + np.arange(ahead - 1)) % count]
    return tour[(begin - 1 - np.arange(count - ahead - 1)) % count]


def are_apart(first: Cut, second: Cut, positions: Int64[np.ndarray, " N"]) -> bool:
    """Whether two cuts can be solved without regard to each other: one lies in a single rest of the other.

    Then neither changes which ends of the other's pieces the rest of the tour joins.
    """
    gaps = np.searchsorted(np.sort(positions[first.nodes]), positions[second.nodes]) % len(first.nodes)
    return bool((gaps == gaps[0]).all()) and not np.isin(first.nodes, second.nodes).any()


def choose_apart(cuts: Sequence[Cut], tour: Int64[np.ndarray, " N"]) -> list[Cut]:
    """Those of some cuts that can be solved together, the first among them."""
    positions = np.empty(len(tour), dtype=np.int64)
    positions[tour] = np.arange(len(tour))
    chosen: list[Cut] = []
    for cut in cuts:
        if all(are_apart(other, cut, positions) for other in chosen):
            chosen.append(cut)
    return chosen


def random_insertion(coords: Float[np.ndarray, "N D"], random: np.random.Generator) -> Int64[np.ndarray, " N"]:
    """A tour that grows by one node at a time, in random order, each where it makes the tour the least longer.

    About a tenth above the best (Rosenkrantz, Stearns and Lewis 1977 have bounds), in time that grows with the square
    of the nodes: 5 seconds for 10,000.
    """
    coords = coords.astype(np.float64)
    count = len(coords)
    order = random.permutation(count)
    following = np.zeros(count, dtype=np.int64)
    # Of the tour so far, in the order in which its nodes came: each node, and the length of the leg that leaves it.
    legs = np.zeros(count)
    rank = np.empty(count, dtype=np.int64)
    rank[order] = np.arange(count)
    placed = coords[order]
    for index in range(1, count):
        away = np.linalg.norm(placed[:index] - placed[index], axis=-1)
        after = following[:index]
        longer = away + away[after] - legs[:index]
        best = int(longer.argmin())
        following[index], following[best] = following[best], index
        legs[index], legs[best] = away[following[index]], away[best]
    tour = np.empty(count, dtype=np.int64)
    at = 0
    for step in range(count):
        tour[step] = order[at]
        at = following[at]
    return tour
