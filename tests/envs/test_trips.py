"""Logs of moves: which columns are read, what is wrong with rows, and the frame of what models learn in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from config import UserError
from routing.frame import Frame
from routing.logged_costs import LoggedPlaces, logged_costs
from routing.trips import LEAST_MOVES, Log, read_places, read_trips
from routing.tsp import TSPRules

HEADER = "from_x,from_y,to_x,to_y,cost,trip"
GOOD = [f"{move % 7},{move % 5},{move % 3},2,{1 + move % 4},{move // 10}" for move in range(LEAST_MOVES)]
PLACES = "place;x;y\nhome;0;0\nSt. John's;10;0\n12;10;5\n"


def written(folder: Path, lines: Sequence[str], *, name: str = "trips.csv") -> Path:
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def log_of(folder: Path, *lines: str, header: str = HEADER) -> Log:
    return read_trips(written(folder, [header, *lines, *GOOD]), None)


def places_log(folder: Path, *lines: str) -> Log:
    table = written(folder, [PLACES], name="places.csv")
    moves = ["home,12,4" if move % 2 else "12,home,6" for move in range(LEAST_MOVES)]
    return read_trips(written(folder, ["from,to,cost", *lines, *moves]), read_places(table))


def test_read_trips_gives_ends_costs_and_trips(tmp_path: Path):
    log = log_of(tmp_path, "0.5,1e1,-3,4,2.25,monday", "-3,4,0.5,10,7,monday")
    assert log.origin[:2].tolist() == [[0.5, 10.0], [-3.0, 4.0]]
    assert log.target[:2].tolist() == [[-3.0, 4.0], [0.5, 10.0]]
    assert log.cost[:2].tolist() == [2.25, 7.0]
    assert log.trip[0] == log.trip[1] and len(np.unique(log.trip)) == 11
    assert log.faults == () and not log.on_earth and log.ends is None


def test_read_trips_takes_each_move_for_a_trip_where_none_is_told(tmp_path: Path):
    lines = [line.rpartition(",")[0] for line in GOOD]
    log = read_trips(written(tmp_path, [HEADER.removesuffix(",trip"), *lines]), None)
    assert len(np.unique(log.trip)) == LEAST_MOVES


def test_read_trips_takes_other_words_and_an_order_of_its_own(tmp_path: Path):
    lines = ["Cost (s)\tto lon\tto lat\tOrigin_Longitude\tOrigin_Latitude\tdriver"]
    lines += [f"{60 + move}\t25.1\t60.2\t24.9\t60.1\tKim" for move in range(LEAST_MOVES)]
    log = read_trips(written(tmp_path, lines, name="trips.tsv"), None)
    assert log.on_earth and log.origin[0].tolist() == [24.9, 60.1] and log.target[0].tolist() == [25.1, 60.2]


def test_read_trips_takes_decimal_commas(tmp_path: Path):
    lines = [HEADER.replace(",", ";"), *(f"0,5;1;2;3;1,25;{move}" for move in range(LEAST_MOVES))]
    log = read_trips(written(tmp_path, lines), None)
    assert log.origin[0].tolist() == [0.5, 1.0] and log.cost[0] == 1.25


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("1,2,3,4,nan,0", "cost 'nan'"),
        ("1,2,3,4,inf,0", "cost 'inf'"),
        ("1,2,3,4,-1,0", "cost '-1'"),
        ("1,2,3,4,,0", "cost ''"),
        ("1,x,3,4,1,0", "coordinate 'x'"),
        ("1,2,3,1e13,1,0", "coordinate '1e13'"),
        ("1,2,3", "has 3 values"),
    ],
)
def test_read_trips_leaves_bad_rows_out_and_says_why(line: str, cause: str, tmp_path: Path):
    log = log_of(tmp_path, line)
    (fault,) = log.faults
    assert fault.startswith(f"{tmp_path / 'trips.csv'}:2: ") and cause in fault
    assert len(log.cost) == LEAST_MOVES


def test_read_trips_refuses_degrees_beyond_the_earth(tmp_path: Path):
    header = "from_lon,from_lat,to_lon,to_lat,cost,trip"
    log = log_of(tmp_path, "25,95,25,60,1,0", header=header)
    assert "no place on earth" in log.faults[0]


def test_read_trips_finds_places_by_name(tmp_path: Path):
    log = places_log(tmp_path, "home,St. John's,3")
    assert log.ends is not None and log.ends[:2].tolist() == [[0, 1], [2, 0]]
    assert log.target[0].tolist() == [10.0, 0.0]


def test_read_trips_leaves_unknown_places_out(tmp_path: Path):
    log = places_log(tmp_path, "home,nowhere,3")
    assert "there is no place 'nowhere'" in log.faults[0]


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        ([], "holds nothing"),
        (["a,b,c", "1,2,3"], "the columns are 'a', 'b', 'c'"),
        (["from,to,cost", "a,b,1"], "--places FILE"),
        ([HEADER, *GOOD[:99]], "has 99 good moves"),
        ([HEADER, *GOOD, *["x"] * 101], "101 of 201 rows cannot be used"),
        ([HEADER, *(line.rpartition(",")[0] + ",7" for line in GOOD)], "all moves are of one trip"),
    ],
)
def test_read_trips_refuses(lines: list[str], cause: str, tmp_path: Path):
    with pytest.raises(UserError, match=cause):
        read_trips(written(tmp_path, lines), None)


def test_read_trips_refuses_places_beside_positions(tmp_path: Path):
    table = read_places(written(tmp_path, [PLACES], name="places.csv"))
    with pytest.raises(UserError, match="leave --places out"):
        read_trips(written(tmp_path, [HEADER, *GOOD]), table)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("place,x\na,1", "the columns are"),
        ("place,x,y\na,1,2\na,3,4", "'a' a second time"),
        ("place,x,y\na,1,two", "coordinate 'two'"),
        ("place,x,y\n,1,2", "no name"),
        ("place,x,y", "holds no place"),
    ],
)
def test_read_places_refuses(text: str, cause: str, tmp_path: Path):
    with pytest.raises(UserError, match=cause):
        read_places(written(tmp_path, [text], name="places.csv"))


# The frame


def made_log(origin: list[list[float]], target: list[list[float]], cost: list[float], *, on_earth: bool = False) -> Log:
    trip = np.arange(len(cost))
    return Log(np.array(origin), np.array(target), np.array(cost), trip, on_earth, None, None, ())


def frame_around(log: Log) -> Frame:
    return Frame.around(log, learnt=np.ones(len(log.cost), dtype=bool))


def test_frame_puts_the_box_into_the_unit_square_and_mean_costs_at_one_half():
    frame = frame_around(made_log([[10.0, 100.0]], [[30.0, 110.0]], [8.0]))
    assert frame.inside(np.array([[10.0, 100.0], [30.0, 110.0], [20.0, 105.0]])).tolist() == [
        [0.0, 0.0],
        [1.0, 0.5],
        [0.5, 0.25],
    ]
    assert frame.size.tolist() == [1.0, 0.5] and frame.unit == 16.0


def test_frame_shortens_degrees_of_longitude_as_they_are_in_the_middle():
    frame = frame_around(made_log([[24.0, 59.5]], [[25.0, 60.5]], [1.0], on_earth=True))
    assert frame.inside(np.array([25.0, 60.5])) == pytest.approx([0.5, 1.0])


@pytest.mark.parametrize(("target", "cost", "cause"), [([1.0, 2.0], 1.0, "one position"), ([3.0, 2.0], 0.0, "cost 0")])
def test_frame_refuses_what_has_no_size(target: list[float], cost: float, cause: str):
    with pytest.raises(UserError, match=cause):
        frame_around(made_log([[1.0, 2.0]], [target], [cost]))


def test_frame_comes_back_from_its_state(tmp_path: Path):
    frame = frame_around(places_log(tmp_path))
    again = Frame.of(frame.state_dict())
    assert again.names == ("home", "St. John's", "12") and again.unit == frame.unit and not again.on_earth
    for name in ("corner", "scale", "size", "places", "seen"):
        assert np.array_equal(getattr(again, name), getattr(frame, name))


def test_frame_refuses_a_state_that_contradicts_itself(tmp_path: Path):
    state = frame_around(places_log(tmp_path)).state_dict()
    for wrong in ({"names": ["home"]}, {"unit": 0.0}, {"scale": torch.ones(3)}):
        with pytest.raises(UserError, match="contradicts itself"):
            Frame.of({**state, **wrong})


def test_frame_knows_places_by_name(tmp_path: Path):
    frame = frame_around(places_log(tmp_path))
    assert frame.numbers_of(["12", "home"]).tolist() == [2, 0]
    with pytest.raises(UserError, match="'elsewhere' is none of the 3"):
        frame.numbers_of(["elsewhere"])


# The worlds


def test_logged_costs_draw_nodes_in_the_box_alone():
    world = logged_costs(frame_around(made_log([[0.0, 0.0]], [[4.0, 1.0]], [1.0])))
    coords = world.random_nodes(50, 20, generator=torch.Generator().manual_seed(0), device="cpu").coords
    assert coords.amin() >= 0 and 0.9 < coords[..., 0].max() <= 1 and 0.2 < coords[..., 1].max() <= 0.25


def test_logged_places_are_drawn_and_those_never_gone_to_are_known(tmp_path: Path):
    world = logged_costs(frame_around(places_log(tmp_path)))
    assert isinstance(world, LoggedPlaces) and world.unseen_places == (1,)
    nodes = world.random_nodes(4, 3, generator=torch.Generator().manual_seed(0), device="cpu")
    assert nodes.place is not None and nodes.place.sort(-1).values.tolist() == [[0, 1, 2]] * 4
    assert torch.equal(nodes.coords[nodes.place == 2], torch.tensor([[1.0, 0.5]]).expand(4, 2))


def test_logged_costs_are_nobodys_to_tell(tmp_path: Path):
    for log in (log_of(tmp_path), places_log(tmp_path)):
        rules = TSPRules.under(logged_costs(frame_around(log)))
        instance = rules.random(1, 3, generator=torch.Generator().manual_seed(0), device=torch.device("cpu"))
        with pytest.raises(UserError, match="from a log alone"):
            rules.costs.matrix(instance)


def test_logged_costs_are_told_in_the_logs_unit():
    world = logged_costs(frame_around(made_log([[0.0, 0.0]], [[4.0, 1.0]], [30.0])))
    assert "180 in the log's unit" in world.measured(3.0)
