"""Runs that are judged on streets which they have learnt nothing of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces

import dreamer
from envs.routing import TSPRules
from envs.vector import RoutingVectorEnv
from imagining.routing_model import RoutingModel
from routing.costs import find_costs
from routing.street_costs import StreetCosts
from settings.dreamer import ModelSettings
from tests.run_scenes import CPU, train
from tests.scenes import NODES, debug_config, generator, place_costs, routing
from tests.street_scenes import sumo_street, sumo_text, sumo_town

HOME = place_costs()
FOREIGN = replace(HOME, foreign=True)
PLANNING = (
    "--act",
    "plan",
    "--eval_by",
    "plan",
    "--imag_policy",
    "0",
    "--valid_instances",
    "4",
    "--eval_instances",
    "4",
)
STREETS = ("--cost", "streets", "--streets", "helsinki")


def write_sumo(folder: Path) -> str:
    path = folder / "elsewhere.net.xml"
    path.write_text(sumo_town(), encoding="utf-8")
    return str(path)


def test_foreign_places_cost_what_they_do_at_home_and_are_unknown():
    home, foreign = (TSPRules.under(each).field_instances(8, NODES, seed=3) for each in (HOME, FOREIGN))
    assert home.place is not None and foreign.place is not None
    assert torch.equal(foreign.place, -1 - home.place) and int(foreign.place.max()) < 0
    torch.testing.assert_close(FOREIGN.matrix(foreign), HOME.matrix(home))
    origin, target = (torch.full((8,), node) for node in (0, 2))
    torch.testing.assert_close(FOREIGN.between(foreign, origin, target), HOME.between(home, origin, target))
    FOREIGN.validate(foreign)
    with pytest.raises(ValueError, match="place 15 lies outside 0..14"):
        FOREIGN.validate(foreign._replace(place=foreign.place * 0 + 15))


def test_foreign_places_are_below_0_in_every_observation():
    env = RoutingVectorEnv(
        TSPRules.under(FOREIGN), num_envs=3, num_nodes=NODES, device=CPU, generator=generator(), check_actions=True
    )
    assert int(env.reset()[0]["place"].max()) < 0
    space = FOREIGN.observation_space(spaces.Dict({}), NODES)
    assert isinstance(space, spaces.Dict)
    shown = env.reset()[0]["place"].numpy()
    assert all(space["place"].contains(row) for row in shown) and not space["place"].contains(shown[0] + 15)


def test_foreign_average_costs_are_those_at_home():
    home, foreign = place_costs(tables=3), replace(place_costs(tables=3), foreign=True)
    cases = (TSPRules.under(each).field_instances(4, NODES, seed=3) for each in (home, foreign))
    one, other = (costs.mean_matrix(each) for costs, each in zip((home, foreign), cases, strict=True))
    torch.testing.assert_close(one, other)


def test_model_of_other_places_reads_foreign_ones_as_unknown():
    model = RoutingModel(routing(HOME), ModelSettings.of(debug_config()))
    head = model.heads["reward"]
    with torch.no_grad():
        for part in head.parameters():
            part.normal_(generator=generator())
    foreign = TSPRules.under(FOREIGN).field_instances(4, NODES, seed=3)
    shown = foreign._replace(coords=foreign.coords.float())
    nowhere = shown._replace(place=torch.full_like(foreign.place, -1))
    told = shown._replace(place=-1 - foreign.place)
    expected, known = (model.predict_moves(each, None) for each in (nowhere, told))
    torch.testing.assert_close(model.predict_moves(shown, None), expected)
    assert not torch.allclose(known, expected)


def test_same_streets_are_no_foreign_ones(tmp_path: Path):
    home, again, elsewhere = (
        find_costs("streets", streets=each) for each in ("helsinki", "helsinki", write_sumo(tmp_path))
    )
    assert isinstance(home, StreetCosts) and isinstance(again, StreetCosts) and isinstance(elsewhere, StreetCosts)
    assert again.seen_from(home) is again
    seen = elsewhere.seen_from(home)
    assert seen.foreign and seen.num_places == 16 and not elsewhere.foreign


def test_pictures_of_foreign_streets_are_those_of_the_same_places(tmp_path: Path):
    costs = find_costs("streets", streets=write_sumo(tmp_path))
    tour = np.arange(NODES)
    assert isinstance(costs, StreetCosts)
    pictures = []
    for each in (costs, replace(costs, foreign=True)):
        instance = TSPRules.under(each).field_instances(1, NODES, seed=3)
        pictures.append(each.picture(instance, tour, title="tour"))
    assert np.array_equal(pictures[0], pictures[1])


@pytest.mark.run
def test_run_is_judged_on_another_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run, elsewhere = tmp_path / "run", write_sumo(tmp_path)
    train(run, *PLANNING, *STREETS, "--steps", "200")
    capsys.readouterr()
    dreamer.main(["--evaluate", str(run), "--streets", elsewhere])
    told = capsys.readouterr()
    assert "4 instances" in told.out
    (line,) = told.err.splitlines()
    assert f"places of {elsewhere} are unknown to the run" in line
    dreamer.main(["--evaluate", str(run), "--streets", "helsinki"])
    at_home = capsys.readouterr()
    dreamer.main(["--evaluate", str(run)])
    assert at_home == capsys.readouterr() and at_home.err == "" and at_home.out != told.out


@pytest.mark.run
def test_run_without_streets_is_judged_on_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train(tmp_path / "run", *PLANNING, "--cost", "lanes", "--steps", "200")
    with pytest.raises(SystemExit):
        dreamer.main(["--evaluate", str(tmp_path / "run"), "--streets", write_sumo(tmp_path)])
    assert "and cost lanes has none: choose cost streets or rush" in capsys.readouterr().err


@pytest.mark.run
def test_map_with_fewer_places_than_an_instance_has_nodes_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run, small = tmp_path / "run", tmp_path / "small.net.xml"
    train(run, *PLANNING, *STREETS, "--steps", "200")
    streets = [sumo_street(f"{begin}{end}", (begin, end)) for begin, end in ("ab", "bc", "ca")]
    ring = {"a": (0.0, 0.0), "b": (100.0, 0.0), "c": (100.0, 100.0)}
    small.write_text(sumo_text(ring, *streets), encoding="utf-8")
    with pytest.raises(SystemExit):
        dreamer.main(["--evaluate", str(run), "--streets", str(small)])
    assert "an instance has 6 nodes, and streets has 3 places" in capsys.readouterr().err
