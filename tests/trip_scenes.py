"""Small logs of trips, and short runs that learn from them."""

from __future__ import annotations

from pathlib import Path

import torch

import dreamer
from benchmarks import trips
from routing.cost_world import Costs
from routing.costs import find_costs
from tests.run_scenes import NODES, Rows, read_metrics

UPDATES = 40
COMMAND = ["--configs", "debug", "tsp_plan", "--log_every", "10", "--eval_every", "20", "--checkpoint_every", "20"]


def write_log(folder: Path, world: Costs | None = None, *, tours: int = 60, drivers: str = "random") -> Path:
    """What drivers of a world (`lanes` where none is given) have left."""
    costs = find_costs("lanes") if world is None else world
    path = folder / "trips.csv"
    trips.write(path, *trips.logged(costs, nodes=NODES, tours=tours, drivers=drivers, seed=0))
    return path


def write_places(folder: Path, coords: torch.Tensor) -> Path:
    """A table of places that are called by their numbers."""
    path = folder / "places.csv"
    trips.write(path, ["place", "x", "y"], [[index, *where] for index, where in enumerate(coords.tolist())])
    return path


def study(logdir: Path, log: Path, *arguments: str, updates: int = UPDATES) -> Rows:
    """A run in this process, and its metrics."""
    flags = ["--trips", str(log), "--updates", str(updates), "--logdir", str(logdir)]
    dreamer.main([*COMMAND, *flags, *arguments])
    return read_metrics(logdir)
