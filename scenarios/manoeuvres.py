"""What an ego does over a scenario, told by its speeds, its headings, its lanes and whom it follows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from driving.roads import RoadMap
from driving.scene import Log

# Below this an ego stands, above that it drives, m/s.
STANDING, DRIVING = 0.5, 2.0
# Radians between the first and the last heading, from which on it is a turn.
TURN = np.pi / 4
# Whom an ego follows is ahead within so many metres, or as far as it comes in so many seconds, and hardly beside it.
FOLLOWING_METRES, FOLLOWING_SECONDS, FOLLOWING_ASIDE = 12.0, 2.5, 1.5
# And leads the same way, give or take so many radians.
FOLLOWING_TURN = np.pi / 6
# Lanes that an ego may pass from one frame to the next; there are short ones in junctions.
LANES_PASSED = 3


class Course(NamedTuple):
    """What is known of an ego in each row of a scenario.

    Attributes:
        speeds: m/s.
        headings: radians.
        changes: whether the ego has changed to a lane beside its own since the row before.
        follows: whether it follows somebody.
    """

    speeds: Float[np.ndarray, " T"]
    headings: Float[np.ndarray, " T"]
    changes: Bool[np.ndarray, " T"]
    follows: Bool[np.ndarray, " T"]


def type_of(course: Course) -> str:
    """The type of a scenario, the first of these that fits."""
    speeds = course.speeds
    turned = np.unwrap(course.headings)
    turn = turned[-1] - turned[0]
    begins_standing, ends_standing = speeds[0] < STANDING, speeds[-1] < STANDING
    types = {
        "stationary": (speeds < STANDING).all(),
        "lane_change": course.changes[1:].any(),
        "turn_left": turn > TURN,
        "turn_right": turn < -TURN,
        "starting": begins_standing and speeds[-1] > DRIVING,
        "stopping": ends_standing and speeds[0] > DRIVING,
        "following": course.follows.mean() > 0.5,
        "free": True,
    }
    return next(name for name, fits in types.items() if fits)


def lane_changes(
    before: Int[np.ndarray, " N"], after: Int[np.ndarray, " N"], road_map: RoadMap
) -> Bool[np.ndarray, " N"]:
    """Whether agents have changed to a lane beside their own, rather than stayed on it or gone where it leads to.

    Args:
        before: lane of each agent, -1 for none.
        after: lane half a second later.
        road_map: of these lanes.
    """
    pairs, place = np.unique(np.stack((before, after)), axis=1, return_inverse=True)
    changed = [_is_change(int(first), int(last), road_map) for first, last in pairs.T]
    return np.array(changed, bool)[place.reshape(-1)] if changed else np.zeros(len(before), bool)


def _is_change(before: int, after: int, road_map: RoadMap) -> bool:
    if before == after or min(before, after) < 0 or max(before, after) >= len(road_map.lanes):
        return False
    beside = {road_map.lanes[before].left, road_map.lanes[before].right} - {-1}
    own, others = {before}, set(beside)
    for _ in range(LANES_PASSED):
        if after in own:
            return False
        if after in others:
            return True
        own = {lane for passed in own for lane in road_map.lanes[passed].successors}
        others = {lane for passed in others for lane in road_map.lanes[passed].successors}
    return False


def following(log: Log) -> Bool[np.ndarray, " N"]:
    """Whether each agent of each frame of a log has another one ahead of it on its way."""
    follows = np.zeros(len(log.id), bool)
    for frame in range(log.frames):
        rows = log.rows(frame)
        x, y, heading, speed = (values[rows].astype(np.float64) for values in (log.x, log.y, log.heading, log.speed))
        away_x, away_y = x[None] - x[:, None], y[None] - y[:, None]
        cos, sin = np.cos(heading)[:, None], np.sin(heading)[:, None]
        ahead, aside = cos * away_x + sin * away_y, cos * away_y - sin * away_x
        reach = np.maximum(FOLLOWING_METRES, FOLLOWING_SECONDS * speed)[:, None]
        same_way = np.cos(heading[None] - heading[:, None]) > np.cos(FOLLOWING_TURN)
        leads = (ahead > 0) & (ahead < reach) & (np.abs(aside) < FOLLOWING_ASIDE) & same_way
        follows[rows] = leads.any(1)
    return follows
