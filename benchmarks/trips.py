"""Writes a log of trips as drivers of a known world would leave it: what `--trips` learns from.

    python -m benchmarks.trips --cost lanes --drivers random --tours 1200 --out trips.csv
    python -m benchmarks.trips --cost streets --streets helsinki --drivers nearest --out trips.csv

Drivers visit the nodes of new maps in any order, or go to the open node that is cheapest to reach, and home at the end.
In a world of places, these are called by their numbers, and a table of them goes beside the log, as trips-places.csv.
Costs are in what the world measures: seconds in streets. Maps are drawn by `--seed`, and are none of the test's.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64, Int64

from benchmarks.flags import CONFIGS, number
from config import ConfigError, one_line_errors, parse_command_line
from envs.routing import TSPRules
from routing.cost_world import Costs
from routing.costs import find_costs
from routing.places import Places
from system.safe_files import replacing
from system.terminal import show
from training import launch

ENTRY_KEYS = {
    "drivers": "how they choose where to go next: random or nearest (default random)",
    "tours": "how many tours they make (default 1200)",
    "out": "the file to write (default trips.csv)",
}
DRIVERS = ("random", "nearest")


def nearest_tours(costs: Float64[np.ndarray, "I N N"]) -> Int64[np.ndarray, "I N"]:
    """Tours from node 0 that always go on to the open node that costs least to reach."""
    count, nodes, _ = costs.shape
    rows, tours = np.arange(count), np.zeros((count, nodes), dtype=np.int64)
    closed = np.zeros((count, nodes), dtype=bool)
    for step in range(1, nodes):
        closed[rows, tours[:, step - 1]] = True
        tours[:, step] = np.where(closed, np.inf, costs[rows, tours[:, step - 1]]).argmin(-1)
    return tours


def random_tours(count: int, nodes: int, *, seed: int) -> Int64[np.ndarray, "I N"]:
    """Tours from node 0 through all others in any order."""
    order = np.random.RandomState(seed).uniform(size=(count, nodes - 1)).argsort(-1) + 1
    return np.concatenate((np.zeros((count, 1), dtype=np.int64), order), 1)


def logged(world: Costs, *, nodes: int, tours: int, drivers: str, seed: int) -> tuple[list[str], list[list[object]]]:
    """The columns of a log, and its rows."""
    rules, generator = TSPRules.under(world), torch.Generator("cpu").manual_seed(seed)
    instance = rules.random(tours, nodes, generator=generator, device=torch.device("cpu"))
    costs = world.matrix(instance).double().numpy()
    tour = nearest_tours(costs) if drivers == "nearest" else random_tours(tours, nodes, seed=seed)
    begin, end = tour, np.roll(tour, -1, axis=1)
    trip = np.broadcast_to(np.arange(tours)[:, None], tour.shape)
    paid = (costs[trip, begin, end] * world.unit).ravel()
    if instance.place is not None:
        place = instance.place.numpy()
        ends = [place[trip, each].ravel()[:, None] for each in (begin, end)]
        names = ["from", "to"]
    else:
        coords = instance.coords.numpy()
        ends = [coords[trip, each].reshape(-1, 2) for each in (begin, end)]
        names = ["from_x", "from_y", "to_x", "to_y"]
    moves = zip(np.concatenate(ends, 1).tolist(), paid.tolist(), trip.ravel().tolist(), strict=True)
    return [*names, "cost", "trip"], [[*where, round(cost, 6), number] for where, cost, number in moves]


def write(path: Path, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """A table with a line of names."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def main(argv: list[str]) -> None:
    """Write the log."""
    with one_line_errors(Path(__file__).stem, *launch.USER_ERRORS):
        command = parse_command_line(argv, config_path=CONFIGS, description=__doc__ or "", entry_keys=ENTRY_KEYS)
        config, drivers = command.config, str(command.entry["drivers"] or DRIVERS[0])
        if drivers not in DRIVERS:
            raise ConfigError(f"--drivers is {drivers!r}; choose {' or '.join(DRIVERS)}")
        tours = int(number(command.entry["tours"] or "1200", "tours", least=2))
        world = find_costs(config.cost, streets=config.streets)
        if world.hidden:
            raise ConfigError(f"costs of {world.name} depend on what no log shows; choose another cost")
        path = Path(command.entry["out"] or "trips.csv")
        write(path, *logged(world, nodes=config.nodes, tours=tours, drivers=drivers, seed=config.seed))
        show(f"{path}: {tours * config.nodes:,} moves")
        if isinstance(world, Places):
            beside = path.with_name(f"{path.stem}-places.csv")
            places = [[index, *where] for index, where in enumerate(world.coords.tolist())]
            write(beside, ["place", "x", "y"], places)
            show(f"{beside}: {len(places):,} places")


if __name__ == "__main__":
    main(sys.argv[1:])
