"""A trained planner for who drives: from an observation of `Drive-v0` to a candidate and the way to drive it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from imitation.batches import NEEDS, as_features
from imitation.decoder import Plans


class Choice(NamedTuple):
    """What a planner makes of an observation.

    Attributes:
        action: the candidate that is scored best.
        trajectory: how it would be driven: (x, y, heading) each half second, in metres and radians of the ego's frame.
    """

    action: int
    trajectory: Float32[np.ndarray, "T 3"]


class TrainedPlanner:
    """Drives with what it has learnt: called with an observation, it gives a trajectory; `choose` tells more."""

    def __init__(self, plan: Callable[[Mapping[str, Tensor]], Plans], *, device: torch.device) -> None:
        """Take the planner of features, and where it lives."""
        self._plan, self._device = plan, device

    def __call__(self, obs: Mapping[str, np.ndarray]) -> Float32[np.ndarray, "T 3"]:
        """The trajectory that is scored best."""
        return self.choose(obs).trajectory

    def choose(self, obs: Mapping[str, np.ndarray]) -> Choice:
        """The candidate that is scored best, and how it would be driven.

        Args:
            obs: one observation, of the arrays in `driving.features.FEATURES`.
        """
        row = {name: np.asarray(obs[name])[None] for name in NEEDS.features}
        plans = self._plan(as_features(row, self._device))
        action = int(plans.distribution().mode()[0])
        return Choice(action, plans.trajectories[0, action].cpu().numpy())
