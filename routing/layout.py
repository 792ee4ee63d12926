"""Where a picture shows the nodes of an instance, also of one that has costs and no positions."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64

from routing.metrics import plane
from routing.parsing import RoutingInstance

# Costs beyond so many times the median say that there is no way, not that it is long.
LONGEST_SHOWN = 3.0


def shown_at(instance: RoutingInstance) -> Float64[np.ndarray, "N 2"]:
    """Positions in a picture: the file's own, or else a layout by costs."""
    if instance.coords.shape[1]:
        return plane(instance.coords, instance.metric)
    return layout_by_costs(instance.cost_matrix())


def layout_by_costs(costs: Float64[np.ndarray, "N N"]) -> Float64[np.ndarray, "N 2"]:
    """Positions whose distances come near to the costs, of both directions on average.

    This is classical multidimensional scaling (W. S. Torgerson, "Multidimensional scaling: I. Theory and method",
    Psychometrika 17, 1952): the two largest parts of the doubly centred squares.
    """
    count = len(costs)
    between = ~np.eye(count, dtype=bool)
    both_ways = (costs + costs.T) / 2
    if between.any() and (middle := np.median(both_ways[between])) > 0:
        both_ways = np.minimum(both_ways, LONGEST_SHOWN * middle)
    squares = np.square(both_ways)
    centred = -(squares - squares.mean(0) - squares.mean(1, keepdims=True) + squares.mean()) / 2
    values, directions = np.linalg.eigh(centred)
    positions = directions[:, :-3:-1] * np.sqrt(np.maximum(values[:-3:-1], 0.0))
    # One node alone has one direction.
    return np.pad(positions, ((0, 0), (0, 2 - positions.shape[1])))
