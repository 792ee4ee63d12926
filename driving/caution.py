"""When trajectories would run into somebody, if everybody else drove on as now: a check of plans by geometry alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from driving.candidates import SPEED
from driving.features import EGO
from driving.reward import MOMENTS, SLACK, touch
from driving.scene import STEP
from driving.vehicle import braked

# Who plans keeps so many metres more to the front and the rear, and to each side, than contact needs.
SPARE_LENGTH, SPARE_WIDTH = 0.5, 0.1
# Whoever is slower, in m/s, stands.
CREEPS = 0.02
LENGTH, WIDTH = (EGO.index(name) for name in ("length", "width"))


class Allowed(NamedTuple):
    """What a careful driver chooses from.

    Attributes:
        actions: the candidates that are left.
        trajectories: how each candidate is driven, those that are not left included.
        brakes: whether these are driven with the brakes on, instead of as they were.
    """

    actions: Bool[np.ndarray, " A"]
    trajectories: Float[np.ndarray, "A T 3"]
    brakes: bool


def seconds_to_contact(
    obs: Mapping[str, np.ndarray], trajectories: Float[np.ndarray, "C T 3"]
) -> Float[np.ndarray, " C"]:
    """When each trajectory first touches another agent by the ego's own fault; infinite where it does not.

    The others keep velocity and heading. As in `driving.reward`, an ego that stands is at no fault, nor one that is
    run into from behind, but it is stricter there: who creeps does not stand, and who cuts in has to heed those behind.

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
    moves = np.repeat(np.linalg.norm(moved[..., :2], axis=-1) > STEP * CREEPS, MOMENTS, 1)

    sizes = obs["ego"][[LENGTH, WIDTH]] + 2 * np.array([SPARE_LENGTH, SPARE_WIDTH]) - 2 * SLACK
    ego = np.concatenate((own, np.broadcast_to(sizes, (*own.shape[:2], 2))), -1)[:, None]
    places = others[:, None, :2] + seconds[:, None] * others[:, None, 4:6]
    rest = np.column_stack((np.arctan2(others[:, 3], others[:, 2]), others[:, 6:8] - 2 * SLACK))
    seen = np.concatenate((places, np.broadcast_to(rest[:, None], (*places.shape[:2], 3))), -1)[None]

    away = seen[..., :2] - ego[..., :2]
    ahead = away[..., 0] * np.cos(ego[..., 2]) + away[..., 1] * np.sin(ego[..., 2])
    # Footprints whose middles are farther apart than both half diagonals are long need no closer look.
    near = np.hypot(away[..., 0], away[..., 1]) < _half_diagonal(ego) + _half_diagonal(seen)
    touched = np.zeros(near.shape, bool)
    touched[near] = touch(*(np.broadcast_to(footprints, (*near.shape, 5))[near] for footprints in (ego, seen)))
    # Who first touches from behind, and then drives on as if through the ego, is no danger ahead of it.
    first = np.take_along_axis(ahead, touched.argmax(-1)[..., None], -1)
    beside = np.abs(others[:, 0] * others[:, 3] - others[:, 1] * others[:, 2])
    cuts_in = beside > (others[:, 7] + obs["ego"][WIDTH]) / 2
    fault = touched & ((first > -obs["ego"][LENGTH] / 2) | cuts_in[:, None]) & moves[:, None]
    at = fault.any(1)
    return np.where(at.any(-1), seconds[at.argmax(-1)], np.inf)


def _half_diagonal(footprints: Float[np.ndarray, "*S 5"]) -> Float[np.ndarray, "*S"]:
    return np.hypot(footprints[..., 3], footprints[..., 4]) / 2


def careful(obs: Mapping[str, np.ndarray], trajectories: Float[np.ndarray, "A T 3"], *, caution: float) -> Allowed:
    """What whoever is careful chooses from: the legal candidates without a contact for `caution` seconds.

    Where there is none without, the brakes go on: the same ways are driven as slowly as brakes allow, and those are
    left whose contact is farthest away.

    Args:
        obs: one observation, of the arrays in `driving.features.FEATURES`.
        trajectories: how each candidate would be driven.
        caution: seconds.
    """
    legal = obs["action_mask"]
    contact = seconds_to_contact(obs, trajectories)
    brakes = not (legal & (contact >= caution)).any()
    if brakes:
        speed = float(obs["ego"][SPEED])
        trajectories = np.stack([braked(each, speed=speed) for each in trajectories])
        contact = seconds_to_contact(obs, trajectories)
    free_for = np.where(legal, np.minimum(contact, caution), -np.inf)
    return Allowed(free_for == free_for.max(), trajectories, brakes)
