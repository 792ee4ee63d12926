"""Solutions by a simple rule, to compare with: the nearest legal node each time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float64, Int64

from routing.files import RoutingInstance
from routing.metrics import GIVEN, leg_lengths
from routing.rules import Rules
from solving.decoding import chunks, without_waiting
from solving.frames import as_instance, pose


def nearest_neighbour_tours(rules: type[Rules], instances: Sequence[RoutingInstance]) -> list[Int64[np.ndarray, " L"]]:
    """The tours that go to the nearest legal node each time, a vehicle home only when it has to.

    Args:
        rules: of the instances' problem.
        instances: all of one size and one metric.
    """
    num_nodes, metric = len(instances[0].coords), instances[0].metric
    found: list[Int64[np.ndarray, " L"]] = []
    for rows in chunks(len(instances), 16 * num_nodes):
        coords = np.stack([instance.coords for instance in instances[rows]])
        matrices = None
        # Rules ask for the number of nodes, not where they are.
        if metric == GIVEN:
            matrices = np.stack([instance.cost_matrix() for instance in instances[rows]])
            state = rules.reset(pose(instances[rows], torch.device("cpu")).instance)
        else:
            state = rules.reset(as_instance(instances[rows], torch.from_numpy(coords[..., :2])))
        visited = [state.current.numpy()]
        for _ in range(rules.episode_steps(num_nodes)):
            if matrices is None:
                here = coords[np.arange(len(coords)), visited[-1]][:, None]
                legs = leg_lengths(np.broadcast_to(here, coords.shape), coords, metric)
            else:
                legs = matrices[np.arange(len(coords)), visited[-1]]
            # A tour ends at its first node, which is closed until no other is left.
            legs = np.where(rules.action_mask(state).numpy(), legs, np.inf)
            legs[:, 0] = np.where(np.isfinite(legs[:, 1:]).any(1), np.inf, legs[:, 0])
            visited.append(legs.argmin(1))
            state, finished = rules.step(state, torch.from_numpy(visited[-1]))
            if bool(finished.all()):
                break
        found += [without_waiting(tour) for tour in np.stack(visited, -1)]
    return found


def nearest_neighbour_lengths(rules: type[Rules], instances: Sequence[RoutingInstance]) -> Float64[np.ndarray, " I"]:
    """Lengths of these tours."""
    tours = nearest_neighbour_tours(rules, instances)
    return np.array([each.tour_length(tour) for each, tour in zip(instances, tours, strict=True)], dtype=np.float64)
