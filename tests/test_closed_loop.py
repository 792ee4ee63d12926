"""Planners in the closed loop: what an episode comes to, what many do, and the program that compares them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

import dreamer
from benchmarks import closed_loop as program
from driving.baselines import PLANNERS, Observation
from driving.candidates import FREE, MODES, action_mask
from driving.features import FEATURES
from driving.lines import POINTS, SPACING
from envs.closed_loop import Outcome, play, summary
from envs.driving import DriveEnv

OUTCOME = Outcome(
    seed=1,
    map_name="ingolstadt",
    steps=40,
    metres=100.0,
    end="time",
    own_fault=False,
    discomfort=0.1,
    total=10.0,
    seconds=0.002,
)


def stand(obs: Observation) -> int:
    return FREE


def test_a_summary_by_hand():
    own = [OUTCOME, OUTCOME._replace(seed=2, metres=60.0)]
    planner = [
        OUTCOME._replace(metres=20.0, end="contact", own_fault=True, total=-5.0),
        OUTCOME._replace(seed=2, metres=60.0, discomfort=0.3, seconds=0.004),
    ]
    found = summary(planner, own)
    assert found.progress == pytest.approx(0.5) and found.own_fault == 0.5 and found.other_contact == 0
    assert (found.discomfort, found.total, found.milliseconds) == pytest.approx((0.2, 2.5, 3.0))
    other = summary([OUTCOME._replace(end="contact"), OUTCOME._replace(seed=2, end="off_road")], own)
    assert (other.own_fault, other.other_contact, other.off_road) == (0, 0.5, 0.5)


def test_other_episodes_are_not_compared():
    with pytest.raises(AssertionError, match="other episodes"):
        summary([OUTCOME], [OUTCOME._replace(seed=2)])


def ahead_of(metres: float) -> dict[str, np.ndarray]:
    """What an ego sees at 8 m/s on a straight line, with somebody who stands so far ahead."""
    obs: dict[str, np.ndarray] = {name: np.zeros(feature.shape, feature.dtype) for name, feature in FEATURES.items()}
    obs["ego"][:] = 8, 0, 0, 4, 2, 14
    obs["lines"][0, :, 0] = SPACING * np.arange(POINTS)
    obs["lines"][0, :, 2] = 1
    obs["lines_valid"][0] = True
    obs["agents"][0, -1] = metres, 0, 1, 0, 0, 0, 4, 2
    obs["agents_valid"][0, -1] = True
    obs["action_mask"][:] = action_mask(obs["lines_valid"][None])[0]
    return obs


def test_a_dreamer_that_is_careful_chooses_anew_among_what_is_free_or_brakes(monkeypatch: pytest.MonkeyPatch):
    def fastest_of_line(obs: Observation, state: Any) -> tuple[int, Any]:
        told.append((obs["action_mask"], state))
        return int(np.flatnonzero(obs["action_mask"][:MODES])[-1]), len(told)

    told: list[tuple[np.ndarray, Any]] = []
    monkeypatch.setattr(dreamer, "load", lambda _run: fastest_of_line)
    plain, careful = program.DreamingDriver("run"), program.DreamingDriver("run", caution=3.0)
    near, far, close = ahead_of(18.0), ahead_of(80.0), ahead_of(7.0)
    assert plain(near) == MODES - 1 and careful(far) == MODES - 1 and len(told) == 2
    # Chosen again from the state that the first choice was made from, which counts as never made.
    slower = careful(near)
    assert isinstance(slower, int) and 0 <= slower < MODES - 1
    assert [state for _, state in told[1:]] == [None, 2, 2] and not told[3][0][MODES - 1]
    assert told[3][0].sum() < told[2][0].sum()
    braked = careful(close)
    assert isinstance(braked, np.ndarray) and braked[-1, 0] == pytest.approx(8**2 / 12, abs=0.1)


class Counting:
    """Counts the observations of its episode."""

    def __init__(self) -> None:
        self.count, self.counts = 0, list[int]()

    def begin(self) -> None:
        self.count = 0

    def __call__(self, obs: Observation) -> int:
        self.count += 1
        self.counts.append(self.count)
        return FREE


def test_who_remembers_an_episode_forgets_it_before_the_next():
    info = {"metres": 1.0, "end": "time", "own_fault": False, "discomfort": 0.0}
    env, planner = Mock(spec=DriveEnv, map_name="nowhere", ride=Mock(step=3)), Counting()
    env.reset.return_value = {}, {}
    env.step.side_effect = [({}, 0.5, False, last, info) for last in (False, False, True)] * 2
    outcomes = [play(env, planner, seed) for seed in (1, 2)]
    assert planner.counts == [1, 2, 3, 1, 2, 3]
    assert [one.total for one in outcomes] == [1.5, 1.5]


@pytest.mark.run
def test_the_program_compares_planners_in_the_same_episodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("libsumo")
    path, mine = tmp_path / "figures.json", "tests.test_closed_loop:stand"
    program.main([mine, "constant_velocity", "--episodes", "1", "--maps", "ingolstadt", "--out", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1 episodes on ingolstadt; SUMO's own driver makes ")
    assert [line.split(" | ")[0] for line in lines[3:]] == ["| SUMO's own driver", f"| {mine}", "| constant_velocity"]
    assert lines[3].startswith("| SUMO's own driver | 100.0 |")
    (own,), (standing,), (straight,) = json.loads(path.read_text()).values()
    assert own["seed"] == standing["seed"] == straight["seed"] == program.FIRST_SEED
    # Who brakes at once makes fewer metres than who drives.
    assert standing["metres"] < own["metres"] and own["map_name"] == "ingolstadt"


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (
            ["nobody"],
            "there is no planner 'nobody'; there are constant_velocity, idm, idm_by_candidate, folders of runs",
        ),
        (["nowhere:at_all"], "planner nowhere:at_all cannot be had: No module named 'nowhere'"),
        (["."], ". has no checkpoint yet"),
        (["dreamer:nowhere"], "nowhere does not exist; give a run's folder"),
        (["json:at_all"], "planner json:at_all cannot be had"),
        (["idm", "--episodes", "0"], "--episodes is 0; 1 at least"),
        (["idm", "--maps", "atlantis"], "there is no map 'atlantis'; there are ingolstadt, "),
    ],
)
def test_mistakes_are_told_in_a_line(arguments: list[str], fault: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as error:
        program.main(arguments)
    assert error.value.code == 2 and f"benchmarks.closed_loop: {fault}" in capsys.readouterr().err
    assert "idm" in PLANNERS
