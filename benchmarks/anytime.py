"""Gaps against seconds: every way to look for solutions beside solvers, on files or on random instances.

  python -m benchmarks.anytime checkpoints/tsp50.pt --random 10 --nodes 100 --seconds 1,3,10
  python -m benchmarks.anytime checkpoints/cvrp20.pt X-n101-k25.vrp X-n200-k36.vrp --seconds 1,10

prints one row for each way, and under each number of seconds the mean gap in percent to the best that anybody found of
an instance, or to what is known of its file. Every cell is a run of its own. A way that ends by itself stands in the
first column that it fits into, or in the last, with the seconds that it took.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import solve
from config import ConfigError, one_line_errors
from dreamer import Dreamer
from routing.files import RoutingInstance, read_instances
from routing.pyvrp_reference import cheapest_plan
from routing.solutions import known_length
from solving.answers import Solution
from solving.command_line import positive
from solving.decoding import Decoding
from solving.given_costs import solver_tour
from solving.nearest import nearest_neighbour_tours
from solving.polishing import polished
from system.terminal import Parser, show
from training import loading

# Those that take as long as they are given, and those that end by themselves.
TIMED = ("sample", "active", "reconstruct")
ENDING = ("greedy", "augment", "beam")


class Result(NamedTuple):
    """What a way found of one instance, and how long it looked."""

    length: float
    seconds: float


# From an instance and seconds to what was found.
Way = Callable[[RoutingInstance, float], Result]


def by_agent(agent: Dreamer, method: str) -> Way:
    """A way to decode."""

    def look(instance: RoutingInstance, seconds: float) -> Result:
        decoding = Decoding(method=method, seconds=seconds if method in TIMED else None)
        (found,) = solve.solve(agent, [instance], decoding)
        if not isinstance(found, Solution) or found.length is None:
            raise ConfigError(f"{instance.name} {found}")
        return Result(found.length, found.seconds)

    return look


def by_solver(agent: Dreamer, name: str) -> Way:
    """A solver, or simple tours under local search."""
    rules = solve.rules_of(agent)

    def look(instance: RoutingInstance, seconds: float) -> Result:
        begin = time.perf_counter()
        if name == "nearest nodes":
            (tour,) = nearest_neighbour_tours(rules, [instance])
        elif name == "nearest nodes, polished":
            (simple,) = nearest_neighbour_tours(rules, [instance])
            tour, _, _ = polished(instance, simple, simple, seconds=seconds)
        elif name == "PyVRP":
            load = (instance.demand, instance.capacity)
            tour = cheapest_plan(instance.cost_matrix(), *load, vehicles=instance.vehicles, seconds=seconds)
        else:
            tour = solver_tour(instance, "lkh")
        return Result(instance.tour_length(tour), time.perf_counter() - begin)

    return look


def ways(agent: Dreamer) -> dict[str, tuple[Way, bool]]:
    """Every way by its name, and whether it takes as long as it is given."""
    found = {name: (by_agent(agent, name), name in TIMED) for name in (*ENDING, *TIMED)}
    solvers = {"nearest nodes": False, "nearest nodes, polished": True, "PyVRP": True}
    if solve.rules_of(agent).name == "tsp":
        solvers["LKH"] = False
    return found | {name: (by_solver(agent, name), timed) for name, timed in solvers.items()}


def compare(
    agent: Dreamer, instances: Sequence[RoutingInstance], known: Sequence[float | None], seconds: Sequence[float]
) -> list[list[str]]:
    """The table: a row of cells for each way."""
    results: dict[str, list[list[Result]]] = {}
    every = ways(agent)
    for name, (way, timed) in every.items():
        results[name] = [[way(each, limit) for each in instances] for limit in (seconds if timed else seconds[-1:])]
        show(f"{name}: {results[name][-1][0].length:g} ...")
    best = [
        min([rows[index].length for runs in results.values() for rows in runs] + ([] if told is None else [told]))
        for index, told in enumerate(known)
    ]
    table = [["way", *(f"{limit:g} s" for limit in seconds)]]
    for name, (_, timed) in every.items():
        gaps = [
            100 * np.mean([row.length / least - 1 for row, least in zip(rows, best, strict=True)])
            for rows in results[name]
        ]
        if timed:
            cells = [f"{gap:.2f}" for gap in gaps]
        else:
            taken = float(np.mean([row.seconds for row in results[name][0]]))
            cells = [
                f"{gaps[0]:.2f} ({taken:.2g} s)" if column_of(taken, seconds) == index else ""
                for index in range(len(seconds))
            ]
        table.append([name, *cells])
    return table


def column_of(taken: float, seconds: Sequence[float]) -> int:
    """The column of a way that ended by itself after so many seconds."""
    return min(sum(limit < taken for limit in seconds), len(seconds) - 1)


def _seconds(text: str) -> list[float]:
    return sorted(float(part) for part in text.split(","))


def main(argv: list[str]) -> None:
    """Read the command line and compare."""
    parser = Parser("anytime", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--random", type=positive, metavar="COUNT")
    parser.add_argument("--nodes", type=positive)
    parser.add_argument("--seed", type=int, default=777)
    parser.add_argument("--seconds", type=_seconds, default=[1.0, 3.0, 10.0])
    arguments = parser.parse_intermixed_args(argv)
    if bool(arguments.files) == bool(arguments.random):
        parser.error("give either files or --random COUNT")
    torch.set_num_threads(1)
    with one_line_errors("anytime", *loading.USER_ERRORS):
        agent = solve.load_agent(arguments.run, torch.device("cpu"))
        if arguments.random:
            nodes = arguments.nodes or agent.task.num_actions
            instances = solve.random_instances(agent, arguments.random, nodes, arguments.seed)
            known: list[float | None] = [None] * len(instances)
        else:
            pairs = [(path, each) for path in arguments.files for each in read_instances(path)]
            instances = [each for _, each in pairs]
            known = [known_length(path, each) for path, each in pairs]
        table = compare(agent, instances, known, arguments.seconds)
        show("\n".join("| " + " | ".join(row) + " |" for row in table))


if __name__ == "__main__":
    main(sys.argv[1:])
