"""Batches of samples as a network reads them: on its device, with candidates, and apart from them what was driven."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from driving.candidates import candidates
from imitation.losses import Driven
from scenarios.parts import Needs

# What a network is given of a row, and what it is compared with.
NEEDS = Needs(
    features=("ego", "agents", "agents_valid", "roads", "roads_valid", "lines", "lines_valid", "action_mask"),
    targets=("action", "future", "future_valid"),
)


def as_features(samples: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """The features of B rows, with the candidates that they leave to choose among."""
    features = {name: samples[name] for name in NEEDS.features}
    features["candidates"] = candidates(features["lines"], features["lines_valid"], features["ego"])
    return {name: torch.as_tensor(values, device=device) for name, values in features.items()}


def as_driven(samples: Mapping[str, np.ndarray], device: torch.device) -> Driven:
    """What an expert did in B rows."""
    return Driven(*(torch.as_tensor(samples[name], device=device) for name in NEEDS.targets))
