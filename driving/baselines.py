"""Drivers without a network, who know what an ego observes: constant velocity, and following a line by IDM."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float32

from driving.candidates import STEPS, along, bend_speeds, candidates, follow
from driving.features import EGO
from driving.lines import LINES, POINTS, SPACING
from driving.scene import STEP

# Places of numbers in observations (`features`).
SPEED, EGO_LENGTH, EGO_WIDTH, LIMIT = (EGO.index(name) for name in ("speed", "length", "width", "limit"))
VELOCITY, LENGTH, WIDTH = slice(4, 6), 6, 7

Observation = Mapping[str, np.ndarray]
# What drives: from an observation (`features.FEATURES`) to the index of a candidate, or to a trajectory [16, 3] of
# (x, y, heading) after each of the next steps, in the ego's frame.
Planner = Callable[[Observation], int | np.ndarray]

# The intelligent driver model (Treiber, Hennecke and Helbing 2000), with the decelerations of SUMO's drivers: m/s^2 to
# gain and to lose speed, seconds and metres that it keeps from who drives in front, and the exponent.
GAIN, LOSE, HEADWAY, GAP, EXPONENT = 2.0, 3.0, 1.2, 2.0, 4.0
# Lines that begin so near are of the own lane, in metres.
OWN = 1.6
# Whoever is so near to the line, in metres beyond both half widths, is in front.
BESIDE = 0.3
# How often speeds are computed in a step; the slowest speed that is aimed at, m/s, and the least room, in metres.
FINER, SLOWEST, NEAREST = 2, 0.1, 0.1
# The hardest it brakes, m/s^2, and what it would take to stop at amber: harder, and it drives on.
HARDEST, AMBER = 6.0, 3.0


def constant_velocity(obs: Observation) -> Float32[np.ndarray, "T 3"]:
    """Keep heading and speed."""
    found = np.zeros((STEPS, 3), np.float32)
    found[:, 0] = obs["ego"][SPEED] * STEP * np.arange(1, STEPS + 1)
    return found


def brake(obs: Observation) -> Float32[np.ndarray, "T 3"]:
    """The candidate without a line: keep the heading and brake gently."""
    return candidates(obs["lines"][None], obs["lines_valid"][None], obs["ego"][None])[0, -1]


def idm(obs: Observation) -> Float32[np.ndarray, "T 3"]:
    """Follow the straightest line of the own lane at the speed of the intelligent driver model; brake without a line.

    It keeps its distance from the nearest agent on the line, and stops at lights. It gives way to nobody.
    """
    row = _straightest(obs)
    if row is None:
        return brake(obs)
    lines, valid, ego = obs["lines"][None], obs["lines_valid"][None], obs["ego"][None]
    arcs = np.zeros((1, LINES, 1, STEPS), np.float32)
    arcs[0, row, 0] = _drive(obs, row)
    return along(lines, valid, ego, arcs)[0, row, 0]


def idm_by_candidate(obs: Observation) -> int:
    """The candidate that comes nearest to what `idm` would drive."""
    every = candidates(obs["lines"][None], obs["lines_valid"][None], obs["ego"][None])[0]
    apart = np.linalg.norm(every[..., :2] - idm(obs)[:, :2], axis=-1).mean(-1)
    return int(np.where(obs["action_mask"], apart, np.inf).argmin())


def _straightest(obs: Observation) -> int | None:
    """The line from where the ego is that turns least; None where there is none."""
    lines, valid = obs["lines"], obs["lines_valid"]
    own = valid.any(1) & (np.abs(lines[:, 0, 1]) < OWN)
    ends = np.maximum(valid.sum(1) - 1, 0)
    last = lines[np.arange(LINES), ends]
    turned = np.abs(np.arctan2(last[:, 3], last[:, 2]))
    return int(np.where(own, turned, np.inf).argmin()) if own.any() else None


def _drive(obs: Observation, row: int) -> Float32[np.ndarray, " T"]:
    """Metres along a line after each step."""
    speed, limit = float(obs["ego"][SPEED]), float(obs["ego"][LIMIT])
    bends = bend_speeds(obs["lines"][None])[0, row]
    obstacles = [*_in_front(obs, row), *_stop_line(obs, row)]
    arc, seconds, arcs = 0.0, STEP / FINER, []
    for number in range(STEPS * FINER):
        wanted = max(min(limit, float(bends[min(int(arc / SPACING + 0.5), POINTS - 1)])), SLOWEST)
        free = 1 - (speed / wanted) ** EXPONENT
        press = 0.0
        for gap, other in obstacles:
            room = max(gap + other * seconds * number - arc, NEAREST)
            kept = GAP + max(0.0, speed * HEADWAY + speed * (speed - other) / (2 * np.sqrt(GAIN * LOSE)))
            press = max(press, (kept / room) ** 2)
        after = max(0.0, speed + seconds * max(GAIN * (free - press), -HARDEST))
        arc, speed = arc + (speed + after) / 2 * seconds, after
        arcs.append(arc)
    return np.array(arcs[FINER - 1 :: FINER], np.float32)


def _in_front(obs: Observation, row: int) -> list[tuple[float, float]]:
    """The nearest agent on a line: metres between the bumpers, and its speed along the line."""
    now, there = obs["agents"][:, -1], obs["agents_valid"][:, -1]
    followed = follow(now[None, :, :2], obs["lines"][None], obs["lines_valid"][None])
    arc, distance = followed.arc[0, row], followed.distance[0, row]
    sides = (now[:, WIDTH] + obs["ego"][EGO_WIDTH]) / 2 + BESIDE
    ahead = there & (distance < sides) & (arc > 0)
    if not ahead.any():
        return []
    gaps = arc - (now[:, LENGTH] + obs["ego"][EGO_LENGTH]) / 2
    nearest = int(np.where(ahead, gaps, np.inf).argmin())
    place = min(int(arc[nearest] / SPACING), POINTS - 1)
    along_line = float(now[nearest, VELOCITY] @ obs["lines"][row, place, 2:4])
    return [(float(gaps[nearest]), max(0.0, along_line))]


def _stop_line(obs: Observation, row: int) -> list[tuple[float, float]]:
    """The first light on a line that is not green and can still be stopped at, as somebody who stands there."""
    lights = obs["lines"][row, :, -1]
    if not lights.any():
        return []
    point = int((lights > 0).argmax())
    metres = SPACING * (point - 1) - float(obs["ego"][EGO_LENGTH]) / 2
    needed = float(obs["ego"][SPEED]) ** 2 / (2 * max(metres, NEAREST))
    if metres < 0 or needed > (HARDEST if lights[point] == 1 else AMBER):
        return []
    # IDM keeps its gap from who stands; a line may be stopped at.
    return [(metres + GAP, 0.0)]


# By the names that commands know.
PLANNERS: Mapping[str, Planner] = {
    "constant_velocity": constant_velocity,
    "idm": idm,
    "idm_by_candidate": idm_by_candidate,
}
