"""How near a planner's trajectories are to what was driven in logs that it has not learnt from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from driving.candidates import SPEED
from imitation.batches import as_driven, as_features
from imitation.metrics import errors
from imitation.pictures import plan_pictures
from scenarios.dataset import Rows
from training.agent import POLICY, Trained
from training.evaluation import Report

# Rows that are drawn, and how fast an ego drives there at least, in m/s.
DRAWN, MOVES = 4, 3.0
# Rows that are planned at once.
AT_ONCE = 256
# The figures of a summary, with their words.
SUMMARY = {
    "min_ade": "the nearest of the six that are scored best is {:.3g} m off",
    "ade": "the best-scored {:.3g} m",
    "constant_velocity_ade": "constant velocity {:.3g} m",
}


class DrivingEvaluator:
    """Plans for rows of logs that validate and that test, by their distance from what was driven."""

    def __init__(self, sets: Mapping[str, Rows], *, device: torch.device) -> None:
        """Take the rows.

        Args:
            sets: by name: `valid`, and those that test: `test`, and `held_out` where maps are held out.
            device: where the agent plans.
        """
        self._sets, self._device = sets, device

    def validate(self, agent: Trained) -> Report:
        """Figures of the rows that validate."""
        return self.report(agent, ("valid",))

    def test(self, agent: Trained) -> Report:
        """Figures of the rows that test, those of maps that were held out by names of their own."""
        return self.report(agent, ("test", "held_out"))

    def report(self, agent: Trained, names: tuple[str, ...]) -> Report:
        """Figures of some sets; the first has the plain names."""
        values: dict[str, float] = {}
        told = []
        for name in names:
            rows = self._sets.get(name)
            if rows is None or not len(rows):
                continue
            found = judge(agent.players[POLICY], rows, device=self._device)
            values |= {key if name == names[0] else f"{name}_{key}": value for key, value in found.items()}
            words = ", ".join(form.format(found[key]) for key, form in SUMMARY.items())
            told.append(f"{found['rows']:,.0f} rows of the set {name}: {words}")
        return Report(values, self._drawn(agent, names[0]), "; ".join(told) or "there are no rows to judge by")

    def _drawn(self, agent: Trained, name: str) -> dict[str, np.ndarray]:
        """Plans for a few rows of a set, the same every time, in which the ego drives if there are any."""
        rows = self._sets.get(name)
        if rows is None or not len(rows):
            return {}
        moving = np.flatnonzero(rows.arrays["ego"][:, SPEED] > MOVES)
        places = moving if len(moving) >= DRAWN else np.arange(len(rows))
        samples = rows.at(places[np.linspace(0, len(places) - 1, min(DRAWN, len(places))).astype(np.int64)])
        plans = agent.players[POLICY].plan(as_features(samples, self._device))
        return {"plans": plan_pictures(samples, plans)}


def judge(planner: Any, rows: Rows, *, device: torch.device) -> dict[str, float]:
    """Means of all errors over the rows whose whole future is known, and how many those are."""
    found: dict[str, list[Tensor]] = {}
    for samples in rows.batches(AT_ONCE):
        driven = as_driven(samples, device)
        features = as_features(samples, device)
        whole = driven.future_valid.all(-1)
        for name, values in errors(planner.plan(features), driven, features["ego"][:, 0]).items():
            found.setdefault(name, []).append(values[whole].cpu())
    means = {name: torch.cat(parts) for name, parts in found.items()}
    counted = len(means["ade"])
    return {name: float(values.double().mean()) if counted else float("nan") for name, values in means.items()} | {
        "rows": float(counted)
    }


def spread(rows: Rows, most: int) -> Rows:
    """At most so many rows, evenly spread over all of them; 0: all."""
    if not most or len(rows) <= most:
        return rows
    places = np.linspace(0, len(rows) - 1, most).astype(np.int64)
    return Rows(rows.at(places), rows.types[places])
