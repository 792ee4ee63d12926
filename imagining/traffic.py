"""Traffic that is carried along in imagination: who is where, and how everybody moves on in half a second."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from driving.features import AGENT_FEATURES, AGENTS, EGO, MOMENTS
from driving.scene import STEP
from parts.layers import MLP, Normed
from parts.sets import scrub

# Places of numbers in observations (`driving.features`).
SPEED, ACCELERATION, YAW_RATE, LENGTH, WIDTH, LIMIT = (
    EGO.index(name) for name in ("speed", "acceleration", "yaw_rate", "length", "width", "limit")
)
# What an output of 1 means: acceleration in m/s^2, turning in rad/s, and speed to the left in m/s.
OUTPUT_UNITS = (2.0, 0.2, 1.0)
# Numbers of each agent are divided by these where they are read: metres, m/s, m/s^2, rad/s.
PLACE_UNIT, SPEED_UNIT, ACCELERATION_UNIT, YAW_UNIT, LENGTH_UNIT = 20.0, 10.0, 2.0, 0.3, 5.0
# Who drives in front is no farther beside the way than this, and no farther ahead, in metres.
BESIDE, AHEAD = 1.8, 60.0
# Of an agent: own numbers, place and heading as the ego sees them, the ego's speed, and who drives in front.
FEATURES = 6 + 4 + 1 + 3
# Metres that an error of 1 m/s or of one radian counts as.
SPEED_METRES, HEADING_METRES = 0.5, 2.0


class Traffic(NamedTuple):
    """The ego, which comes first, and others, in one frame; what is not `valid` is 0.

    Attributes:
        place: metres.
        heading: radians.
        speed: along the heading, m/s.
        acceleration: over the last half second, m/s^2.
        yaw_rate: likewise, rad/s.
        slip: speed to the left of the heading, m/s.
        length: metres.
        width: metres.
        limit: of the ego's lane, m/s.
        valid: who is there.
    """

    place: Float[Tensor, "*B N 2"]
    heading: Float[Tensor, "*B N"]
    speed: Float[Tensor, "*B N"]
    acceleration: Float[Tensor, "*B N"]
    yaw_rate: Float[Tensor, "*B N"]
    slip: Float[Tensor, "*B N"]
    length: Float[Tensor, "*B N"]
    width: Float[Tensor, "*B N"]
    limit: Float[Tensor, "*B"]
    valid: Bool[Tensor, "*B N"]

    def after(self, change: Float[Tensor, "*B N 3"]) -> Traffic:
        """Half a second later.

        Args:
            change: acceleration, yaw rate and slip of everybody.
        """
        acceleration, yaw_rate, slip = scrub(change, self.valid).unbind(-1)
        speed = (self.speed + STEP * acceleration).clamp(min=0)
        middle = self.heading + STEP * yaw_rate / 2
        metres = STEP * (self.speed + speed) / 2
        course = torch.stack((middle.cos(), middle.sin()), -1)
        left = torch.stack((-course[..., 1], course[..., 0]), -1)
        place = self.place + metres[..., None] * course + STEP * slip[..., None] * left
        return self._replace(
            place=place,
            heading=self.heading + STEP * yaw_rate,
            speed=speed,
            acceleration=(speed - self.speed) / STEP,
            yaw_rate=yaw_rate,
            slip=slip,
        )


def observed(obs: dict[str, Tensor]) -> Traffic:
    """The traffic of observations, in the ego's frame of each."""
    ego = obs["ego"]
    nothing = torch.zeros_like(ego[..., :1])
    own = Traffic(
        torch.stack((nothing, nothing), -1),
        nothing,
        ego[..., SPEED, None],
        ego[..., ACCELERATION, None],
        ego[..., YAW_RATE, None],
        nothing,
        ego[..., LENGTH, None],
        ego[..., WIDTH, None],
        ego[..., LIMIT],
        torch.ones_like(nothing, dtype=torch.bool),
    )
    return _joined(own, _others(obs, ego[..., LIMIT], MOMENTS - 1))


def observed_before(obs: dict[str, Tensor]) -> Traffic:
    """The traffic half a second before observations [B, T], in the ego's frame of each; of the first ones it is void.

    The ego's way in between follows from its speeds and from how it turned.
    """
    ego = obs["ego"]
    earlier = ego.roll(1, 1)
    turned = STEP * ego[..., YAW_RATE, None]
    metres = STEP * (earlier[..., SPEED, None] + ego[..., SPEED, None]) / 2
    course = torch.stack(((turned / 2).cos(), -(turned / 2).sin()), -1)
    own = Traffic(
        -metres[..., None] * course,
        -turned,
        earlier[..., SPEED, None],
        earlier[..., ACCELERATION, None],
        earlier[..., YAW_RATE, None],
        torch.zeros_like(turned),
        earlier[..., LENGTH, None],
        earlier[..., WIDTH, None],
        earlier[..., LIMIT],
        ~obs["is_first"][..., None],
    )
    return _joined(own, _others(obs, earlier[..., LIMIT], MOMENTS - 2))


def _joined(own: Traffic, others: Traffic) -> Traffic:
    """The ego, and the others after it."""
    numbers = (torch.cat(pair, -1) for pair in zip(own[1:-2], others[1:-2], strict=True))
    place, valid = torch.cat((own.place, others.place), -2), torch.cat((own.valid, others.valid), -1)
    return Traffic(place, *numbers, own.limit, valid)  # type: ignore[call-arg]


def _others(obs: dict[str, Tensor], limit: Float[Tensor, "*B"], moment: int) -> Traffic:
    """The other agents of observations at one of their moments."""
    agents = obs["agents"].unflatten(-1, (AGENTS, MOMENTS, AGENT_FEATURES))
    there = obs["agents_valid"].unflatten(-1, (AGENTS, MOMENTS)).bool()
    valid, known = there[..., moment], there[..., moment] & there[..., moment - 1]
    agents = agents.masked_fill(~there[..., None], 0.0)
    now, before = agents[..., moment, :], agents[..., moment - 1, :]
    heading, earlier = (torch.atan2(each[..., 3], each[..., 2]) for each in (now, before))
    speed, slower = (each[..., 4:6].norm(dim=-1) for each in (now, before))
    turned = torch.remainder(heading - earlier + math.pi, 2 * math.pi) - math.pi
    middle = earlier + turned / 2
    moved = now[..., :2] - before[..., :2]
    slip = (middle.cos() * moved[..., 1] - middle.sin() * moved[..., 0]) / STEP
    changes = ((speed - slower) / STEP, turned / STEP, slip)
    acceleration, yaw_rate, slip = (each.masked_fill(~known, 0.0) for each in changes)
    return Traffic(now[..., :2], heading, speed, acceleration, yaw_rate, slip, now[..., 6], now[..., 7], limit, valid)


class MotionHead(nn.Module):
    """How everybody moves on in the next half a second, by how they move now, who drives in front, and the latent.

    It begins with constant velocity. The ego, which the action belongs to, has a network of its own.
    """

    def __init__(self, feat_size: int, action_size: int, *, units: int) -> None:
        super().__init__()
        self.latent = Normed(feat_size + action_size, units)
        self.others = MLP(FEATURES + units, len(OUTPUT_UNITS), units=units, layers=2, zero_output=True)
        self.ego = MLP(FEATURES + 1 + units, len(OUTPUT_UNITS), units=units, layers=2, zero_output=True)

    def forward(
        self, traffic: Traffic, feat: Float[Tensor, "*B F"], action: Float[Tensor, "*B A"]
    ) -> Float[Tensor, "*B N 3"]:
        """Acceleration, yaw rate and slip of everybody.

        Args:
            traffic: as it is.
            feat: of the latent.
            action: of the ego, as the RSSM sees it.
        """
        seen = features(traffic)
        latent = self.latent(torch.cat((feat, action), -1))[..., None, :]
        shown = torch.cat((seen[..., 1:, :], latent.expand(*seen.shape[:-2], seen.shape[-2] - 1, -1)), -1)
        limit = traffic.limit[..., None, None] / SPEED_UNIT
        own = torch.cat((seen[..., :1, :], limit, latent), -1)
        outputs = torch.cat((self.ego(own), self.others(shown)), -2)
        return outputs * torch.tensor(OUTPUT_UNITS, device=outputs.device)


def features(traffic: Traffic) -> Float[Tensor, "*B N F"]:
    """What a network reads of everybody; of who is not there it is 0."""
    ego_heading = traffic.heading[..., :1]
    away = _turned(traffic.place - traffic.place[..., :1, :], ego_heading)
    relative = traffic.heading - ego_heading
    own = (
        traffic.speed / SPEED_UNIT,
        traffic.acceleration / ACCELERATION_UNIT,
        traffic.yaw_rate / YAW_UNIT,
        traffic.slip,
        traffic.length / LENGTH_UNIT,
        (traffic.speed < 0.1).float(),
        away[..., 0] / PLACE_UNIT,
        away[..., 1] / PLACE_UNIT,
        relative.cos(),
        relative.sin(),
        traffic.speed[..., :1].expand_as(traffic.speed) / SPEED_UNIT,
    )
    seen = torch.cat((torch.stack(own, -1), _in_front(traffic)), -1)
    return scrub(seen, traffic.valid)


def _in_front(traffic: Traffic) -> Float[Tensor, "*B N 3"]:
    """Of who drives in front of everybody: how near it is, from 0 to 1, how much faster, and that there is somebody."""
    away = traffic.place[..., None, :, :] - traffic.place[..., :, None, :]
    away = _turned(away, traffic.heading[..., :, None])
    gap = away[..., 0] - (traffic.length[..., None, :] + traffic.length[..., :, None]) / 2
    ahead = (away[..., 0] > 0) & (away[..., 1].abs() < BESIDE) & (gap < AHEAD)
    ahead = ahead & traffic.valid[..., None, :] & traffic.valid[..., :, None]
    gap, leader = gap.masked_fill(~ahead, AHEAD).min(-1)
    there = ahead.any(-1)
    faster = traffic.speed.gather(-1, leader) - traffic.speed
    nearness = 1 - gap.clamp(min=0) / AHEAD
    return torch.stack((nearness, faster.masked_fill(~there, 0.0) / SPEED_UNIT, there.float()), -1)


def _turned(vectors: Float[Tensor, "*B N 2"], heading: Float[Tensor, "*B M"]) -> Float[Tensor, "*B N 2"]:
    """Vectors as who looks along a heading sees them."""
    cos, sin = heading.cos(), heading.sin()
    x, y = vectors.unbind(-1)
    return torch.stack((cos * x + sin * y, cos * y - sin * x), -1)


def motion_error(foreseen: Traffic, seen: Traffic, counts: Bool[Tensor, "*B N"]) -> Float[Tensor, "*B"]:
    """Smooth L1, in metres, of where everybody was foreseen, how fast, and how turned: a mean over those that count."""
    turned = torch.remainder(foreseen.heading - seen.heading + math.pi, 2 * math.pi) - math.pi
    off = torch.cat(
        (
            foreseen.place - seen.place,
            SPEED_METRES * (foreseen.speed - seen.speed)[..., None],
            HEADING_METRES * turned[..., None],
        ),
        -1,
    ).masked_fill(~counts[..., None], 0.0)
    error = functional.smooth_l1_loss(off, torch.zeros_like(off), reduction="none", beta=0.2).sum((-2, -1))
    return error / counts.sum(-1).clamp(min=1)
