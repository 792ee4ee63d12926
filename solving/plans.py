"""Solves instances by what a run's model expects moves to cost, with the solvers that references are made with."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float64

from config import UserError
from routing.files import RoutingInstance
from routing.metrics import GIVEN
from routing.solvers import not_below_zero
from solving.answers import Solution
from solving.forecasts import WORKING_NUMBERS, Forecaster
from solving.frames import pose
from solving.given_costs import LEG_BYTES, solve_given
from system.memory import require_memory


def planned(
    forecaster: Forecaster,
    instances: Sequence[RoutingInstance],
    *,
    processes: int | None = None,
    progress: Callable[[int], object] = lambda nodes: None,
) -> list[Solution | UserError]:
    """A checked solution of each instance, in order, that is best by the model's costs, or why none.

    Args:
        forecaster: knows the model.
        instances: of the model's problem, of any sizes and metrics.
        processes: as for `solve_given`.
        progress: called with the nodes of the instance just solved.
    """
    found: dict[int, Solution | UserError] = {}
    for members in _batches(instances):
        begin = time.perf_counter()
        asked: dict[int, RoutingInstance] = {}
        for _, group in itertools.groupby(members, key=lambda index: _kind(instances[index])):
            alike = list(group)
            try:
                matrices = _expected(forecaster, [instances[index] for index in alike])
            except UserError as error:
                found |= dict.fromkeys(alike, error)
            else:
                asked |= {
                    index: instances[index]._replace(metric=GIVEN, costs=costs)
                    for index, costs in zip(alike, matrices, strict=True)
                }
        share = (time.perf_counter() - begin) / len(members)
        outcomes = solve_given(list(asked.values()), processes=processes, progress=progress)
        for index, outcome in zip(asked, outcomes, strict=True):
            if isinstance(outcome, Solution):
                instance, seconds = instances[index], outcome.seconds + share
                length = instance.tour_length(outcome.tour) if instance.is_priced else None
                outcome = outcome._replace(instance=instance, length=length, seconds=seconds, by_model=True)
            found[index] = outcome
    return [found[index] for index in range(len(instances))]


def _kind(instance: RoutingInstance) -> tuple[int, str]:
    return len(instance.coords), instance.metric


def _batches(instances: Sequence[RoutingInstance]) -> list[list[int]]:
    """Instances whose matrices fit into memory together, those of one kind next to each other."""
    batches: list[list[int]] = [[]]
    numbers = 0
    for index in sorted(range(len(instances)), key=lambda index: _kind(instances[index])):
        size = len(instances[index].coords) ** 2
        if numbers and numbers + size > WORKING_NUMBERS:
            batches.append([])
            numbers = 0
        batches[-1].append(index)
        numbers += size
    return batches if batches[0] else []


def _expected(forecaster: Forecaster, instances: Sequence[RoutingInstance]) -> list[Float64[np.ndarray, "N N"]]:
    """What a solver takes moves to cost; all instances are of one kind."""
    count = len(instances[0].coords)
    require_memory(
        LEG_BYTES * count**2,
        device=forecaster.device,
        work=f"has {count:,} nodes, and planning so many takes",
        remedy="solve it in parts, or where there is more memory",
    )
    costs = forecaster.matrices(pose(instances, forecaster.device).instance)
    return [
        not_below_zero(each, is_tour=instance.demand is None) for each, instance in zip(costs, instances, strict=True)
    ]
