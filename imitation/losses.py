"""What imitation is trained on: the trajectory of the candidate that was driven, and the choice of it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from imitation.decoder import Plans

# The names of the losses, as their scales in the config have them.
LOSSES = ("trajectory", "free", "choice")
# Metres that an error of heading of one radian counts as.
HEADING_METRES = 2.0


class Driven(NamedTuple):
    """What an expert did in B rows.

    Attributes:
        action: the candidate that the expert's future took.
        future: x, y in metres and heading in radians, in the ego's frame, each half second.
        future_valid: where the expert was still there.
    """

    action: Int[Tensor, " B"]
    future: Float[Tensor, "B T 3"]
    future_valid: Bool[Tensor, "B T"]


def masked_average(values: Float[Tensor, "*B"], mask: Bool[Tensor, "*B"]) -> Float[Tensor, ""]:
    """Mean of the values that are True in `mask`; 0 with gradient 0 where there is none."""
    return values.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def turned(angle: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """The same direction within [-pi, pi)."""
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


def apart(trajectory: Float[Tensor, "B T 3"], driven: Driven) -> Float[Tensor, ""]:
    """Smooth L1 in metres between trajectories and what was driven, per point that was; of headings by the turn."""
    # Padding goes out before anything is computed from it, so that nothing of it comes back in gradients.
    off = (trajectory - driven.future).masked_fill(~driven.future_valid[..., None], 0.0)
    off = torch.cat((off[..., :2], HEADING_METRES * turned(off[..., 2:])), -1)
    error = functional.smooth_l1_loss(off, torch.zeros_like(off), reduction="none").sum(-1)
    return masked_average(error, driven.future_valid)


def imitation_losses(plans: Plans, driven: Driven) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The losses of plans by the names in `LOSSES`, and metrics.

    `trajectory` is of the candidate that the expert took, `free` of the one without a line, which has to be good where
    it is the only one; `choice` is the cross-entropy on what the expert took. A row whose future is unknown counts
    nowhere.
    """
    index = driven.action[:, None, None, None].expand(-1, 1, *plans.trajectories.shape[2:])
    taken = plans.trajectories.gather(1, index).squeeze(1)
    known = driven.future_valid.any(-1)
    choice = plans.distribution()
    losses = {
        "trajectory": apart(taken, driven),
        "free": apart(plans.trajectories[:, -1], driven),
        "choice": masked_average(-choice.log_prob(driven.action), known),
    }
    with torch.no_grad():
        right = (choice.mode() == driven.action).float()
        metrics = {
            "choice_accuracy": masked_average(right, known),
            "choice_entropy": masked_average(choice.entropy(), known),
            **{f"{name}_loss": loss.detach() for name, loss in losses.items()},
        }
    return losses, metrics
