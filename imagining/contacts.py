"""Whether an ego runs into others between two states of traffic: `driving.reward`'s rules of contact, in tensors."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from driving.reward import MOMENTS, SLACK, STANDS
from imagining.traffic import Traffic


def own_fault(before: Traffic, after: Traffic) -> Bool[Tensor, "*B"]:
    """Whether the ego touches another by its own fault, at one of the moments between two states.

    It is at fault unless it stands, or the other's middle lies behind its rear bumper.
    """
    ego, others = _footprints(before, after, slice(0, 1)), _footprints(before, after, slice(1, None))
    touched = touch(ego, others)
    away = others[..., :2] - ego[..., :2]
    ahead = away[..., 0] * ego[..., 2].cos() + away[..., 1] * ego[..., 2].sin()
    fault = touched & (ahead > -ego[..., 3] / 2) & (before.valid & after.valid)[..., 1:, None]
    drives = torch.maximum(before.speed[..., 0], after.speed[..., 0]) > STANDS
    return fault.any(-1).any(-1) & drives


def touch(one: Float[Tensor, "*S 5"], other: Float[Tensor, "*R 5"]) -> Bool[Tensor, "..."]:
    """Whether two footprints (x, y, heading, length, width) overlap: no axis of either separates them."""
    apart = other[..., :2] - one[..., :2]
    overlap = torch.ones(apart.shape[:-1], dtype=torch.bool, device=apart.device)
    for owner in (one, other):
        for turn in (0.0, math.pi / 2):
            angle = owner[..., 2] + turn
            distance = apart[..., 0] * angle.cos() + apart[..., 1] * angle.sin()
            overlap = overlap & (distance.abs() <= _extent(one, angle) + _extent(other, angle))
    return overlap


def _extent(footprint: Float[Tensor, "*S 5"], angle: Float[Tensor, "*R"]) -> Float[Tensor, "..."]:
    """How far a footprint reaches from its middle along an axis."""
    turned = footprint[..., 2] - angle
    return (footprint[..., 3] * turned.cos().abs() + footprint[..., 4] * turned.sin().abs()) / 2


def _footprints(before: Traffic, after: Traffic, who: slice) -> Float[Tensor, "*B N M 5"]:
    """Footprints of some agents at moments between two states, less `SLACK` on each side."""
    shares = torch.arange(1, MOMENTS + 1, device=before.speed.device) / MOMENTS
    turned = torch.remainder(after.heading - before.heading + math.pi, 2 * math.pi) - math.pi
    place = before.place[..., who, None, :] + shares[:, None] * (after.place - before.place)[..., who, None, :]
    heading = before.heading[..., who, None] + shares * turned[..., who, None]
    sizes = torch.stack((after.length, after.width), -1)[..., who, None, :] - 2 * SLACK
    return torch.cat((place, heading[..., None], sizes.expand(*heading.shape, 2)), -1)
