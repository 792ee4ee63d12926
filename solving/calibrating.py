"""How wrong a run's model is about the tours that it chooses, on validation instances, whose true costs are known."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from imagining.behavior import ImagBehavior
from routing.cases import Cases, field_cases
from routing.instances import VALIDATION_SEED
from routing.rules import Instance, Rules, each_part, single_precision
from routing.solvers import Solver
from solving.decoding import Decoding, best_by, chooser, pieces, sampling
from solving.forecasts import Forecaster
from solving.intervals import Calibration, least_tours


def calibrate(
    behavior: ImagBehavior, forecaster: Forecaster, *, nodes: int, instances: int, methods: Sequence[str]
) -> dict[str, Calibration]:
    """A calibration for each way to look for tours; none where there are too few instances, or the model is not finite.

    Args:
        behavior: its actor decides where no solver does.
        forecaster: of its model.
        nodes: of an instance.
        instances: how many of the validation instances.
        methods: of `Decoding`.
    """
    if instances < least_tours():
        return {}
    cases = field_cases(forecaster.model.rules, instances, nodes, seed=VALIDATION_SEED)
    found = {}
    for method in methods:
        expected, paid = outcomes(behavior, forecaster, cases, method)
        if np.isfinite(expected).all():
            found[method] = Calibration.of(expected, paid, nodes=nodes)
    return found


def outcomes(
    behavior: ImagBehavior, forecaster: Forecaster, cases: Cases, method: str
) -> tuple[Float64[np.ndarray, "K I"], Float64[np.ndarray, " I"]]:
    """What tours that are chosen before any move are expected to cost, by each member of the ensemble, and do cost.

    Args:
        behavior: as for `calibrate`.
        forecaster: as there.
        cases: what there is to solve; where costs are hidden, by what.
        method: of `Decoding`.
    """
    instance = each_part(single_precision(cases.instance), lambda part: part.to(forecaster.device))
    tours = chosen_tours(behavior, forecaster, instance, method)
    return forecaster.tours(instance, tours), paid_costs(forecaster.model.rules, cases, tours)


def chosen_tours(
    behavior: ImagBehavior, forecaster: Forecaster, instance: Instance, method: str
) -> Int64[np.ndarray, "I L"]:
    """Closed tours that are chosen before any move, by what the model expects.

    Args:
        behavior: as for `calibrate`.
        forecaster: as there.
        instance: I of them as the model sees them, on its device.
        method: of `Decoding`.
    """
    matrices = forecaster.matrices(instance)
    if method == Decoding.PLAN:
        return _planned(forecaster.model.rules, instance, matrices, processes=forecaster.settings.processes)
    return _decoded(behavior, instance, matrices, Decoding(method=method))


def _decoded(
    behavior: ImagBehavior, instance: Instance, costs: Float64[np.ndarray, "I N N"], decoding: Decoding
) -> Int64[np.ndarray, "I L"]:
    generator = sampling(behavior, decoding)
    found = []
    for rows in pieces(behavior, *instance.coords.shape[:2]):
        some: Instance = each_part(instance, itemgetter(rows))
        found.append(best_by(behavior, some, decoding, chooser(costs[rows]), generator=generator))
    return np.concatenate(found)


def _planned(
    rules: type[Rules], instance: Instance, costs: Float64[np.ndarray, "I N N"], *, processes: int
) -> Int64[np.ndarray, "I L"]:
    solver = Solver(processes=processes)
    try:
        leftovers = rules.leftovers(instance, rules.reset(instance), costs)
        found = solver.solve([leftover.problem for leftover in leftovers])
    finally:
        solver.close()
    # A plan with fewer routes than another waits at its depot.
    length = max(map(len, found))
    return np.stack([np.pad(tour, (0, length - len(tour)), constant_values=tour[0]) for tour in found])


def paid_costs(rules: type[Rules], cases: Cases, tours: Int64[np.ndarray, "I L"]) -> Float64[np.ndarray, " I"]:
    """What closed tours cost by the true costs; where these drift within an episode, they are drawn for each."""
    stops = torch.from_numpy(tours)
    factors: Float[Tensor, "I F"] | None = cases.factors
    generator = torch.Generator("cpu").manual_seed(VALIDATION_SEED)

    def noise(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device=torch.device("cpu"))

    total = torch.zeros(len(tours), dtype=torch.float64, device=torch.device("cpu"))
    for begin, end in zip(stops.unbind(-1), stops.roll(-1, -1).unbind(-1), strict=True):
        total += rules.costs.between(cases.instance, begin, end, factors)
        if factors is not None:
            factors = rules.costs.drifted(factors, noise)
    return total.numpy()
