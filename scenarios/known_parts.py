"""The parts that samples of driving consist of: what an ego observes, what became of it, and what that was worth."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from driving.features import FEATURES, TARGETS
from driving.reward import rewards
from scenarios.parts import Part, Scene, Spec

_KINDS = {**FEATURES, **TARGETS}


def _observed(scene: Scene) -> Mapping[str, np.ndarray]:
    return scene.observed


def _part(*names: str, version: int) -> Part:
    """Some arrays of what is observed, as a part that is called like the first of them."""
    return Part(names[0], version, {name: Spec(*_KINDS[name]) for name in names}, _observed)


def _worth(scene: Scene) -> Mapping[str, np.ndarray]:
    """What the half second before this frame was worth, and whether the drive is over with it, as in `Drive-v0`."""
    reward = np.zeros(len(scene.agents), np.float32)
    over = np.zeros(len(scene.agents), bool)
    # Those who have just come have driven nothing yet.
    there = scene.log.find(scene.agents, np.full(len(scene.agents), scene.frame - 1)) >= 0
    found = rewards(scene.log, scene.road_map, scene.agents[there], scene.frame)
    reward[there], over[there] = found.total, found.contact | found.off_road
    return {"reward": reward, "is_terminal": over}


KNOWN = (
    _part("ego", version=1),
    _part("agents", "agents_valid", version=1),
    _part("roads", "roads_valid", version=1),
    _part("lines", "lines_valid", "action_mask", version=1),
    _part("future", "future_valid", version=1),
    _part("action", version=1),
    Part("worth", 1, {"reward": Spec((), np.float32), "is_terminal": Spec((), np.bool_)}, _worth),
)
