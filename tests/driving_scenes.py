"""A small map and a small log of traffic, made by hand."""

from __future__ import annotations

import numpy as np

from driving.roads import Lane, RoadMap
from driving.scene import COLUMNS, Kind, Light, Log

LIMIT = 10.0
# Indices of the lanes below.
WEST, BESIDE, AHEAD, TURN, EAST, NORTH, AWAY = range(7)


def line(*points: tuple[float, float]) -> np.ndarray:
    return np.array(points, np.float32)


def crossing() -> RoadMap:
    """A road from the west, of two lanes; the right one leads on to the east, or by a left turn to the north.

    The lane `AWAY` comes back from the east, beside `EAST`.
    """
    quarter = np.linspace(0, np.pi / 2, 9)
    turn = np.stack((100 + 20 * np.sin(quarter), 20 - 20 * np.cos(quarter)), 1).astype(np.float32)
    return RoadMap(
        "crossing",
        [
            Lane("west_0", line((0, 0), (100, 0)), 3.0, LIMIT, successors=(AHEAD, TURN), left=BESIDE),
            Lane("west_1", line((0, 3), (100, 3)), 3.0, LIMIT, right=WEST),
            Lane("ahead", line((100, 0), (120, 0)), 3.0, LIMIT, successors=(EAST,), in_junction=True),
            Lane("turn", turn, 3.0, LIMIT / 2, successors=(NORTH,), in_junction=True),
            Lane("east_0", line((120, 0), (200, 0)), 3.0, LIMIT),
            Lane("north_0", line((120, 20), (120, 60), (120, 100)), 3.0, LIMIT),
            Lane("away_0", line((200, 4), (120, 4)), 3.0, LIMIT),
        ],
    )


def log_of(
    tracks: dict[int, list[tuple[float, float, float, float]]],
    *,
    begin: dict[int, int] | None = None,
    lights: dict[int, tuple[int, Light]] | None = None,
    kinds: dict[int, Kind] | None = None,
    road_map: RoadMap | None = None,
) -> Log:
    """A log of cars, 4 m x 2 m, whose (x, y, heading, speed) in each frame are given.

    Args:
        tracks: by agent.
        begin: the frame that an agent appears in, where it is not the first.
        lights: by frame, a lane and its light.
        kinds: of agents that are no cars.
        road_map: to find lanes in.
    """
    begin, lights, kinds = begin or {}, lights or {}, kinds or {}
    frames = max(begin.get(agent, 0) + len(track) for agent, track in tracks.items())
    rows, first = [], [0]
    for frame in range(frames):
        for agent in sorted(tracks):
            place = frame - begin.get(agent, 0)
            if 0 <= place < len(tracks[agent]):
                rows.append((agent, kinds.get(agent, Kind.CAR), *tracks[agent][place]))
        first.append(len(rows))
    table = np.array(rows, np.float64).reshape(-1, 6)
    points, heading = table[:, 2:4], table[:, 4]
    lane = np.full(len(rows), -1) if road_map is None else road_map.nearest(points, heading, within=3.0).lane
    values = {
        **{"first": first, "id": table[:, 0], "kind": table[:, 1], "x": table[:, 2], "y": table[:, 3]},
        **{"heading": heading, "speed": table[:, 5], "acceleration": np.zeros(len(rows)), "lane": lane},
        **{"length": np.full(len(rows), 4.0), "width": np.full(len(rows), 2.0)},
    }
    shown = [lights[frame] for frame in range(frames) if frame in lights]
    return Log(
        "by_hand",
        "crossing",
        **{name: np.asarray(values[name], kind) for name, kind in COLUMNS.items()},
        light_first=np.cumsum([0, *(frame in lights for frame in range(frames))]).astype(np.int64),
        light_lane=np.array([lane for lane, _ in shown], np.int32),
        light=np.array([light for _, light in shown], np.uint8),
    )


def straight(x: float, speed: float, frames: int, y: float = 0.0) -> list[tuple[float, float, float, float]]:
    """A track to the east at constant speed."""
    return [(x + 0.5 * speed * frame, y, 0.0, speed) for frame in range(frames)]
