"""Answers of runs that learnt to drive."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from config import UserError
from routing.costs import find_costs
from routing.files import RoutingInstance, read_instances
from routing.metrics import EXACT, GREAT_CIRCLE, SECONDS
from routing.tsp import TSPInstance, TSPRules
from solving import writing
from solving.intervals import Forecast
from solving.worlds import in_world
from streets.network import projected
from tests.answer_scenes import (
    forecaster,
    make_agent,
    solved,
    write_csv,
)

STREETS = {"cost": "streets", "streets": "helsinki"}


def street_rules():
    return TSPRules.under(find_costs("streets", streets="helsinki"))


def places(instance: RoutingInstance) -> list[int]:
    found = in_world(street_rules(), instance).place
    assert found is not None
    return found.tolist()


def test_places_are_read_from_a_column(tmp_path):
    (alone,) = read_instances(write_csv(tmp_path / "a.csv", "place", [[3], [0], [7]]))
    (named,) = read_instances(write_csv(tmp_path / "b.csv", "stop,place", [["a", 3], ["b", 0], ["c", 7]]))
    (beside,) = read_instances(write_csv(tmp_path / "c.csv", "place,x,y", [[3, 1, 2], [0, 2, 3], [7, 5, 5]]))
    (tmp_path / "d.json").write_text('[{"place": 3}, {"place": 0}, {"place": 7}]')
    (listed,) = read_instances(tmp_path / "d.json")
    for each in (alone, named, beside, listed):
        assert each.place is not None and each.place.tolist() == [3, 0, 7]
    assert alone.coords.shape == (3, 0) and beside.coords.tolist() == [[1, 2], [2, 3], [5, 5]]


@pytest.mark.parametrize("first", ["Ayr", "7"])
def test_column_of_names_is_no_column_of_places(tmp_path, first: str):
    (found,) = read_instances(write_csv(tmp_path / "a.csv", "place,x,y", [[first, 1, 2], ["Bath", 2, 3]]))
    assert found.place is None and found.coords.tolist() == [[1, 2], [2, 3]]


def test_places_cost_seconds_of_driving():
    rules = street_rules()
    instance = RoutingInstance("own", "tsp", np.zeros((4, 0)), EXACT, place=np.array([3, 0, 20, 11]))
    found = in_world(rules, instance)
    world: Any = rules.costs
    np.testing.assert_allclose(found.cost_matrix(), world.unit * world.tables[0][found.place][:, found.place])
    assert found.metric == SECONDS
    (solution,) = solved(make_agent(**STREETS), [instance])
    assert writing.answers.length_text(solution.length, found.metric).endswith(" s")


def test_latitudes_and_longitudes_stand_for_the_nearest_places():
    world: Any = street_rules().costs
    chosen = np.array([5, 30, 12])
    metres = world.network.points[world.network.places[chosen]] + 3.0
    ((east, north),) = projected(world.network.middle[None] + 1.0, world.network.middle)
    degrees = world.network.middle + metres / (east, north)
    instance = RoutingInstance("own", "tsp", degrees[:, ::-1], GREAT_CIRCLE)
    assert places(instance) == chosen.tolist()
    with pytest.raises(UserError, match="km from the nearest place of the streets"):
        in_world(street_rules(), instance._replace(coords=degrees[:, ::-1] + 0.1))


def test_positions_in_the_unit_square_stand_for_the_nearest_places():
    world: Any = street_rules().costs
    coords = world.coords[[5, 30, 12]].double().numpy()
    assert places(RoutingInstance("own", "tsp", coords, EXACT)) == [5, 30, 12]
    with pytest.raises(UserError, match="lie in the unit square"):
        in_world(street_rules(), RoutingInstance("own", "tsp", coords + 3, EXACT))


def test_places_that_there_are_not_are_refused():
    instance = RoutingInstance("own", "tsp", np.zeros((2, 0)), EXACT, place=np.array([3, 36]))
    with pytest.raises(UserError, match="has place 36; streets has 0 to 35"):
        in_world(street_rules(), instance)


def test_two_nodes_at_one_place_have_no_way_between_them():
    instance = RoutingInstance("own", "tsp", np.zeros((4, 0)), EXACT, place=np.array([3, 7, 20, 3]))
    (solution,) = solved(make_agent(**STREETS), [instance])
    matrix = forecaster(**STREETS).matrices(
        TSPInstance(torch.from_numpy(solution.instance.coords)[None].float(), place=torch.tensor([[3, 7, 20, 3]]))
    )
    assert matrix[0, 0, 3] == 0.0 and solution.instance.cost_matrix()[0, 3] == 0.0


def test_picture_of_an_answer_in_streets_follows_them(monkeypatch):
    drawn: dict[str, Any] = {}

    def draw(network, tours, **texts):
        drawn.update(texts, places=tours[0].tolist())
        return np.zeros((2, 2, 3), np.uint8)

    monkeypatch.setattr("routing.street_costs.draw_streets", draw)
    instance = RoutingInstance("own", "tsp", np.zeros((3, 0)), EXACT, place=np.array([3, 7, 20]))
    (solution,) = solved(make_agent(**STREETS), [instance])
    solution = solution._replace(length=441.25, forecast=Forecast(400.0, 343.72, 468.7))
    writing.picture_of(solution, street_rules().costs)
    assert drawn["places"] == [[3, 7, 20][node] for node in solution.tour]
    assert drawn["titles"] == ["own: expected 343.7 to 468.7 s"]
    assert drawn["note"] == "in truth 441.2 s; exact search by the model's costs"
