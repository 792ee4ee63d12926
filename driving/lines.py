"""Reference lines: the ways along lanes that an ego may take from where it is, in its own frame."""

from __future__ import annotations

import heapq
import weakref
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int32

from driving.roads import Nearest, RoadMap
from driving.scene import Light

# How many lines an ego has at most, of how many points, and how far these are apart, in metres.
LINES, POINTS, SPACING = 6, 51, 2.0
HORIZON = SPACING * (POINTS - 1)
# Of a point: x, y, cos and sin of the heading, and how far a light is from green: 1 is red, 0.5 amber.
LINE_FEATURES = 5
# A lane is an ego's where it is so near, in metres, and leads within a right angle of the ego's heading.
NEAR = 3.0
ALONG = 0.0
# A way has so many metres ahead at least, and differs from others by so many.
SHORTEST, DIFFERENCE = 6.0, 10.0
# Ways of one lane, all branches counted; in what is left of a tangle the first branch goes on alone.
MOST_WAYS = 24
# Ways are kept as points so far apart, in metres.
FINE = 1.0
# Lanes that part in a junction are all an ego's while it is so near to them, in metres, and turned so little.
BRANCH_NEAR, BRANCH_COSINE = 1.5, 0.9
# How many lines of the own lane there are at most, where there are others beside it.
OWN_LINES = LINES - 2


class Ways(NamedTuple):
    """The ways from the beginning of a lane, through every branch, to `HORIZON` beyond its end and the next junction.

    Attributes:
        points: (x, y, cos, sin) every `FINE` metres; the last point again where a way is shorter.
        lanes: the lane that each point lies on.
        metres: how long each way is.
        parted: the metres after which a way differs from all those before it.
    """

    points: Float32[np.ndarray, "W n 4"]
    lanes: Int32[np.ndarray, "W n"]
    metres: Float32[np.ndarray, " W"]
    parted: Float32[np.ndarray, " W"]


class Lines(NamedTuple):
    """The reference lines of egos, each in its own frame: it stands at the origin and looks along x.

    Those of the lane that it is on come first, by branch, then those of the lanes to the left and to the right.
    """

    points: Float32[np.ndarray, "N R K F"]
    valid: Bool[np.ndarray, "N R K"]


# The ways of lanes by map, as they are first asked for.
_known: weakref.WeakKeyDictionary[RoadMap, dict[int, Ways]] = weakref.WeakKeyDictionary()


def lane_of(
    road_map: RoadMap, points: Float[np.ndarray, "N 2"], headings: Float[np.ndarray, " N"], *, within: float = NEAR
) -> Nearest:
    """The lanes that egos are on; -1 where none is near and leads their way."""
    return road_map.nearest(points, headings, within=within, least_cosine=ALONG)


def reference_lines(
    road_map: RoadMap,
    nearest: Nearest,
    points: Float[np.ndarray, "N 2"],
    headings: Float[np.ndarray, " N"],
    lights: Float[np.ndarray, " L"],
) -> Lines:
    """The lines of egos.

    Args:
        road_map: with the lanes.
        nearest: the egos' lanes, as `lane_of` gives them.
        points: where the egos are, metres.
        headings: radians.
        lights: of every lane, how far its light is from green (`closed_lanes`).
    """
    found = Lines(
        np.zeros((len(points), LINES, POINTS, LINE_FEATURES), np.float32),
        np.zeros((len(points), LINES, POINTS), bool),
    )
    cos, sin = np.cos(headings), np.sin(headings)
    turn = np.stack((np.stack((cos, -sin), -1), np.stack((sin, cos), -1)), -2).astype(np.float32)
    for ego in np.flatnonzero(nearest.lane >= 0):
        pose = np.array((*points[ego], cos[ego], sin[ego]))
        chosen = _choose(road_map, int(nearest.lane[ego]), float(nearest.arc[ego]), pose)
        for row, (ways, way, arc) in enumerate(chosen):
            line, valid = _sample(ways, way, arc, lights)
            line[:, :2] = (line[:, :2] - points[ego]) @ turn[ego]
            line[:, 2:4] = line[:, 2:4] @ turn[ego]
            line[~valid] = 0
            found.points[ego, row], found.valid[ego, row] = line, valid
    return found


def closed_lanes(road_map: RoadMap, lanes: Int32[np.ndarray, " C"], lights: np.ndarray) -> Float32[np.ndarray, " L"]:
    """For every lane of the map, how far its light is from green: 0 where there is none."""
    closed = np.zeros(len(road_map.lanes), np.float32)
    closed[lanes] = lights.astype(np.float32) / Light.RED
    return closed


def ways_of(road_map: RoadMap, lane: int) -> Ways:
    """The ways from a lane; computed once for each lane of a map."""
    known = _known.setdefault(road_map, {})
    if lane not in known:
        known[lane] = _find_ways(road_map, lane)
    return known[lane]


def _choose(road_map: RoadMap, lane: int, arc: float, pose: Float[np.ndarray, "4"]) -> list[tuple[Ways, int, float]]:
    """The ways that become the lines of an ego, at (x, y, cos, sin), each with the metres behind it."""
    own = _branches(road_map, lane, arc, pose) or _distinct(road_map, lane, arc)
    share = arc / float(road_map.lengths[lane])
    sides = [
        _distinct(road_map, other, share * float(road_map.lengths[other]))
        for other in (road_map.lanes[lane].left, road_map.lanes[lane].right)
        if other >= 0
    ]
    beside = [way for ways in sides for way in ways[:1]] + [way for ways in sides for way in ways[1:]]
    first = own[: LINES - min(len(beside), LINES - OWN_LINES)]
    return [*first, *beside][:LINES]


def _branches(road_map: RoadMap, lane: int, arc: float, pose: Float[np.ndarray, "4"]) -> list[tuple[Ways, int, float]]:
    """The ways that are still open to an ego in a junction: from the lane that it came by, those beside which it is."""
    if not road_map.lanes[lane].in_junction or len(road_map.predecessors[lane]) != 1:
        return []
    (before,) = road_map.predecessors[lane]
    arc += float(road_map.lengths[before])
    open_ways = []
    for ways, way, behind in _distinct(road_map, before, arc):
        point = ways.points[way, round(arc / FINE)]
        near = np.linalg.norm(point[:2] - pose[:2]) <= BRANCH_NEAR and point[2:] @ pose[2:] >= BRANCH_COSINE
        if near or ways.lanes[way, round(arc / FINE)] == lane:
            open_ways.append((ways, way, behind))
    return open_ways


def _distinct(road_map: RoadMap, lane: int, arc: float) -> list[tuple[Ways, int, float]]:
    """The ways of a lane that differ from one another within the horizon of an ego, and do not end before it."""
    ways = ways_of(road_map, lane)
    differs = ways.parted < arc + HORIZON - DIFFERENCE
    goes_on = ways.metres > arc + SHORTEST
    return [(ways, int(way), arc) for way in np.flatnonzero(differs & goes_on)]


def _sample(
    ways: Ways, way: int, arc: float, lights: Float[np.ndarray, " L"]
) -> tuple[Float32[np.ndarray, "K F"], Bool[np.ndarray, " K"]]:
    """The points of a line, in the map's frame, from so many metres after the beginning of its way."""
    arcs = arc + SPACING * np.arange(POINTS)
    # A millimetre more, so that rounding takes no last point away.
    valid = arcs <= ways.metres[way] + 1e-3
    place = arcs / FINE
    low = np.minimum(place.astype(np.int64), ways.points.shape[1] - 2)
    share = np.clip(place - low, 0, 1)[:, None].astype(np.float32)
    fine = ways.points[way]
    line = np.empty((POINTS, LINE_FEATURES), np.float32)
    line[:, :4] = (1 - share) * fine[low] + share * fine[low + 1]
    line[:, 2:4] /= np.maximum(np.linalg.norm(line[:, 2:4], axis=1, keepdims=True), 1e-6)
    lanes = ways.lanes[way, low]
    # The light that an ego has passed is none for it; the next one holds for all that lies behind it.
    line[:, 4] = np.maximum.accumulate(np.where(lanes == lanes[0], 0, lights[lanes]))
    return line, valid


def _find_ways(road_map: RoadMap, lane: int) -> Ways:
    """Follow every branch, the nearest first, so that a tangle of streets takes from what is far."""
    crossings = [float(road_map.lengths[other]) for other in road_map.lanes[lane].successors]
    # An ego in the junction that the lane leads to looks at these ways, too.
    wanted = float(road_map.lengths[lane]) + max(crossings, default=0.0) + HORIZON
    # Its length so far, the number of the branch taken at each end of a lane, and the lanes, of every way.
    waiting: list[tuple[float, tuple[int, ...], tuple[int, ...]]] = [(float(road_map.lengths[lane]), (), (lane,))]
    done = []
    while waiting:
        metres, turns, lanes = heapq.heappop(waiting)
        successors = road_map.lanes[lanes[-1]].successors
        if metres >= wanted or not successors:
            done.append((turns, lanes))
            continue
        room = MOST_WAYS - len(waiting) - len(done)
        for number, following in enumerate(successors[: max(room, 1)]):
            longer = metres + float(road_map.lengths[following])
            heapq.heappush(waiting, (longer, (*turns, number), (*lanes, following)))
    done.sort()
    sequences = [lanes for _, lanes in done]
    count = int(wanted / FINE) + 2
    points = np.empty((len(sequences), count, 4), np.float32)
    owners = np.empty((len(sequences), count), np.int32)
    lengths, parted = np.empty(len(sequences), np.float32), np.empty(len(sequences), np.float32)
    for way, lanes in enumerate(sequences):
        points[way], owners[way], lengths[way] = _draw(road_map, lanes, count)
        # Ways are sorted by their branches, so that the one before has the longest beginning in common.
        parted[way] = _common(road_map, lanes, sequences[way - 1]) if way else -np.inf
    return Ways(points, owners, lengths, parted)


def _draw(
    road_map: RoadMap, lanes: tuple[int, ...], count: int
) -> tuple[Float32[np.ndarray, "n 4"], Int32[np.ndarray, " n"], float]:
    """The points of a way, the lane of each, and its length."""
    lengths = road_map.lengths[list(lanes)].astype(np.float64)
    ends = np.cumsum(lengths)
    arcs = np.minimum(FINE * np.arange(count), ends[-1])
    number = np.minimum(np.searchsorted(ends, arcs, side="right"), len(lanes) - 1)
    points = np.empty((count, 4), np.float32)
    for place, lane in enumerate(lanes):
        own = number == place
        points[own] = road_map.along(lane, arcs[own] - (ends[place] - lengths[place]))
    return points, np.array(lanes, np.int32)[number], float(ends[-1])


def _common(road_map: RoadMap, one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """Metres that two ways have in common at their beginning."""
    same = next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))
    return float(road_map.lengths[list(one[:same])].sum())
