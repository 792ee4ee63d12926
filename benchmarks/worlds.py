"""Whether cost worlds matter: what tours cost that are optimal for an agent that knows less than everything.

    python -m benchmarks.worlds --instances 200

For each world, on the first instances of the validation set, in percent above the optimal tours by the true costs
(LKH): the shortest tours, walked as they stand and in the cheaper of their two directions; and, where an episode hides
something, the tours that are optimal for the costs on average over it. An agent that learns nothing of what is hidden
can do no better than the last on average, and one that is shown it can do as well as 0. Where costs change within an
episode no optimal tour can be known beforehand: such cost worlds are left out.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks.policy_gradient import CONFIGS, number
from config import one_line_errors, parse_command_line
from routing.costs import COSTS, Costs, find_costs
from routing.instances import (
    VALIDATION_SEED,
    cheapest_tours,
    euclidean_distances,
    field_test_coords,
    reference_costs,
    tour_costs,
)
from training import launch

ENTRY_KEYS = {"instances": "instances to look at (default 200)", "world": "one world alone: a name, or module:function"}
# How many draws of the hidden factors a mean is taken over.
DRAWS = 256


def percent_above(costs: np.ndarray, optimal: np.ndarray) -> float:
    """By how much mean costs lie above the mean of the optimal ones."""
    return 100 * float(costs.mean() / optimal.mean() - 1)


def mean_matrix(costs: Costs, coords: torch.Tensor) -> np.ndarray:
    """What every move costs on average over what is hidden, [I, N, N]."""
    draws = costs.fixed_factors(DRAWS, seed=0)
    assert draws is not None
    matrices = (costs.matrix(coords, factors.expand(len(coords), -1)).numpy() for factors in draws)
    return sum(matrices, np.zeros(1)) / DRAWS


def compare(costs: Costs, num_nodes: int, count: int) -> str:
    """One row of the table."""
    coords = field_test_coords(num_nodes, count, seed=VALIDATION_SEED)
    nodes = torch.from_numpy(coords)
    matrix = costs.matrix(nodes, costs.fixed_factors(count, seed=VALIDATION_SEED)).numpy()
    optimal = reference_costs(matrix)
    shortest = cheapest_tours(euclidean_distances(coords))
    forwards, backwards = tour_costs(matrix, shortest), tour_costs(matrix, shortest[:, ::-1])
    as_they_stand = percent_above(forwards, optimal)
    cheaper_way = percent_above(np.minimum(forwards, backwards), optimal)
    on_average = "-"
    if costs.hidden:
        on_average = f"{percent_above(tour_costs(matrix, cheapest_tours(mean_matrix(costs, nodes))), optimal):.1f}"
    return f"| `{costs.name}` | {optimal.mean():.3f} | {as_they_stand:.1f} | {cheaper_way:.1f} | {on_average} |"


def main(argv: list[str]) -> None:
    """Print the table."""
    with one_line_errors(Path(__file__).stem, *launch.USER_ERRORS):
        command = parse_command_line(argv, config_path=CONFIGS, description=__doc__ or "", entry_keys=ENTRY_KEYS)
        count = int(number(command.entry["instances"] or "200", "instances", least=1))
        asked = command.entry["world"]
        chosen = [name for name, costs in COSTS.items() if not costs.drift] if asked is None else [asked]
        lines = [
            "| world | optimal, mean | shortest tours, % above | the cheaper way round, % | optimal on average, % |",
            "|---|---|---|---|---|",
            *(compare(find_costs(str(name)), command.config.nodes, count) for name in chosen),
        ]
        sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
