"""Whether cost worlds matter: what tours cost that are optimal for an agent that knows less than everything.

    python -m benchmarks.worlds --instances 200
    python -m benchmarks.worlds --instances 200 --streets helsinki

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

from benchmarks.flags import CONFIGS, number
from config import one_line_errors, parse_command_line
from envs.routing import TSPRules
from routing.cases import field_cases
from routing.cost_world import Costs
from routing.costs import COSTS, find_costs
from routing.instances import (
    VALIDATION_SEED,
    cheapest_tours,
    euclidean_distances,
    reference_costs,
    tour_costs,
)
from routing.street_costs import STREET_WORLDS
from training import launch

ENTRY_KEYS = {"instances": "instances to look at (default 200)", "world": "one world alone: a name, or module:function"}


def percent_above(costs: np.ndarray, optimal: np.ndarray) -> float:
    """By how much mean costs lie above the mean of the optimal ones."""
    return 100 * float(costs.mean() / optimal.mean() - 1)


def compare(costs: Costs, num_nodes: int, count: int) -> str:
    """One row of the table."""
    instance, factors = field_cases(TSPRules.under(costs), count, num_nodes, seed=VALIDATION_SEED)
    matrix = costs.matrix(instance, factors).numpy()
    optimal = reference_costs(matrix)
    shortest = cheapest_tours(euclidean_distances(instance.coords.numpy()))
    forwards, backwards = tour_costs(matrix, shortest), tour_costs(matrix, shortest[:, ::-1])
    as_they_stand = percent_above(forwards, optimal)
    cheaper_way = percent_above(np.minimum(forwards, backwards), optimal)
    on_average = "-"
    if costs.hidden:
        average = cheapest_tours(costs.mean_matrix(instance).numpy())
        on_average = f"{percent_above(tour_costs(matrix, average), optimal):.1f}"
    return f"| `{costs.name}` | {optimal.mean():.3f} | {as_they_stand:.1f} | {cheaper_way:.1f} | {on_average} |"


def main(argv: list[str]) -> None:
    """Print the table."""
    with one_line_errors(Path(__file__).stem, *launch.USER_ERRORS):
        command = parse_command_line(argv, config_path=CONFIGS, description=__doc__ or "", entry_keys=ENTRY_KEYS)
        count = int(number(command.entry["instances"] or "200", "instances", least=1))
        asked, streets = command.entry["world"], command.config.streets
        chosen = [name for name, costs in COSTS.items() if not costs.drift] if asked is None else [str(asked)]
        if asked is None and streets:
            chosen += STREET_WORLDS
        worlds = [find_costs(name, streets=streets if name in STREET_WORLDS else "") for name in chosen]
        lines = [
            "| world | optimal, mean | shortest tours, % above | the cheaper way round, % | optimal on average, % |",
            "|---|---|---|---|---|",
            *(compare(costs, command.config.nodes, count) for costs in worlds),
        ]
        sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
