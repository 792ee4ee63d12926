from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import config
from dreamer import Dreamer
from envs.routing import TSPInstance, TSPRules, tour_length
from envs.tasks import RoutingTask
from guard import Guard
from routing.instances import VALIDATION_SEED
from tests.scenes import random_states
from training import devices, setup, tours
from training.tours import Evaluation, RoutingEvaluator

CPU = torch.device("cpu")
NODES = 6
ROUTING = RoutingTask.of(TSPRules, NODES)

# Routing


def routing_agent() -> tuple[Dreamer, dict[str, torch.Generator]]:
    generators = devices.make_generators(0, CPU)
    settings = config.load(Path(config.__file__).with_name("configs.yaml"), ["debug"], {})
    return Dreamer.of(ROUTING, settings, device=CPU, generators=generators, guard=Guard("cpu")), generators


def some_instances(count: int = 8) -> Evaluation:
    return setup.make_evaluation(NODES, count, seed=VALIDATION_SEED)


def test_evaluate_draws_from_no_generator():
    agent, generators = routing_agent()
    before = random_states(generators)
    tours.evaluate(agent, ROUTING, some_instances(), device=CPU)
    assert random_states(generators) == before


def test_evaluate_is_greedy_and_repeatable():
    agent, _ = routing_agent()
    one, other = (tours.evaluate(agent, ROUTING, some_instances(), device=CPU) for _ in range(2))
    assert torch.equal(one.tours, other.tours) and one.gap == other.gap


def test_evaluate_measures_its_own_tours():
    agent, _ = routing_agent()
    instances = some_instances(16)
    result = tours.evaluate(agent, ROUTING, instances, device=CPU)
    assert (result.tours.sort(-1).values == torch.arange(NODES)).all()
    torch.testing.assert_close(result.lengths, tour_length(instances.coords, result.tours))
    assert (result.lengths.numpy() > instances.references - 1e-5).all()
    mean = float(tour_length(instances.coords, result.tours).double().mean())
    assert result.gap == pytest.approx(100 * (mean / instances.references.mean() - 1), abs=1e-4)


@pytest.mark.parametrize(
    ("cost", "reference", "gap"),
    [(12.0, 10.0, 20.0), (-8.0, -10.0, 20.0), (-12.0, -10.0, -20.0), (1.0, -10.0, 110.0)],
)
def test_percent_above_is_positive_where_more_is_paid_or_less_is_earned(cost: float, reference: float, gap: float):
    assert tours.percent_above(cost, reference) == pytest.approx(gap)


def test_percent_above_a_reference_of_zero_is_no_number():
    assert math.isnan(tours.percent_above(1.0, 0.0))


class PrizeInstance(NamedTuple):
    coords: Tensor
    valid: Tensor | None = None
    prize: Tensor | None = None
    kind: Tensor | None = None


class PrizeRules(TSPRules):
    @staticmethod
    def field_instances(num_instances: int, num_nodes: int, *, seed: int) -> Any:
        coords = TSPRules.field_instances(num_instances, num_nodes, seed=seed).coords
        return PrizeInstance(coords, prize=coords[..., 0], kind=torch.ones(num_instances, num_nodes, dtype=torch.int32))

    @staticmethod
    def reference_lengths(instance: Any) -> np.ndarray:
        return -instance.coords[..., 0].sum(-1).numpy()


def test_every_part_of_field_instances_may_be_float64():
    made = setup.make_evaluation(6, 3, seed=0, rules=PrizeRules).instance
    assert (made.coords.dtype, made.prize.dtype, made.kind.dtype) == (torch.float32, torch.float32, torch.int32)


def test_routing_evaluator_reports_gap_and_return_of_the_instances_asked_for():
    agent, _ = routing_agent()
    validation, test = some_instances(8), some_instances(5)
    drawn_for = []

    def pictures(instance: TSPInstance) -> dict[str, np.ndarray]:
        drawn_for.append(instance)
        return {"imagined": np.zeros((2, 2, 3), np.uint8)}

    evaluator = RoutingEvaluator(ROUTING, validation=validation, test=test, device=CPU, pictures=pictures)
    for report, instances in ((evaluator.validate(agent), validation), (evaluator.test(agent), test)):
        result = tours.evaluate(agent, ROUTING, instances, device=CPU)
        assert report.values == {"gap": result.gap, "return": -float(result.lengths.mean())}
        assert report.pictures.keys() == {"tour", "imagined"}
        assert report.summary.startswith(
            f"{len(result.lengths)} instances, mean length {result.lengths.mean():.4f} +- "
        )
        assert report.summary.endswith(f"gap {result.gap:.2f} % to the reference")
    assert torch.equal(drawn_for[0].coords, validation.coords)


# Any other task
