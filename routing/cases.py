"""The instances that agents are evaluated on: the first ones of a seed, of those that ask what a world is about."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from config import UserError
from routing.instances import REFERENCE_VERSION, cached_lengths, cheapest_tours, tour_costs
from routing.rules import Instance, Rules, each_part

# How many instances are looked at together, and the most of them for each that is asked for.
LOOKED_AT, MOST_LOOKED_AT = 250, 40


class Cases(NamedTuple):
    """Instances, and what their costs depend on in secret; None where nothing does."""

    instance: Instance
    factors: Float64[Tensor, "I F"] | None


def field_cases(rules: type[Rules], count: int, num_nodes: int, *, seed: int) -> Cases:
    """The first `count` instances that a seed gives; in a world with a `least_regret`, of those that ask something.

    Such an instance has a best closed tour through its nodes by average costs that is dearer, by that share or more,
    than the best one by the costs of its own hidden factors: not to find these out is punished there.

    Raises:
        UserError: hardly any instance is such.
    """
    if not rules.costs.least_regret:
        return _first(rules, count, num_nodes, seed=seed)
    looked_at = 0
    chosen: Int64[np.ndarray, " K"] = np.empty(0, dtype=np.int64)
    while len(chosen) < count:
        if looked_at >= MOST_LOOKED_AT * max(count, LOOKED_AT):
            raise UserError(
                f"costs of {rules.costs.name} hide too little here: of {looked_at} instances of {num_nodes} nodes,"
                f" {len(chosen)} have a best tour by average costs that is {rules.costs.least_regret:.0%} dearer than"
                f" the best one: choose other streets, or more nodes"
            )
        looked_at += LOOKED_AT
        cases = _first(rules, looked_at, num_nodes, seed=seed)
        latest = _some(cases, slice(looked_at - LOOKED_AT, looked_at))
        telling = np.flatnonzero(_regrets(rules, latest) >= rules.costs.least_regret)
        chosen = np.concatenate((chosen, telling + looked_at - LOOKED_AT))
    return _some(cases, torch.from_numpy(chosen[:count]))


def _first(rules: type[Rules], count: int, num_nodes: int, *, seed: int) -> Cases:
    return Cases(rules.field_instances(count, num_nodes, seed=seed), rules.costs.fixed_factors(count, seed=seed))


def _some(cases: Cases, index: Any) -> Cases:
    return each_part(cases, lambda part: part[index])


def _regrets(rules: type[Rules], cases: Cases) -> Float64[np.ndarray, " I"]:
    """By what share the best tours by average costs are dearer than the best ones."""
    costs = rules.costs.matrix(cases.instance, cases.factors).double().numpy()
    average = rules.costs.mean_matrix(cases.instance).double().numpy()

    def ratios() -> Float64[np.ndarray, " I"]:
        return tour_costs(costs, cheapest_tours(average)) / tour_costs(costs, cheapest_tours(costs))

    return cached_lengths(costs, average, version=f"regrets {REFERENCE_VERSION}", compute=ratios) - 1
