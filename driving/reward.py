"""What half a second of driving is worth: metres along the road, less for contact, leaving the road and discomfort."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int64

from driving.lines import lane_of
from driving.roads import RoadMap
from driving.scene import STEP, Log

# Metres along the road that are worth 1.
METRES = 10.0
# What a contact by the ego's own fault costs, and leaving the road.
CONTACT, OFF_ROAD = 10.0, 5.0
# What the greatest discomfort costs, and what acceleration along and across (m/s^2) and jerk (m/s^3) is that alone.
DISCOMFORT, ALONG, ACROSS, JERK = 0.1, 4.0, 4.0, 10.0
# Between two frames agents are taken to go straight, and compared at so many moments.
MOMENTS = 5
# Agents whose middles are farther apart than this, in metres, are not compared.
REACH = 40.0
# Footprints that reach into one another by less than twice this, in metres, do not touch: no driver of SUMO's keeps its
# place across a lane, and its direction, more exactly.
SLACK = 0.1
# Who is slower, in m/s, stands, and is at no fault.
STANDS = 0.5


class Reward(NamedTuple):
    """What happened to egos between two frames.

    Attributes:
        total: the reward.
        metres: that the ego has come along the road; 0 off the road.
        contact: whether it touched another agent.
        own_fault: whether it did so while it drove itself, and was not run into from behind.
        off_road: whether no lane that leads its way is near.
        discomfort: from 0 to 1.
    """

    total: Float32[np.ndarray, " N"]
    metres: Float32[np.ndarray, " N"]
    contact: Bool[np.ndarray, " N"]
    own_fault: Bool[np.ndarray, " N"]
    off_road: Bool[np.ndarray, " N"]
    discomfort: Float32[np.ndarray, " N"]


def rewards(log: Log, road_map: RoadMap, agents: Int[np.ndarray, " N"], frame: int) -> Reward:
    """The rewards that arrive at a frame, for what was driven since the frame before.

    Args:
        log: of traffic.
        road_map: that it was recorded on.
        agents: by their ids; all of them are in both frames.
        frame: of the log, from 1.
    """
    now = log.find(agents, np.full(len(agents), frame))
    before = log.find(agents, np.full(len(agents), frame - 1))
    assert (now >= 0).all() and (before >= 0).all(), "an agent is not in both frames"
    points = np.stack((log.x[now], log.y[now]), 1)
    moved = points - np.stack((log.x[before], log.y[before]), 1)
    nearest = lane_of(road_map, points, log.heading[now])
    on_road = nearest.lane >= 0
    course = np.stack((np.cos(nearest.heading), np.sin(nearest.heading)), 1)
    metres = np.where(on_road, (moved * course).sum(1), 0)
    contact, own_fault = _contacts(log, before, now)
    discomfort = _discomfort(log, before, now)
    total = metres / METRES - CONTACT * own_fault - OFF_ROAD * ~on_road - DISCOMFORT * discomfort
    return Reward(
        total.astype(np.float32), metres.astype(np.float32), contact, own_fault, ~on_road, discomfort.astype(np.float32)
    )


def touch(one: Float[np.ndarray, "*S 5"], other: Float[np.ndarray, "*S 5"]) -> Bool[np.ndarray, "*S"]:
    """Whether two footprints (x, y, heading, length, width) overlap: no axis of either separates them."""
    apart = other[..., :2] - one[..., :2]
    separated = np.zeros(apart.shape[:-1], bool)
    for owner in (one, other):
        for turn in (0.0, np.pi / 2):
            angle = owner[..., 2] + turn
            axis = np.stack((np.cos(angle), np.sin(angle)), -1)
            reach = sum(_extent(footprint, angle) for footprint in (one, other))
            separated |= np.abs((apart * axis).sum(-1)) > reach
    return ~separated


def _extent(footprint: Float[np.ndarray, "*S 5"], angle: Float[np.ndarray, "*S"]) -> Float[np.ndarray, "*S"]:
    """How far a footprint reaches from its middle along an axis."""
    turned = footprint[..., 2] - angle
    return (footprint[..., 3] * np.abs(np.cos(turned)) + footprint[..., 4] * np.abs(np.sin(turned))) / 2


def _contacts(
    log: Log, before: Int64[np.ndarray, " N"], now: Int64[np.ndarray, " N"]
) -> tuple[Bool[np.ndarray, " N"], Bool[np.ndarray, " N"]]:
    """Whether egos touched others since the frame before, and whether by their own fault."""
    if not len(now):
        return np.zeros(0, bool), np.zeros(0, bool)
    present = np.arange(*log.rows(int(log.frame[now[0]])).indices(len(log.id)))
    earlier = log.find(log.id[present], log.frame[present] - 1)
    # Those who have just come were nowhere to be run into.
    present, earlier = present[earlier >= 0], earlier[earlier >= 0]
    apart = np.hypot(log.x[now][:, None] - log.x[present], log.y[now][:, None] - log.y[present])
    ego, other = np.nonzero((apart < REACH) & (now[:, None] != present))
    shares = np.arange(1, MOMENTS + 1)[:, None] / MOMENTS
    own = _between(log, before[ego], now[ego], shares)
    others = _between(log, earlier[other], present[other], shares)
    touched = touch(own, others)
    away = others[..., :2] - own[..., :2]
    ahead = away[..., 0] * np.cos(own[..., 2]) + away[..., 1] * np.sin(own[..., 2])
    drives = np.maximum(log.speed[now], log.speed[before])[ego] > STANDS
    fault = touched & (ahead > -own[..., 3] / 2) & drives
    contact, own_fault = np.zeros(len(now), bool), np.zeros(len(now), bool)
    np.logical_or.at(contact, ego, touched.any(0))
    np.logical_or.at(own_fault, ego, fault.any(0))
    return contact, own_fault


def _between(
    log: Log, before: Int64[np.ndarray, " C"], now: Int64[np.ndarray, " C"], shares: Float[np.ndarray, "M 1"]
) -> Float[np.ndarray, "M C 5"]:
    """Footprints at moments between two frames, less `SLACK` on each side."""
    turned = log.heading[now] - log.heading[before]
    turned = np.arctan2(np.sin(turned), np.cos(turned))
    moments = (
        log.x[before] + shares * (log.x[now] - log.x[before]),
        log.y[before] + shares * (log.y[now] - log.y[before]),
        log.heading[before] + shares * turned,
    )
    sizes = (np.broadcast_to(size[now] - 2 * SLACK, moments[0].shape) for size in (log.length, log.width))
    return np.stack((*moments, *sizes), -1)


def _discomfort(log: Log, before: Int64[np.ndarray, " N"], now: Int64[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    turned = log.heading[now] - log.heading[before]
    across = log.speed[now] * np.arctan2(np.sin(turned), np.cos(turned)) / STEP
    jerk = (log.acceleration[now] - log.acceleration[before]) / STEP
    return np.minimum((log.acceleration[now] / ALONG) ** 2 + (across / ACROSS) ** 2 + (jerk / JERK) ** 2, 1)
