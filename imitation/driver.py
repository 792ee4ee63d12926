"""A trained planner for who drives: from an observation of `Drive-v0` to a candidate and the way to drive it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from driving.caution import careful
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

    def __init__(
        self, plan: Callable[[Mapping[str, Tensor]], Plans], *, device: torch.device, caution: float = 0.0
    ) -> None:
        """Take what drives.

        Args:
            plan: the planner of features.
            device: where it lives.
            caution: seconds for which a trajectory must touch nobody, if all others drive on as now; where each
                would, it brakes. 0: nobody looks.
        """
        self._plan, self._device, self.caution = plan, device, caution

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
        trajectories = plans.trajectories[0].cpu().numpy()
        if self.caution:
            allowed = careful(obs, trajectories, caution=self.caution)
            trajectories = allowed.trajectories
            action = int(np.where(allowed.actions, plans.scores[0].cpu().numpy(), -np.inf).argmax())
        else:
            action = int(plans.distribution().mode()[0])
        return Choice(action, trajectories[action])
