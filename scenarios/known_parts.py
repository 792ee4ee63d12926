"""The parts that samples of driving consist of: what an ego observes, what became of it, and what that was worth."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from driving.features import FEATURES, TARGETS
from scenarios.parts import Part, Scene, Spec

_KINDS = {**FEATURES, **TARGETS}


def _observed(scene: Scene) -> Mapping[str, np.ndarray]:
    return scene.observed


def _part(*names: str, version: int) -> Part:
    """Some arrays of what is observed, as a part that is called like the first of them."""
    return Part(names[0], version, {name: Spec(*_KINDS[name]) for name in names}, _observed)


KNOWN = (
    _part("ego", version=1),
    _part("agents", "agents_valid", version=1),
    _part("roads", "roads_valid", version=1),
    _part("lines", "lines_valid", "action_mask", version=1),
    _part("future", "future_valid", version=1),
    _part("action", version=1),
)
