"""Agents that plan or decode, and how tests ask solve.py."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import config
import dreamer
import solve
from guard import Guard
from routing.costs import find_costs
from routing.files import RoutingInstance
from routing.instances import field_test_coords
from routing.metrics import EXACT
from routing.tsp import TSPInstance
from solving.answers import Solution
from solving.decoding import Decoding
from solving.forecasts import Forecaster
from training import setup
from training.devices import make_generators

CPU = torch.device("cpu")


NODES = 6


COUNT = 24


PLAN = Decoding(method="plan")


def make_agent(**changes: Any) -> dreamer.Dreamer:
    settings = config.load(solve.CONFIGS, ["debug"], {}).replace(imag_first="stored", **changes)
    torch.manual_seed(0)
    task, generators = setup.make_task(settings), make_generators(0, CPU)
    agent = dreamer.Dreamer.of(task, settings, device=CPU, generators=generators, guard=Guard(CPU))
    with torch.no_grad():
        # The head begins at zero, and would find all tours as good.
        for parameter in agent.model.heads["reward"].parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return agent


def cases(count: int, num_nodes: int = NODES) -> list[RoutingInstance]:
    coords = field_test_coords(num_nodes, count)
    return [RoutingInstance(f"own{row}", "tsp", nodes, EXACT) for row, nodes in enumerate(coords)]


def solved(agent: dreamer.Dreamer | None, instances: list[RoutingInstance], how: Decoding = PLAN, **options: Any):
    found = solve.solve(agent, instances, how, **options)
    assert all(isinstance(each, Solution) for each in found), found
    return found


def forecaster(**changes: Any) -> Forecaster:
    found = make_agent(**changes).forecaster
    assert found is not None
    return found


def expected_matrix(agent: dreamer.Dreamer, instance: RoutingInstance) -> np.ndarray:
    assert agent.forecaster is not None
    return agent.forecaster.matrices(TSPInstance(torch.from_numpy(instance.coords)[None].float()))[0]


def cheapest(costs: np.ndarray) -> float:
    orders = np.array([(0, *order) for order in itertools.permutations(range(1, len(costs)))])
    return costs[orders, np.roll(orders, -1, 1)].sum(1).min()


def lanes_cost(coords: np.ndarray, tour: list[int]) -> float:
    stops = torch.from_numpy(coords[tour])
    world = find_costs("lanes")
    return float(world.at(stops, stops.roll(-1, 0)).sum())  # type: ignore[attr-defined]


def write_csv(path: Path, header: str, rows: Any) -> Path:
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def answers(capsys, *arguments: Any) -> list[dict[str, Any]]:
    solve.main([*map(str, arguments), "--device", "cpu", "--json"])
    return json.loads(capsys.readouterr().out)["instances"]


def refusal(capsys, *arguments: Any) -> str:
    with pytest.raises(SystemExit):
        solve.main([*map(str, arguments), "--device", "cpu"])
    return capsys.readouterr().err.splitlines()[-1]
