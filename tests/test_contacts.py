"""Contacts in imagined traffic: the same that `Drive-v0` finds, and what they cost and end."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from config import ConfigError, UserError
from driving.reward import CONTACT, rewards
from imagining.contacts import own_fault
from imagining.traffic import features, observed
from imagining.traffic_imagination import TrafficImagination
from parts.candidates import CandidateActor
from tests.driving_scenes import crossing, log_of, straight
from tests.scenes import Scene
from tests.test_traffic import MOVING, TASK, rows_of, traffic_of

CONTACTS: dict[str, Any] = {**MOVING, "imag_contacts": True, "imag_horizon": "4"}
Agent = tuple[float, float, float, float]


def at_fault(before: list[Agent], after: list[Agent]) -> bool:
    """By the imagined traffic's rules; the ego comes first."""
    return bool(own_fault(*(traffic_of(*agents, width=2.0) for agents in (before, after))))


def test_contacts_are_those_of_the_environment():
    rng = np.random.default_rng(0)
    expected, found = [], []
    for _ in range(300):
        place = rng.uniform(-7, 7, (4, 2)) + np.array([50, 0])
        heading, speed = rng.uniform(-math.pi, math.pi, 4), rng.choice([0.0, 0.3, 4.0], 4)
        turned = heading + rng.uniform(-0.5, 0.5, 4)
        moved = place + 0.5 * speed[:, None] * np.stack((np.cos(turned), np.sin(turned)), 1)
        before, after = (
            [tuple(row) for row in np.column_stack(columns).tolist()]
            for columns in ((place, heading, speed), (moved, turned, speed))
        )
        tracks: Any = {agent + 1: [before[agent], after[agent]] for agent in range(4)}
        expected.append(bool(rewards(log_of(tracks), crossing(), np.array([1]), 1).own_fault[0]))
        found.append(at_fault(before, after))
    assert found == expected
    assert 20 < sum(expected) < 280


def test_who_is_not_there_is_not_run_into():
    before = traffic_of((0, 0, 0, 10), (6, 0, 0, 0))
    after = traffic_of((5, 0, 0, 10), (6, 0, 0, 0))
    assert own_fault(before, after)
    gone = torch.tensor([True, False])
    assert not own_fault(before._replace(valid=gone), after._replace(valid=gone))


def a_ride(gap: float, **choices: Any) -> tuple[Scene, dict[str, torch.Tensor]]:
    """Rows of an ego at 8 m/s behind one who stands so many metres ahead of it in the last row."""
    log = log_of({1: straight(0, 8.0, 5), 2: straight(16 + gap, 0.0, 5)})
    return Scene(TASK, **{**CONTACTS, **choices}), rows_of(log, 1, range(2, 5))


def test_a_contact_costs_what_it_costs_and_ends_the_ride():
    # 8 m between the bumpers are 2 steps at constant velocity, with which a model begins.
    made, batch = a_ride(12.0)
    assert isinstance(made.imagination, TrafficImagination)
    start, trajectory = made.imagine_from(batch)
    contact = trajectory.moments.state
    assert contact[0, -1].tolist() == [False, False, False, True, True]
    expected = made.model.predict_reward(trajectory.feat(slice(1, None)))[0, -1]
    torch.testing.assert_close(made.imagination.reward(trajectory, start)[0, -1, :2], expected[:2])
    torch.testing.assert_close(made.imagination.reward(trajectory, start)[0, -1, 2], expected[2] - CONTACT)
    assert trajectory.cont[0, -1, :2].min() > 0 and trajectory.cont[0, -1, 2] == 0
    assert trajectory.survival[0, -1, 3] == 0


def test_nobody_is_touched_where_nobody_is_near():
    made, batch = a_ride(80.0)
    _, trajectory = made.imagine_from(batch)
    assert not trajectory.moments.state.any()


def test_an_actor_trains_on_rides_with_contacts():
    made, batch = a_ride(6.0, imag_tours=2)
    before = [parameter.detach().clone() for parameter in made.behavior.actor.parameters()]
    metrics = made.update(batch)
    assert all(value.isfinite().all() for value in metrics.values())
    assert metrics["contact_rate"] == 1
    assert any(not old.equal(new) for old, new in zip(before, made.behavior.actor.parameters(), strict=True))


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        ({"model.loss_scales.motion": 0.0}, UserError, "need model.loss_scales.motion above 0"),
        ({"imag_gradient": "both"}, UserError, "need imag_gradient: reinforce, got both"),
        ({"reward_scale": 0.1}, ConfigError, "imag_contacts cost what they cost in Drive-v0, and need it at 1"),
    ],
)
def test_contacts_that_cannot_be_seen_are_refused(choices: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        Scene(TASK, **{**CONTACTS, **choices})


def test_actors_see_everybody_where_they_are_known_to_be():
    made, batch = a_ride(6.0, imag_contacts=False)
    seen = made.imagination.replayed(batch)
    expected = observed(batch)
    torch.testing.assert_close(seen.agents.numbers, features(expected))
    assert seen.agents.valid.equal(expected.valid)
    _, trajectory = made.imagine_from(batch)
    agents = trajectory.moments.view.agents
    torch.testing.assert_close(agents.numbers[0, :, 0], seen.agents.numbers[0])
    # Beyond, everybody is carried on: at 4 m in half a second, of 20 m that count as 1, the ego comes nearer.
    ahead = agents.numbers[0, -1, :3, 1, 6]
    torch.testing.assert_close(ahead, torch.tensor([6.0, 2.0, -2.0]) / 20)
    assert not trajectory.moments.state.any()


def test_who_is_not_there_changes_no_score_and_gets_no_gradient():
    made, batch = a_ride(6.0)
    view, actor = made.imagination.replayed(batch), made.behavior.actor
    feat = torch.randn(1, 3, made.model.rssm.feat_size)
    assert isinstance(actor, CandidateActor)
    torch.nn.init.normal_(actor.modes.output.weight)
    scores = actor.scores(feat, None, view)
    spoilt = view.agents.numbers.masked_fill(~view.agents.valid[..., None], torch.nan).requires_grad_()
    again = actor.scores(feat, None, view._replace(agents=view.agents._replace(numbers=spoilt)))
    torch.testing.assert_close(scores, again)
    again.square().sum().backward()
    gradient = spoilt.grad
    assert gradient is not None and gradient[view.agents.valid].abs().sum(-1).min() > 0
    assert (gradient[~view.agents.valid] == 0).all()
