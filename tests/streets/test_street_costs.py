"""The worlds of streets: units, who needs which settings, and the instances that agents are evaluated on."""

from __future__ import annotations

from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from envs.routing import CVRPRules, TSPEnv, TSPRules
from routing import cases
from routing.cases import field_cases
from routing.costs import find_costs
from routing.instances import cheapest_tours, tour_costs
from routing.rules import Rules
from routing.street_costs import StreetCosts, street_costs
from tests.street_scenes import sumo_town, write_town


@pytest.fixture
def town(tmp_path: Path, monkeypatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return str(write_town(tmp_path))


def test_street_costs_are_seconds_in_units_that_make_a_move_cost_a_half(town: str):
    costs = street_costs("streets", town)
    seconds = costs.tables[0] * costs.unit
    # From a corner along the large street, at 60 km/h and 100 m a block.
    assert seconds[0, :6].tolist() == pytest.approx([6 * block for block in range(6)], rel=1e-3)
    assert float(costs.tables.sum()) / (36 * 35) == pytest.approx(0.5)
    assert costs.hidden == 0 and costs.num_places == 36


def test_rush_hides_the_hour(town: str):
    free, rush = street_costs("streets", town), street_costs("rush", town)
    assert rush.hidden == 1 and len(rush.tables) == 8
    assert (rush.tables * rush.unit >= free.tables * free.unit - 1e-3).all()
    # Between morning and evening.
    assert not torch.allclose(rush.tables[1], rush.tables[7], atol=0.01)


def test_places_of_a_town_lie_in_the_unit_square(town: str):
    coords = street_costs("streets", town).coords
    assert coords.amin(0).tolist() == [0, 0] and coords.amax(0).tolist() == pytest.approx([1, 1], abs=1e-3)


def test_streets_of_sumo_know_no_latitudes(tmp_path: Path, town: str):
    (tmp_path / "town.net.xml").write_text(sumo_town(), encoding="utf-8")
    costs = street_costs("streets", str(tmp_path / "town.net.xml"))
    # Two streets along a row, at 100 m and 10 m/s each.
    assert float(costs.tables[0, 0, 2] * costs.unit) == pytest.approx(20)
    x_and_y = costs.locate(np.array([[0.34, 0.0], [1.0, 1.0]]), are_degrees=False, place=None)
    assert x_and_y.coords[0, 0].tolist() == pytest.approx([1 / 3, 0.0])
    with pytest.raises(ValueError, match="streets of SUMO do not say where on earth they are"):
        costs.locate(np.array([[60.0, 25.0]]), are_degrees=True, place=None)


@pytest.mark.parametrize(
    ("name", "streets", "message"),
    [
        ("streets", "", "cost streets needs streets: add --streets helsinki, or --streets FILE for a map"),
        ("rush", "", "cost rush needs streets"),
        ("lanes", "helsinki", "streets is 'helsinki', and cost lanes has none: choose cost streets or rush"),
        ("streets", "nowhere.osm.pbf", "nowhere.osm.pbf cannot be read: No such file"),
        ("avenues", "", "choose one of euclidean, .*, streets, rush, or your own"),
    ],
)
def test_costs_without_their_streets_are_refused(name: str, streets: str, message: str):
    with pytest.raises(ValueError, match=message):
        find_costs(name, streets=streets)


def test_tsp_env_drives_along_streets(town: str):
    env = TSPEnv(num_nodes=5, cost="streets", streets=town)
    obs, _ = env.reset(seed=1)
    _, reward, *_ = env.step(3)
    costs = env.rules.costs
    assert isinstance(costs, StreetCosts)
    assert reward == pytest.approx(-float(costs.tables[0, obs["place"][0], obs["place"][3]]))


def regrets(rules: type[Rules], found: cases.Cases) -> np.ndarray:
    true = rules.costs.matrix(found.instance, found.factors).double().numpy()
    average = rules.costs.mean_matrix(found.instance).double().numpy()
    return tour_costs(true, cheapest_tours(average)) / tour_costs(true, cheapest_tours(true)) - 1


@pytest.mark.parametrize("problem", [TSPRules, CVRPRules])
def test_cases_of_rush_punish_who_does_not_know_the_hour(problem: type[Rules], town: str):
    rules = problem.under(street_costs("rush", town))
    found = field_cases(rules, 6, 8, seed=4321)
    assert len(found.instance.place) == 6 and (regrets(rules, found) >= 0.03).all()


def test_cases_of_rush_are_the_first_of_more_that_are_such(town: str, monkeypatch):
    rules = TSPRules.under(street_costs("rush", town))
    few, more = field_cases(rules, 3, 8, seed=4321), field_cases(rules, 20, 8, seed=4321)
    assert few.instance.place.equal(more.instance.place[:3])
    assert few.factors is not None and more.factors is not None and few.factors.equal(more.factors[:3])
    every = cases._first(rules, 100, 8, seed=4321)
    telling = np.flatnonzero(regrets(rules, every) >= 0.03)
    assert every.instance.place[telling[:3]].equal(few.instance.place)


def test_worlds_that_hide_too_little_are_refused(town: str, monkeypatch):
    monkeypatch.setattr(cases, "LOOKED_AT", 20)
    monkeypatch.setattr(cases, "MOST_LOOKED_AT", 2)
    monkeypatch.setattr("routing.street_costs.LEAST_REGRET", 5.0)
    rules = TSPRules.under(street_costs("rush", town))
    with pytest.raises(ValueError, match="costs of rush hide too little here: of 40 instances of 6 nodes, 0 have"):
        field_cases(rules, 3, 6, seed=0)


@pytest.mark.parametrize("name", ["streets", "rush"])
def test_tsp_env_of_streets_passes_the_gymnasium_checker(name: str, town: str):
    check_env(gymnasium.make("TSP-v0", num_nodes=5, cost=name, streets=town).unwrapped, skip_render_check=True)
