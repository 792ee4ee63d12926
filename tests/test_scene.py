"""Maps of lanes and logs of traffic: what is near, who is where, and files of both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from driving.roads import PIECE_METRES, Lane, RoadMap
from driving.scene import Light, Log
from system import arrays
from system.errors import UserError
from tests.driving_scenes import AHEAD, AWAY, BESIDE, NORTH, TURN, WEST, crossing, line, log_of, straight


def nearest(road_map: RoadMap, x: float, y: float, heading: float, within: float = 3.0) -> tuple[int, float, float]:
    found = road_map.nearest(np.array([[x, y]]), np.array([heading]), within=within)
    return int(found.lane[0]), float(found.arc[0]), float(found.offset[0])


def test_nearest_finds_lane_arc_and_side():
    road_map = crossing()
    assert nearest(road_map, 42.0, 1.0, 0.0) == pytest.approx((WEST, 42.0, 1.0), abs=1e-4)
    assert nearest(road_map, 42.0, 2.5, 0.0) == pytest.approx((BESIDE, 42.0, -0.5), abs=1e-4)


def test_nearest_heeds_where_a_lane_leads():
    road_map = crossing()
    assert nearest(road_map, 150.0, 2.5, np.pi) == pytest.approx((AWAY, 50.0, 1.5), abs=1e-4)
    assert nearest(road_map, 150.0, 2.5, 0.0)[0] != AWAY
    # At the beginning of both, the way that a car is turned decides.
    assert nearest(road_map, 112.0, 2.0, 0.0)[0] == AHEAD
    assert nearest(road_map, 112.0, 3.5, 0.6)[0] == TURN


def test_nearest_finds_nothing_far_off():
    found = crossing().nearest(np.array([[50.0, -3.5], [50.0, -2.5]]), np.zeros(2), within=3.0)
    assert found.lane.tolist() == [-1, WEST]
    assert [column[0] for column in found[1:]] == [0, 0, 0]


def test_nearest_agrees_with_the_distance_to_all_segments():
    road_map, rng = crossing(), np.random.default_rng(0)
    points = rng.uniform((-5, -5), (205, 30), (300, 2))
    found = road_map.nearest(points, np.zeros(300), within=4.0)
    segments = [ends for lane in road_map.lanes for ends in zip(lane.points[:-1], lane.points[1:], strict=True)]

    def score(point: np.ndarray) -> tuple[float, float]:
        """The nearest lane's distance, with what its heading costs, and without."""
        scores = []
        for begin, end in segments:
            step = end - begin
            share = np.clip((point - begin) @ step / (step @ step), 0, 1)
            distance = float(np.linalg.norm(point - begin - share * step))
            if distance <= 4.0:
                scores.append((distance + 4.0 * (1 - step[0] / np.linalg.norm(step)), distance))
        return min(scores, default=(np.inf, np.inf))

    expected = np.array([score(point) for point in points])
    assert ((found.lane >= 0) == np.isfinite(expected[:, 0])).mean() > 0.99
    both = (found.lane >= 0) & np.isfinite(expected[:, 0])
    assert 50 < both.sum() < 250
    on_lane = np.array([road_map.along(int(found.lane[i]), found.arc[i : i + 1])[0, :2] for i in np.flatnonzero(both)])
    # A turn's pieces cut its corners by some centimetres.
    apart = np.abs(np.linalg.norm(points[both] - on_lane, axis=1) - expected[both, 1])
    assert np.quantile(apart, 0.95) < 0.1


def test_along_gives_points_and_headings():
    road_map = crossing()
    found = road_map.along(NORTH, np.array([0.0, 50.0, 100.0]))
    assert found == pytest.approx(np.array([[120, 20, 0, 1], [120, 70, 0, 1], [120, 100, 0, 1]]), abs=1e-6)


def test_pieces_cover_each_lane():
    road_map = crossing()
    own = road_map.pieces[road_map.piece_lane == WEST]
    assert len(own) == np.ceil(100 / PIECE_METRES) and own[0, 0, :2].tolist() == [0, 0]
    assert own[-1, -1] == pytest.approx([100, 0, 1, 0, 10])
    assert own[1:, 0, :2] == pytest.approx(own[:-1, -1, :2])
    assert road_map.piece_arc[road_map.piece_lane == WEST] == pytest.approx(np.arange(6) * 100 / 6)


@pytest.mark.parametrize(
    ("lane", "fault"),
    [
        (Lane("a", line((0, 0)), 3.0, 10.0), "two points at least"),
        (Lane("a", line((0, 0), (np.nan, 1)), 3.0, 10.0), "all finite"),
        (Lane("a", line((0, 0), (1, 0), (1, 0)), 3.0, 10.0), "same point twice"),
        (Lane("a", line((0, 0), (1, 0)), 3.0, 10.0, successors=(1,)), "leads to a lane that there is not"),
        (Lane("a", line((0, 0), (1, 0)), 3.0, 10.0, left=3), "leads to a lane that there is not"),
    ],
)
def test_a_lane_that_cannot_be_driven_is_refused(lane: Lane, fault: str):
    with pytest.raises(UserError, match=fault):
        RoadMap("broken", [lane])


def test_a_map_without_lanes_is_refused():
    with pytest.raises(UserError, match="map empty has no lanes"):
        RoadMap("empty", [])


def test_a_map_is_read_as_it_was_written(tmp_path: Path):
    road_map = crossing()
    road_map.save(tmp_path / "map.npz")
    found = RoadMap.load(tmp_path / "map.npz")
    assert found.name == "crossing" and (found.pieces == road_map.pieces).all()
    for ours, theirs in zip(road_map.lanes, found.lanes, strict=True):
        assert (ours.points == theirs.points).all()
        assert ours._replace(points=theirs.points) == theirs


def test_rows_and_tracks_of_a_log():
    log = log_of({7: straight(0, 10, 3), 3: straight(50, 10, 2)}, begin={3: 1})
    assert log.frames == 3 and log.seconds == 1.0 and log.ids.tolist() == [3, 7]
    assert log.id[log.rows(1)].tolist() == [3, 7]
    assert log.x[log.track(7)].tolist() == [0, 5, 10] and log.frame[log.track(3)].tolist() == [1, 2]
    assert log.track(4).tolist() == []


def test_find_gives_rows_or_none():
    log = log_of({7: straight(0, 10, 3), 3: straight(50, 10, 2)}, begin={3: 1})
    agents, frames = np.array([7, 7, 3, 3, 5, 9, 7, 7]), np.array([0, 2, 0, 2, 1, 1, -1, 3])
    found = log.find(agents, frames)
    assert (found >= 0).tolist() == [True, True, False, True, False, False, False, False]
    assert log.x[found[[0, 1, 3]]].tolist() == [0, 10, 55]


def test_lights_of_a_frame():
    log = log_of({1: straight(0, 10, 3)}, lights={1: (TURN, Light.RED)})
    assert [len(log.lights(frame)[0]) for frame in range(3)] == [0, 1, 0]
    lane, light = log.lights(1)
    assert lane.tolist() == [TURN] and light.tolist() == [Light.RED]


def test_a_log_is_read_as_it_was_written(tmp_path: Path):
    log = log_of({7: straight(0, 10, 3), 3: straight(50, 10, 2)}, lights={1: (TURN, Light.AMBER)})
    for name in ("one", "two"):
        log.save(tmp_path / f"{name}.npz")
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    found = Log.load(tmp_path / "one.npz")
    assert found.name == "by_hand" and found.map_name == "crossing"
    for name in ("first", "id", "kind", "x", "speed", "lane", "light_first", "light_lane", "light"):
        assert getattr(found, name).dtype == getattr(log, name).dtype
        assert (getattr(found, name) == getattr(log, name)).all()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"x": None}, "it has no x"),
        ({"x": np.zeros(2, np.float32)}, "has 2 rows, and id 3"),
        ({"speed": np.full(3, np.nan, np.float32)}, "speed has a number that is not finite"),
        ({"first": np.array([0, 1, 2, 4])}, "first does not lead from 0 to the 3 rows of id"),
        ({"lane": np.zeros(3, np.int64)}, "lane is int64 of 1 axes, and not int32 of one"),
        ({"light_first": np.array([0, 0])}, "of different lengths"),
    ],
)
def test_what_is_no_log_is_told_in_a_line(change: dict[str, np.ndarray | None], fault: str, tmp_path: Path):
    log_of({7: straight(0, 10, 3)}).save(tmp_path / "log.npz")
    stored = {name: array for name, array in {**arrays.read(tmp_path / "log.npz"), **change}.items()}
    arrays.write(tmp_path / "log.npz", {name: array for name, array in stored.items() if array is not None})
    with pytest.raises(UserError, match=f"holds no log of traffic: .*{fault}"):
        Log.load(tmp_path / "log.npz")


@pytest.mark.parametrize("kind", [Log, RoadMap])
def test_another_file_is_told_in_a_line(kind: type[Log] | type[RoadMap], tmp_path: Path):
    (tmp_path / "other.npz").write_text("nothing")
    with pytest.raises(UserError, match="other.npz is damaged, or no .npz file"):
        kind.load(tmp_path / "other.npz")
