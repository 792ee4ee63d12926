"""When trajectories would run into somebody, if everybody else drove on as now: a check of plans by geometry alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Float32

from driving.features import EGO
from driving.reward import MOMENTS, SLACK, STANDS, touch
from driving.scene import STEP

# Who plans keeps so many metres more to the front and the rear, and to each side, than contact needs.
SPARE_LENGTH, SPARE_WIDTH = 0.5, 0.1
LENGTH, WIDTH = (EGO.index(name) for name in ("length", "width"))


def seconds_to_contact(
    obs: Mapping[str, np.ndarray], trajectories: Float[np.ndarray, "C T 3"]
) -> Float[np.ndarray, " C"]:
    """When each trajectory first touches another agent by the ego's own fault; infinite where it does not.

    The others keep velocity and heading. As in `driving.reward`, an ego that stands is at no fault, nor one that is
    run into from behind.

    Args:
        obs: one observation, of the arrays in `driving.features.FEATURES`.
        trajectories: x, y in metres and heading in radians of the ego's frame, each half second from the first on.
    """
    there = obs["agents_valid"][:, -1]
    others = obs["agents"][there, -1]
    poses = np.concatenate((np.zeros_like(trajectories[:, :1]), trajectories), 1)
    shares = np.arange(1, MOMENTS + 1)[:, None] / MOMENTS
    turned = np.diff(poses[..., 2])
    turned = np.arctan2(np.sin(turned), np.cos(turned))
    moved = np.concatenate((np.diff(poses[..., :2], axis=1), turned[..., None]), -1)
    own = (poses[:, :-1, None] + shares * moved[:, :, None]).reshape(len(poses), -1, 3)
    seconds = STEP * (np.arange(own.shape[1]) + 1) / MOMENTS
    drives = np.repeat(np.linalg.norm(moved[..., :2], axis=-1) > STEP * STANDS, MOMENTS, 1)

    sizes = obs["ego"][[LENGTH, WIDTH]] + 2 * np.array([SPARE_LENGTH, SPARE_WIDTH]) - 2 * SLACK
    ego = np.concatenate((own, np.broadcast_to(sizes, (*own.shape[:2], 2))), -1)[:, None]
    places = others[:, None, :2] + seconds[:, None] * others[:, None, 4:6]
    rest = np.column_stack((np.arctan2(others[:, 3], others[:, 2]), others[:, 6:8] - 2 * SLACK))
    seen = np.concatenate((places, np.broadcast_to(rest[:, None], (*places.shape[:2], 3))), -1)[None]

    away = seen[..., :2] - ego[..., :2]
    ahead = away[..., 0] * np.cos(ego[..., 2]) + away[..., 1] * np.sin(ego[..., 2])
    touched = touch(np.broadcast_to(ego, (*away.shape[:3], 5)), np.broadcast_to(seen, (*away.shape[:3], 5)))
    # Who first touches from behind, and then drives on as if through the ego, is no danger ahead of it.
    first = np.take_along_axis(ahead, touched.argmax(-1)[..., None], -1)
    fault = touched & (first > -obs["ego"][LENGTH] / 2) & drives[:, None]
    at = fault.any(1)
    return np.where(at.any(-1), seconds[at.argmax(-1)], np.inf)


def careful_choice(
    scores: Float32[np.ndarray, " C"],
    legal: Bool[np.ndarray, " C"],
    contact: Float[np.ndarray, " C"],
    *,
    caution: float,
) -> int:
    """The candidate that is scored best of those legal ones without a contact for `caution` seconds.

    Where there is none without, the one whose contact is farthest away.
    """
    free_for = np.where(legal, np.minimum(contact, caution), -np.inf)
    return int(np.where(free_for == free_for.max(), scores, -np.inf).argmax())
