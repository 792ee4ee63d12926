"""Trajectories that would run into somebody: when, and that a careful planner passes them over."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from driving.candidates import ACTIONS
from driving.caution import SPARE_LENGTH, careful, seconds_to_contact
from driving.features import FEATURES
from driving.scene import STEP
from driving.vehicle import braked
from imitation.decoder import Plans
from imitation.driver import TrainedPlanner

CPU = torch.device("cpu")


def observed(*others: tuple[float, float, float, float]) -> dict[str, np.ndarray]:
    """What an ego of 4 m x 2 m sees of others of that size, by (x, y, heading, speed)."""
    obs: dict[str, np.ndarray] = {name: np.zeros(feature.shape, feature.dtype) for name, feature in FEATURES.items()}
    obs["ego"][3:5] = 4, 2
    for place, (x, y, heading, speed) in enumerate(others):
        cos, sin = np.cos(heading), np.sin(heading)
        obs["agents"][place, -1] = x, y, cos, sin, speed * cos, speed * sin, 4, 2
        obs["agents_valid"][place, -1] = True
    obs["action_mask"][:] = True
    return obs


def ahead(speed: float, steps: int = 16) -> np.ndarray:
    """A trajectory straight on."""
    seconds = STEP * np.arange(1, steps + 1)
    return np.stack((speed * seconds, 0 * seconds, 0 * seconds), 1)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        # 16 m between the bumpers, and 0.4 m less are left of them for caution and more for slack.
        ((20.0, 0.0, 0.0, 0.0), 1.6),
        # Half as fast, it is reached in twice the time.
        ((20.0, 0.0, 0.0, 5.0), 3.2),
        ((20.0, 0.0, 0.0, 10.0), np.inf),
        ((20.0, 2.5, 0.0, 0.0), np.inf),
        # From the side it is there when the ego is.
        ((20.0, -20.0, np.pi / 2, 10.0), 1.8),
        # Who comes from behind runs into the ego, and not the ego into it.
        ((-8.0, 0.0, 0.0, 20.0), np.inf),
    ],
)
def test_seconds_to_contact(other: tuple[float, float, float, float], expected: float):
    found = seconds_to_contact(observed(other), ahead(10.0)[None])
    assert found == pytest.approx([expected], abs=0.101)


def test_who_stands_is_at_no_fault():
    crossing = observed((0.0, -6.0, np.pi / 2, 4.0))
    assert seconds_to_contact(crossing, np.stack((ahead(0.0), ahead(2.0)))).tolist()[0] == np.inf
    assert seconds_to_contact(crossing, ahead(2.0)[None])[0] < 3


def test_who_creeps_does_not_stand():
    # SUMO's cars keep 2.5 m from one another; a trajectory of centimetres a second would use that up.
    assert seconds_to_contact(observed((4.4, 0.0, 0.0, 0.0)), ahead(0.2)[None])[0] < 1
    assert seconds_to_contact(observed((4.4, 0.0, 0.0, 0.0)), ahead(0.01)[None])[0] == np.inf


def test_who_cuts_in_heeds_those_behind():
    behind_on_the_left = observed((-8.0, 3.0, 0.0, 20.0))
    left = ahead(10.0)
    left[:, 1] = 3
    assert seconds_to_contact(behind_on_the_left, left[None])[0] < 1.5
    assert seconds_to_contact(behind_on_the_left, ahead(10.0)[None])[0] == np.inf
    # Who is in front already is run into from behind.
    assert seconds_to_contact(observed((-8.0, 0.0, 0.0, 20.0)), left[None])[0] == np.inf


def test_trajectories_are_judged_one_by_one_and_nobody_is_no_danger():
    trajectories = np.stack([ahead(speed) for speed in (2.0, 8.0, 14.0)])
    obs = observed((25.0, 0.0, 0.0, 1.0), (40.0, 0.3, 0.1, 0.0))
    together = seconds_to_contact(obs, trajectories)
    assert together.tolist() == [seconds_to_contact(obs, each[None])[0] for each in trajectories]
    assert together[0] > together[1] > together[2]
    assert seconds_to_contact(observed(), trajectories).tolist() == [np.inf] * 3


def test_who_is_careful_has_those_left_that_are_free_for_long_enough():
    trajectories = np.stack([ahead(0.0 if action == 2 else 4.0 + action / 4) for action in range(ACTIONS)])
    obs = observed((21.0, 0.0, 0.0, 0.0))
    contact = seconds_to_contact(obs, trajectories)
    allowed = careful(obs, trajectories, caution=3.0)
    assert not allowed.brakes and allowed.trajectories is trajectories
    assert (allowed.actions == (contact >= 3)).all() and 1 < allowed.actions.sum() < ACTIONS
    obs["action_mask"][2:8] = False
    assert (careful(obs, trajectories, caution=3.0).actions == (contact >= 3) & obs["action_mask"]).all()


def test_where_nothing_is_free_the_brakes_go_on():
    obs = observed((21.0, 0.0, 0.0, 0.0))
    obs["ego"][0] = 10.0
    fast = np.stack([ahead(10.0)] * ACTIONS)
    # 16 m to the bumper: at 6 m/s^2 it stands after 8.3 m.
    allowed = careful(obs, fast, caution=3.0)
    assert allowed.brakes and allowed.actions.all()
    assert allowed.trajectories[0, :, 0] == pytest.approx([4.25, 7.0, 8.25] + [8.333] * 13, abs=0.001)
    # Too late to stop, but for who swerves, and then stops before the next.
    near = observed((9.0, 0.0, 0.0, 0.0), (22.0, 2.5, 0.0, 0.0))
    near["ego"][0] = 10.0
    fast[5, :, 1] = 2.5
    allowed = careful(near, fast, caution=3.0)
    assert allowed.brakes and allowed.actions.nonzero()[0].tolist() == [5]


def test_a_braked_trajectory_stays_on_its_way():
    seconds = STEP * np.arange(1, 17)
    bend = np.stack((20 * np.sin(seconds / 2), 20 * (1 - np.cos(seconds / 2)), seconds / 2), 1)
    found = braked(bend, speed=10.0)
    radius = np.hypot(found[:, 0], found[:, 1] - 20)
    # Chords of a circle are a little inside it.
    assert ((radius > 19.7) & (radius < 20.001)).all()
    assert found[:, 2] == pytest.approx(np.arctan2(found[:, 0], 20 - found[:, 1]), abs=0.01)
    assert np.hypot(*found[-1, :2]) == pytest.approx(2 * 20 * np.sin(100 / 12 / 20 / 2), abs=0.05)
    assert (braked(bend, speed=0.0) == 0).all()
    # Where a trajectory stands, it brakes straight on.
    assert braked(np.zeros((16, 3)), speed=6.0)[-1].tolist() == [3, 0, 0]


@pytest.mark.parametrize(("caution", "chosen"), [(0.0, 7), (3.0, 2)])
def test_a_careful_planner_passes_over_what_runs_into_somebody(caution: float, chosen: int):
    trajectories = np.stack([ahead(0.0 if action == 2 else 12.0) for action in range(ACTIONS)])
    scores = torch.zeros(1, ACTIONS)
    scores[0, 7], scores[0, 2] = 3.0, 1.0
    plans = Plans(torch.from_numpy(trajectories).float()[None], scores, torch.ones(1, ACTIONS, dtype=torch.bool))
    planner = TrainedPlanner(lambda features: plans, device=CPU, caution=caution)
    assert planner.choose(observed((15.0, 0.0, 0.0, 0.0))).action == chosen
    assert planner.choose(observed((15.0, 9.0, 0.0, 0.0))).action == 7


def test_spare_room_is_kept():
    # 0.5 m on each end, less the slack: somebody 4.3 m ahead is touched by who moves, and one at 5 m not yet.
    creeping = ahead(0.6, steps=1)[None]
    assert SPARE_LENGTH == 0.5
    assert np.isfinite(seconds_to_contact(observed((4.4, 0.0, 0.0, 0.0)), creeping)[0])
    assert np.isinf(seconds_to_contact(observed((5.0, 0.0, 0.0, 0.0)), creeping)[0])
