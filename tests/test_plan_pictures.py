"""Pictures of plans: what is shown of a scene, and what is not."""

from __future__ import annotations

import numpy as np
import torch

from driving.candidates import ACTIONS
from driving.canvas import CANDIDATE, CAR, EGO, ROAD, SIDE, Colour
from driving.features import FEATURES, TARGETS
from imitation.decoder import Plans
from imitation.pictures import DRIVEN, plan_pictures


def scenes(count: int) -> dict[str, np.ndarray]:
    """Empty scenes in which nothing was driven."""
    arrays = {**FEATURES, **TARGETS}
    samples: dict[str, np.ndarray] = {name: np.zeros((count, *each.shape), each.dtype) for name, each in arrays.items()}
    samples["ego"][:, 3:5] = 5, 2
    return samples


def plans(count: int, *, legal: int) -> Plans:
    """Fans of trajectories, the first of them scored best, of which the first so many are legal."""
    metres = torch.arange(1, 17.0)[:, None] * 3
    turns = torch.linspace(0, 1.5, ACTIONS)
    ways = torch.stack((metres * turns.cos(), metres * turns.sin(), turns.expand(16, -1)), -1).transpose(0, 1)
    scores = -torch.arange(ACTIONS, dtype=torch.float32).expand(count, -1)
    mask = (torch.arange(ACTIONS) < legal).expand(count, -1)
    return Plans(ways.expand(count, -1, -1, -1), scores, mask)


def shown(picture: np.ndarray, colour: Colour) -> bool:
    """Whether there is an area of a colour."""
    return int((np.abs(picture.astype(int) - colour).max(-1) < 12).sum()) > 20


def test_scenes_stand_side_by_side_and_show_what_there_is():
    samples = scenes(2)
    samples["future"][1, :, 0] = -2 * np.arange(1, 17)
    samples["future_valid"][1] = True
    samples["agents"][1, 0, -1] = 20, -20, 1, 0, 0, 0, 5, 2
    samples["agents_valid"][1, 0, -1] = True
    samples["roads"][1, 0, :, 0] = np.linspace(-20, 20, samples["roads"].shape[2])
    samples["roads"][1, 0, :, 1] = 30
    samples["roads_valid"][1, 0] = True
    picture = plan_pictures(samples, plans(2, legal=ACTIONS))
    assert picture.shape == (SIDE, 2 * SIDE, 3)
    empty, full = picture[:, :SIDE], picture[:, SIDE:]
    assert shown(empty, EGO) and shown(full, EGO) and shown(empty, CANDIDATE)
    for colour in (DRIVEN, CAR, ROAD):
        assert shown(full, colour) and not shown(empty, colour)


def test_only_legal_candidates_are_shown():
    assert not shown(plan_pictures(scenes(1), plans(1, legal=1)), CANDIDATE)
    assert shown(plan_pictures(scenes(1), plans(1, legal=2)), CANDIDATE)
