"""How far plans are from what was driven: displacement errors, in metres."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from driving.scene import STEP
from imitation.decoder import Plans
from imitation.losses import Driven

# So many of the best-scored candidates may miss, if one of them does not.
BEST = 6


def displacement(trajectories: Float[Tensor, "B *C T 3"], driven: Driven) -> Float[Tensor, "B *C"]:
    """Mean distance in metres to where the expert was, over the points that are known; 0 where none is."""
    between = trajectories.ndim - 3
    future, valid = driven.future, driven.future_valid
    for _ in range(between):
        future, valid = future[:, None], valid[:, None]
    distance = (trajectories[..., :2] - future[..., :2]).norm(dim=-1).masked_fill(~valid, 0.0)
    return distance.sum(-1) / valid.sum(-1).clamp(min=1)


def constant_velocity(speed: Float[Tensor, " B"], *, points: int) -> Float[Tensor, "B T 3"]:
    """Straight on at the speed of now, in the ego's frame."""
    seconds = STEP * torch.arange(1, points + 1, device=speed.device)
    ahead = speed[:, None] * seconds
    return torch.stack((ahead, torch.zeros_like(ahead), torch.zeros_like(ahead)), -1)


def errors(plans: Plans, driven: Driven, speed: Float[Tensor, " B"]) -> dict[str, Float[Tensor, " B"]]:
    """Errors of each row, in metres, and shares of 1.

    `ade`: mean distance of the best-scored trajectory; `fde`: at its last known point; `min_ade`: mean distance of the
    nearest among the six that are scored best; `oracle_ade`: among all that are legal; `constant_velocity_ade`: of
    driving straight on at the speed of now; `choice`: whether the best-scored candidate is the one that was taken.
    """
    distribution = plans.distribution()
    each = displacement(plans.trajectories, driven).masked_fill(~plans.action_mask, math.inf)
    # Where fewer are legal, the rest of the six is infinitely far away.
    ranked = (
        distribution.log_probs.masked_fill(~plans.action_mask, -math.inf).topk(min(BEST, each.shape[1]), -1).indices
    )
    best = distribution.mode()
    rows = torch.arange(len(best), device=best.device)
    points = driven.future.shape[1]
    last = (driven.future_valid * torch.arange(1, points + 1, device=best.device)).amax(-1).clamp(min=1) - 1
    end = plans.trajectories[rows, best, last, :2] - driven.future[rows, last, :2]
    return {
        "ade": each[rows, best],
        "fde": end.norm(dim=-1),
        "min_ade": each.gather(1, ranked).amin(-1),
        "oracle_ade": each.amin(-1),
        "constant_velocity_ade": displacement(constant_velocity(speed, points=points), driven),
        "choice": (best == driven.action).float(),
    }
