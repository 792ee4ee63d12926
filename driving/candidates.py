"""What an ego may do next: to follow one of its reference lines at one of some speeds, or neither.

A candidate is a trajectory over the next 8 s. All of them follow from what an ego observes, so that whoever has an
observation has its candidates.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64

from driving.lines import LINES, POINTS, SPACING
from driving.scene import STEP

# Modes of each line: mode m comes to m / 5 of the speed limit.
MODES = 6
# Points of a trajectory, every `STEP` seconds.
STEPS = 16
# Index r * MODES + m is mode m of line r; the last is the candidate without a line.
ACTIONS = LINES * MODES + 1
FREE = ACTIONS - 1
# m/s^2: to gain speed, to lose it, to stop in mode 0, and without a line; and across the way, in bends.
FASTER, SLOWER, HARD, GENTLE, ACROSS = 2.0, 2.0, 4.5, 1.5, 4.0
# An ego comes to its line over so many metres at least; over what it drives in the first number of seconds where it is
# close to it, and in both together where it is so many metres away.
MERGE_METRES, MERGE_SECONDS, LANE = 10.0, (1.0, 2.0), 3.0
# The steepest way to a line, as a tangent.
STEEPEST = 1.0
# The bend at a point of a line is measured over so many points before it and behind it: the lines of junctions are
# made of short straights.
BEND = 2
# Speeds are computed so many times a step.
FINER = 2
# A logged future has taken a line that it stays so near to, in metres, on average and in the end.
FOLLOWS = 3.0
# Places of an ego's numbers (`features.EGO`).
SPEED, LIMIT = 0, 5


class Followed(NamedTuple):
    """Where trajectories lie along each line.

    Attributes:
        arc: metres from its beginning, on straight from its last point.
        distance: metres away from it.
        beyond: whether they are past the horizon, where nobody knows how the line would go on.
    """

    arc: Float32[np.ndarray, "N R T"]
    distance: Float32[np.ndarray, "N R T"]
    beyond: Bool[np.ndarray, "N R T"]


def action_mask(lines_valid: Bool[np.ndarray, "N R K"]) -> Bool[np.ndarray, "N A"]:
    """Which candidates there are: those of lines, and always the one without."""
    there = np.repeat(lines_valid.any(-1), MODES, axis=1)
    return np.concatenate((there, np.ones((len(there), 1), bool)), 1)


def candidates(
    lines: Float[np.ndarray, "N R K F"], lines_valid: Bool[np.ndarray, "N R K"], ego: Float[np.ndarray, "N E"]
) -> Float32[np.ndarray, "N A T 3"]:
    """All candidates: (x, y, heading) at the end of each of the next `STEPS` steps, in the ego's frame.

    Those of a line begin where the ego is and come to the line on a cubic. The one without a line keeps the heading and
    brakes gently: where no road is known, to stop is right whatever comes.

    Args:
        lines: reference lines (`lines.Lines`).
        lines_valid: which of their points there are; a candidate goes straight on from the last of them.
        ego: what the ego knows of itself (`features.EGO`).

    Returns:
        Zeros where there is no such line.
    """
    found = np.zeros((len(ego), ACTIONS, STEPS, 3), np.float32)
    found[:, :FREE] = along(lines, lines_valid, ego, _arcs(lines, ego)).reshape(len(ego), FREE, STEPS, 3)
    found[:, FREE, :, 0] = _braking(ego[:, SPEED])
    return found


def along(
    lines: Float[np.ndarray, "N R K F"],
    lines_valid: Bool[np.ndarray, "N R K"],
    ego: Float[np.ndarray, "N E"],
    arcs: Float[np.ndarray, "N R M T"],
) -> Float32[np.ndarray, "N R M T 3"]:
    """Trajectories along lines, whatever speeds they are driven at: (x, y, heading) in the ego's frame.

    Args:
        lines: reference lines (`lines.Lines`).
        lines_valid: which of their points there are.
        ego: what the ego knows of itself (`features.EGO`).
        arcs: metres along the line from where the ego is, at each moment.

    Returns:
        Zeros where there is no such line.
    """
    there = lines_valid.any(-1).reshape(-1, LINES, 1, 1, 1)
    ends = SPACING * np.maximum(lines_valid.sum(-1) - 1, 0)[:, :, None, None]
    within = np.minimum(arcs, ends)
    low = np.minimum((within / SPACING).astype(np.int64), POINTS - 2)
    high = np.minimum(low + 1, np.maximum(lines_valid.sum(-1) - 1, 0)[:, :, None, None])
    share = (within / SPACING - low)[..., None]
    before, after = (_at(lines[..., :4], place) for place in (low, high))
    place = (1 - share) * before + share * after
    direction = place[..., 2:4] / np.maximum(np.linalg.norm(place[..., 2:4], axis=-1, keepdims=True), 1e-6)
    offset, slope = _merge(lines, ego, arcs)
    side = np.stack((-direction[..., 1], direction[..., 0]), -1)
    points = place[..., :2] + (arcs - within)[..., None] * direction + offset[..., None] * side
    heading = np.arctan2(direction[..., 1], direction[..., 0]) + np.arctan(slope)
    return (np.concatenate((points, heading[..., None]), -1) * there).astype(np.float32)


def label(
    future: Float[np.ndarray, "N T 3"],
    future_valid: Bool[np.ndarray, "N T"],
    lines: Float[np.ndarray, "N R K F"],
    lines_valid: Bool[np.ndarray, "N R K"],
    ego: Float[np.ndarray, "N E"],
) -> Int64[np.ndarray, " N"]:
    """The candidates that logged futures took.

    The line is the one that the future stays nearest to; the mode is the one that has come as far along it by the last
    moment that is known. Where no line is near, or nothing is known, it is the candidate without a line.
    """
    followed = follow(future[..., :2], lines, lines_valid)
    known = future_valid[:, None] & ~followed.beyond
    rows = np.arange(len(future))
    mean = (followed.distance * known).sum(-1) / np.maximum(known.sum(-1), 1)
    end = np.take_along_axis(followed.distance, _last(known)[..., None], -1)[..., 0]
    follows = lines_valid.any(-1) & known.any(-1) & (mean <= FOLLOWS) & (end <= FOLLOWS)
    line = np.where(follows, mean + end, np.inf).argmin(1)
    last = _last(future_valid)
    arcs = _arcs(lines, ego)[rows, line, :, last]
    mode = np.abs(arcs - followed.arc[rows, line, last][:, None]).argmin(1)
    return np.where(follows.any(1), line * MODES + mode, FREE).astype(np.int64)


def follow(
    points: Float[np.ndarray, "N T 2"], lines: Float[np.ndarray, "N R K F"], lines_valid: Bool[np.ndarray, "N R K"]
) -> Followed:
    """Where points lie along lines, by the nearest point of each line and its heading."""
    away = points[:, None, :, None] - lines[:, :, None, :, :2]
    apart = np.where(lines_valid[:, :, None], (away**2).sum(-1), np.inf)
    nearest = apart.argmin(-1)
    step = np.take_along_axis(away, nearest[..., None, None], 3)[..., 0, :]
    direction = np.take_along_axis(lines[:, :, None, :, 2:4], nearest[..., None, None], 3)[..., 0, :]
    along = (step * direction).sum(-1)
    beside = direction[..., 0] * step[..., 1] - direction[..., 1] * step[..., 0]
    # What lies between two points of a line is beside it; only before its beginning and after its end it is farther.
    outside = np.maximum(np.abs(along) - SPACING, 0)
    return Followed(
        (SPACING * nearest + along).astype(np.float32),
        np.hypot(beside, outside).astype(np.float32),
        (nearest == POINTS - 1) & (along > 0),
    )


def _last(valid: Bool[np.ndarray, "*S T"]) -> Int64[np.ndarray, "*S"]:
    """The last moment that is valid; any, where none is."""
    return STEPS - 1 - valid[..., ::-1].argmax(-1)


def _arcs(lines: Float[np.ndarray, "N R K F"], ego: Float[np.ndarray, "N E"]) -> Float32[np.ndarray, "N R M T"]:
    """Metres along its line that each mode has driven after each step."""
    fastest = bend_speeds(lines)
    count = len(ego)
    shape = (count, LINES, MODES)
    targets = ego[:, LIMIT, None, None] * np.arange(MODES, dtype=np.float32) / (MODES - 1)
    slower = np.array([HARD] + [SLOWER] * (MODES - 1), np.float32)
    seconds = STEP / FINER
    speed = np.broadcast_to(ego[:, SPEED, None, None], shape).astype(np.float32)
    arc = np.zeros(shape, np.float32)
    arcs = np.empty((*shape, STEPS), np.float32)
    for number in range(STEPS * FINER):
        place = np.minimum((arc / SPACING + 0.5).astype(np.int64), POINTS - 1)
        wanted = np.minimum(targets, np.take_along_axis(fastest, place, -1))
        # In a bend it brakes as hard as need be.
        least = np.where(wanted < targets, HARD, slower) * seconds
        after = np.maximum(speed + np.clip(wanted - speed, -least, FASTER * seconds), 0)
        arc = arc + (speed + after) / 2 * seconds
        speed = after
        if number % FINER == FINER - 1:
            arcs[..., number // FINER] = arc
    return arcs


def bend_speeds(lines: Float[np.ndarray, "N R K F"]) -> Float32[np.ndarray, "N R K"]:
    """The speeds, in m/s, at which a line's bends are comfortable, and can be braked to in time."""
    cos, sin = lines[..., 2], lines[..., 3]
    one, other = slice(None, -2 * BEND), slice(2 * BEND, None)
    turned = np.arctan2(
        cos[..., one] * sin[..., other] - sin[..., one] * cos[..., other],
        cos[..., one] * cos[..., other] + sin[..., one] * sin[..., other],
    )
    # Where points are missing there is no bend.
    turned = np.where((lines[..., other, 2:4] != 0).any(-1), turned, 0)
    bend = np.pad(np.abs(turned) / (2 * BEND * SPACING), ((0, 0), (0, 0), (BEND, BEND)), mode="edge")
    speeds = np.sqrt(ACROSS / np.maximum(bend, 1e-4)).astype(np.float32)
    for point in range(POINTS - 2, -1, -1):
        before = np.sqrt(speeds[..., point + 1] ** 2 + 2 * SLOWER * SPACING)
        speeds[..., point] = np.minimum(speeds[..., point], before)
    return speeds


def _merge(
    lines: Float[np.ndarray, "N R K F"], ego: Float[np.ndarray, "N E"], arcs: Float[np.ndarray, "N R M T"]
) -> tuple[Float[np.ndarray, "N R M T"], Float[np.ndarray, "N R M T"]]:
    """Metres beside the line, left is positive, and their slope: a cubic from the ego's place and heading to none."""
    x, y, cos, sin = (lines[:, :, 0, column] for column in range(4))
    offset = (sin * x - cos * y)[..., None, None]
    slope = np.clip(-sin / np.maximum(cos, 1e-3), -STEEPEST, STEEPEST)[..., None, None]
    close, far = MERGE_SECONDS
    seconds = close + far * np.minimum(np.abs(offset) / LANE, 1)
    metres = np.maximum(MERGE_METRES, seconds * ego[:, SPEED, None, None, None])
    share = np.minimum(arcs / metres, 1)
    beside = offset * (1 - 3 * share**2 + 2 * share**3) + metres * slope * (share - 2 * share**2 + share**3)
    steep = offset * (6 * share**2 - 6 * share) / metres + slope * (1 - 4 * share + 3 * share**2)
    return beside, steep


def _braking(speed: Float[np.ndarray, " N"]) -> Float32[np.ndarray, "N T"]:
    """Metres that an ego drives which brakes gently."""
    seconds = np.minimum(STEP * np.arange(1, STEPS + 1), speed[:, None] / GENTLE)
    return (speed[:, None] * seconds - GENTLE / 2 * seconds**2).astype(np.float32)


def _at(lines: Float[np.ndarray, "N R K F"], place: Int64[np.ndarray, "N R M T"]) -> Float[np.ndarray, "N R M T F"]:
    """Points of lines by their number."""
    flat = place.reshape(*place.shape[:2], -1, 1)
    return np.take_along_axis(lines, flat, 2).reshape(*place.shape, lines.shape[-1])
