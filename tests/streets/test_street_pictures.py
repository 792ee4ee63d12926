"""Tours drawn along the streets that they drive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import street_tours
from envs.routing import TSPInstance
from routing import drawing, street_costs
from routing.costs import EUCLIDEAN
from routing.street_costs import StreetCosts
from streets.network import Network
from streets.reading import read_network

LEG = np.array([0x4C, 0x8B, 0xC0])


@pytest.fixture
def rush(town: Path) -> StreetCosts:
    return street_costs.street_costs("rush", str(town))


def leg_pixels(image: np.ndarray) -> int:
    return int((image == LEG).all(-1).sum())


def test_draw_streets_shows_the_way_there_and_back(town: Path):
    network = read_network(town)
    short, long = (drawing.draw_streets(network, [np.array([0, end])], titles=[""]) for end in (1, 5))
    assert short.shape[2] == 3 and short.dtype == np.uint8
    assert leg_pixels(long) > 4 * leg_pixels(short) > 0


def test_draw_streets_follows_the_streets_that_are_quickest(town: Path):
    network = read_network(town)
    # To the next place, but not by the street that leads there.
    closed = np.where((network.tails == 0) & (network.heads == 1), 1e6, network.free_flow)
    direct, around = (
        drawing.draw_streets(network, [np.array([0, 1])], titles=[""], seconds=seconds)
        for seconds in (network.free_flow, closed)
    )
    assert leg_pixels(around) > 2 * leg_pixels(direct)


def test_draw_streets_draws_tours_side_by_side(town: Path):
    network, tour = read_network(town), np.array([0, 5])
    one, two = (drawing.draw_streets(network, [tour] * count, titles=["x"] * count) for count in (1, 2))
    assert two.shape[1] == pytest.approx(2 * one.shape[1], abs=1)


@pytest.mark.parametrize(("factor", "table"), [(0.0, 0), (0.13, 1), (0.9, 7), (0.95, 0)])
def test_picture_of_rush_is_of_the_nearest_hour(factor: float, table: int, rush: StreetCosts, monkeypatch):
    asked: dict[str, Any] = {}

    def note(_network: Network, tours: Any, **named: Any) -> np.ndarray:
        asked.update(named, tours=tours)
        return np.zeros((1, 1, 3), np.uint8)

    monkeypatch.setattr(street_costs, "draw_streets", note)
    instance = TSPInstance(torch.rand(1, 3, 2), place=torch.tensor([[7, 5, 3]]))
    rush.picture(instance, np.array([0, 2, 1]), title="", factors=torch.tensor([[factor]]))
    assert np.array_equal(asked["seconds"], rush.seconds[table])
    assert asked["tours"][0].tolist() == [7, 3, 5]


def test_picture_of_other_worlds_is_of_straight_legs():
    coords, tour = torch.rand(1, 5, 2), np.arange(5)
    picture = EUCLIDEAN.picture(TSPInstance(coords), tour, title="a tour")
    assert np.array_equal(picture, drawing.draw_tour(coords[0].numpy(), tour, title="a tour"))


def test_costs_of_streets_are_measured_in_minutes(rush: StreetCosts):
    assert rush.measured(120 / rush.unit) == " (2.0 min)"
    assert EUCLIDEAN.measured(3.0) == ""


def test_street_tours_draws_the_shortest_beside_the_quickest(tmp_path: Path, capsys):
    street_tours.main(["--streets", "helsinki", "--nodes", "6", "--out", str(tmp_path)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "streets.png")
    assert (tmp_path / "streets.png").stat().st_size > 1000
