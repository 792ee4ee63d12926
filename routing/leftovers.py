"""What is left of an episode, as a problem for a solver that knows what moves cost."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int, Int64


class Problem(NamedTuple):
    """A tour to be found by what moves cost, or routes of vehicles from node 0.

    Attributes:
        costs: of moves from each node (row) to each node (column).
        demand: of each node, 0 for the depot; None where a tour is wanted.
        capacity: of every vehicle.
        vehicles: how many routes there may be; None for any number.
    """

    costs: Float64[np.ndarray, "N N"]
    demand: Int64[np.ndarray, " N"] | None = None
    capacity: int | None = None
    vehicles: int | None = None


class Leftover(NamedTuple):
    """What is left of one episode.

    Attributes:
        problem: whose solutions, as `routing.solutions` writes them, are ways to the episode's end.
        nodes: which node of the instance each node of the problem stands for.
        done: the problem's first nodes, so many, have been visited already, in this order.
        home: where the episode ends.
    """

    problem: Problem
    nodes: Int64[np.ndarray, " M"]
    done: int
    home: int

    def moves(self, solution: Int[np.ndarray, " L"]) -> Int64[np.ndarray, " K"]:
        """The nodes that a solution visits from now on; the last of them is `home`."""
        done = np.arange(self.done)
        # A solution is a cycle, and may have been written from anywhere on it.
        turned = next(
            rolled
            for begin in np.flatnonzero(solution == 0)
            if np.array_equal((rolled := np.roll(solution, -begin))[: self.done], done)
        )
        return np.append(self.nodes[turned[self.done :]], self.home)


def rest_of_tour(
    costs: Float64[np.ndarray, "N N"], still_open: Int64[np.ndarray, " K"], *, current: int, first: int
) -> Leftover:
    """The path from the current node through those that are open, and back to the first."""
    nodes = np.concatenate(([current], still_open))
    rest = _between(costs, nodes)
    # To come back to where one stands now is to come home.
    rest[1:, 0] = costs[still_open, first]
    return Leftover(Problem(rest), nodes, done=1, home=first)


def rest_of_plan(
    costs: Float64[np.ndarray, "N N"],
    still_open: Int64[np.ndarray, " K"],
    *,
    current: int,
    demand: Int64[np.ndarray, " N"],
    load: int,
    capacity: int,
) -> Leftover:
    """The rest of the current route, and the routes after it, of vehicles whose depot is node 0."""
    if current == 0:
        nodes = np.concatenate(([0], still_open))
        return Leftover(Problem(_between(costs, nodes), demand[nodes], capacity), nodes, done=1, home=0)
    # A route that has begun leads straight to where the vehicle stands, at no cost and with what it has delivered; to
    # go there from anywhere else costs more than any detour that it could save.
    nodes = np.concatenate(([0, current], still_open))
    rest, amounts = _between(costs, nodes), demand[nodes]
    rest[2:, 1] = 4 * np.abs(rest).max()
    rest[0, 1], amounts[1] = 0.0, capacity - load
    return Leftover(Problem(rest, amounts, capacity), nodes, done=2, home=0)


def _between(costs: Float64[np.ndarray, "N N"], nodes: Int64[np.ndarray, " M"]) -> Float64[np.ndarray, "M M"]:
    """What moves between some nodes cost; to stay costs nothing, whatever a model may think of it."""
    between = costs[np.ix_(nodes, nodes)]
    np.fill_diagonal(between, 0.0)
    return between
