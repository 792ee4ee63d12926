"""Pictures of plans: what a planner would drive in a scene, beside what was driven there."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float32, UInt8

from driving.canvas import CANDIDATE, CAR, EGO, ROAD, Canvas
from driving.features import EGO as EGO_FEATURES
from imitation.decoder import Plans
from imitation.metrics import BEST

# What was driven.
DRIVEN = (36, 140, 84)
# Lanes are drawn so wide, in metres, as features do not tell.
LANE = 3.0
LENGTH, WIDTH = (EGO_FEATURES.index(name) for name in ("length", "width"))


def plan_pictures(samples: Mapping[str, np.ndarray], plans: Plans) -> UInt8[np.ndarray, "H W 3"]:
    """Scenes side by side, the ego in red in each of them.

    Green is what was driven, red what the planner would drive, blue what else is among the six that it scores best.

    Args:
        samples: rows of a cache, by name, with features and targets.
        plans: for the same rows.
    """
    best = plans.distribution().log_probs.argsort(-1, descending=True)[:, :BEST]
    pictures = []
    for row in range(len(best)):
        scene = {name: values[row] for name, values in samples.items()}
        legal = [int(action) for action in best[row] if plans.action_mask[row, action]]
        pictures.append(_draw(scene, plans.trajectories[row, legal].float().cpu().numpy()))
    return np.concatenate(pictures, 1)


def _draw(scene: Mapping[str, np.ndarray], trajectories: Float32[np.ndarray, "C T 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """One scene with trajectories, the best-scored first."""
    canvas = Canvas()
    for points, valid in zip(scene["roads"], scene["roads_valid"], strict=True):
        if valid.any():
            canvas.line(points[valid, :2], LANE, ROAD)
    for trajectory in trajectories[1:]:
        canvas.way(trajectory, 0.35, CANDIDATE)
    known = scene["future_valid"]
    if known.any():
        canvas.way(scene["future"][known], 1.2, DRIVEN)
    canvas.way(trajectories[0], 0.6, EGO)
    for agent in scene["agents"][scene["agents_valid"][:, -1], -1]:
        heading = float(np.arctan2(agent[3], agent[2]))
        canvas.box(agent[:2], heading, (float(agent[6]), float(agent[7])), CAR)
    size = float(scene["ego"][LENGTH]), float(scene["ego"][WIDTH])
    canvas.box(np.zeros(2), 0.0, size, EGO)
    return canvas.picture()
