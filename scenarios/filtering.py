"""Which scenarios are taken: one small function for each thing that a filter asks, applied in order."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from scenarios.scenario import Scenario
from settings.scenarios import FilterSettings
from system.errors import UserError

Item = TypeVar("Item")


class Filtered(NamedTuple):
    """What is taken, and how many scenarios each question has left out."""

    scenarios: list[Scenario]
    left_out: dict[str, int]


def apply(scenarios: Sequence[Scenario], settings: FilterSettings, *, seed: int) -> Filtered:
    """The scenarios that a filter takes, in the order given or, where it shuffles, in one drawn by the seed.

    What each scenario is asks first, how many there are last; single rows are made in between.

    Raises:
        UserError: it takes none, or names a token, log or map that there is not.
    """
    _require_known(scenarios, settings)
    rng = np.random.default_rng(seed) if settings.shuffle else None
    steps: dict[str, Callable[[list[Scenario]], list[Scenario]]] = {
        "types": lambda those: _among(those, settings.types, lambda one: one.type),
        "tokens": lambda those: _among(those, settings.tokens, lambda one: one.token),
        "logs": lambda those: _of_logs(those, settings.logs),
        "maps": lambda those: _among(those, settings.maps, lambda one: one.map),
        "drop_invalid_goals": lambda those: [
            one for one in those if one.goal_on_road or not settings.drop_invalid_goals
        ],
        "least_displacement": lambda those: [one for one in those if one.displacement >= settings.least_displacement],
        "start_speed": lambda those: _that_rise(those, settings.start_speed, settings.speed_tolerance),
        "stop_speed": lambda those: _that_fall(those, settings.stop_speed, settings.speed_tolerance),
        "expand": lambda those: _singles(those) if settings.expand else those,
        "least_gap": lambda those: _apart(those, settings.least_gap),
        "per_type": lambda those: _of_each_type(those, settings.per_type, rng),
        "total": lambda those: _some(those, _count(settings.total, len(those)), rng),
    }
    taken, left_out = list(scenarios), {}
    for name, step in steps.items():
        before, taken = len(taken), step(taken)
        if len(taken) < before:
            left_out[f"by {settings.key(name)}"] = before - len(taken)
    if not taken:
        reasons = ", ".join(f"{count:,} {why}" for why, count in left_out.items())
        raise UserError(f"of {len(scenarios):,} scenarios none is taken ({reasons or 'there are none'}); ask for less")
    if rng is not None:
        taken = [taken[index] for index in rng.permutation(len(taken))]
    return Filtered(taken, left_out)


def _require_known(scenarios: Sequence[Scenario], settings: FilterSettings) -> None:
    """Raise a UserError where a filter names what no scenario has; types may well be rare."""
    tokens, maps, logs = ({getattr(one, name) for one in scenarios} for name in ("token", "map", "log"))
    unknown = {
        "tokens": [each for each in settings.tokens if each not in tokens],
        "maps": [each for each in settings.maps if each not in maps],
        "logs": [each for each in settings.logs if not fnmatch.filter(logs, each)],
    }
    for name, found in unknown.items():
        if found and scenarios:
            there = f"; there are {', '.join(sorted(maps))}" if name == "maps" else ""
            raise UserError(f"{settings.key(name)} has '{found[0]}', and no scenario is of it{there}")


def _among(scenarios: list[Scenario], wanted: Sequence[str], question: Callable[[Scenario], str]) -> list[Scenario]:
    among = set(wanted)
    return [one for one in scenarios if question(one) in among] if among else scenarios


def _of_logs(scenarios: list[Scenario], patterns: Sequence[str]) -> list[Scenario]:
    if not patterns:
        return scenarios
    return [one for one in scenarios if any(fnmatch.fnmatchcase(one.log, pattern) for pattern in patterns)]


def _that_rise(scenarios: list[Scenario], threshold: float | None, tolerance: float) -> list[Scenario]:
    """Those whose ego is at a speed or below it, and later above it by more than the tolerance."""
    if threshold is None:
        return scenarios
    return [one for one in scenarios if rises(one.speeds, threshold, tolerance=tolerance)]


def _that_fall(scenarios: list[Scenario], threshold: float | None, tolerance: float) -> list[Scenario]:
    """Those whose ego is above a speed by more than the tolerance, and later at it or below."""
    if threshold is None:
        return scenarios
    # What falls, rises when seen from its end.
    return [one for one in scenarios if rises(one.speeds[::-1], threshold, tolerance=tolerance)]


def rises(speeds: Sequence[float], threshold: float, *, tolerance: float) -> bool:
    """Whether speeds are at a threshold or below it, and later above it by more than the tolerance."""
    low = [index for index, speed in enumerate(speeds) if speed <= threshold]
    return bool(low) and any(speed > threshold + tolerance for speed in speeds[low[0] :])


def _apart(scenarios: list[Scenario], gap: float) -> list[Scenario]:
    """Of each ego the first, and then those that begin so many seconds after the one before or later."""
    by_ego: dict[tuple[str, int], list[int]] = defaultdict(list)
    for index, one in enumerate(scenarios):
        by_ego[one.log, one.agent].append(index)
    kept: set[int] = set()
    for indices in by_ego.values():
        latest = -np.inf
        for index in sorted(indices, key=lambda index: scenarios[index].frame):
            if scenarios[index].seconds - latest >= gap:
                latest = scenarios[index].seconds
                kept.add(index)
    return [one for index, one in enumerate(scenarios) if index in kept]


def _singles(scenarios: list[Scenario]) -> list[Scenario]:
    return [one.single(row) for one in scenarios for row in range(one.rows)]


def _of_each_type(scenarios: list[Scenario], most: int, rng: np.random.Generator | None) -> list[Scenario]:
    if not most:
        return scenarios
    by_type: dict[str, list[int]] = defaultdict(list)
    for index, one in enumerate(scenarios):
        by_type[one.type].append(index)
    kept = {index for indices in by_type.values() for index in _some(indices, most, rng)}
    return [one for index, one in enumerate(scenarios) if index in kept]


def _count(total: float, available: int) -> int:
    """How many are taken: a count, the share of those that there are where it is below 1, or all."""
    if not total:
        return available
    return int(total) if total >= 1 else round(total * available)


def _some(items: list[Item], most: int, rng: np.random.Generator | None) -> list[Item]:
    """So many of them at most, in their order: drawn, or else spread evenly, so that no log goes before another."""
    if len(items) <= most:
        return items
    if rng is not None:
        chosen = np.sort(rng.choice(len(items), most, replace=False))
    else:
        chosen = np.arange(most) * len(items) // most
    return [items[index] for index in chosen]
